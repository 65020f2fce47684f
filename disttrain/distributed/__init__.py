"""Processes, devices, meshes, and the few collectives that are ours. `env` needs no torch: import from the modules."""

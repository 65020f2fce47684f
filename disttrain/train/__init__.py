"""The trainer. `folder` and `preflight` need no torch: import from the modules."""

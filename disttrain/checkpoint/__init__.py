"""Checkpoints that commit in one rename, carry a checksum for every byte, hold no pickle and load at any layout."""

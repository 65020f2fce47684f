"""disttrain verify: the parity table on this machine."""

from __future__ import annotations


def verify_command() -> None:
    """placeholder"""

"""The tiny config of the command tests serves here too."""

from tests.cli.conftest import config

__all__ = ["config"]

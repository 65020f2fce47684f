"""Who runs the step: a small protocol and its implementations."""

from disttrain.engines.native import NativeEngine
from disttrain.engines.protocol import Engine, UpdateResult

__all__ = ["Engine", "NativeEngine", "UpdateResult"]

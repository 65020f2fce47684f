"""Where metrics go; each sink lives on rank 0 only."""

from disttrain.monitor.sinks.base import Sink
from disttrain.monitor.sinks.console import ConsoleSink
from disttrain.monitor.sinks.jsonl import JsonlSink

__all__ = ["ConsoleSink", "JsonlSink", "Sink"]

"""Where metrics go; each sink lives on rank 0 only."""

from disttrain.monitor.sinks.background import BackgroundSink
from disttrain.monitor.sinks.base import Ending, Event, Sink
from disttrain.monitor.sinks.console import ConsoleSink
from disttrain.monitor.sinks.jsonl import JsonlSink, read_rows

__all__ = ["BackgroundSink", "ConsoleSink", "Ending", "Event", "JsonlSink", "Sink", "read_rows"]

"""What a run says about itself: metrics and where they go."""

from disttrain.monitor.clock import StepClock, build_clock
from disttrain.monitor.memory import ProcessUse
from disttrain.monitor.metrics import Bins, MetricBuffer, Reduced, Reduction
from disttrain.monitor.profiler import StepProfiler
from disttrain.monitor.record import Histogram, Record, Value
from disttrain.monitor.sinks import BackgroundSink, ConsoleSink, Ending, Event, JsonlSink, Sink, read_rows

__all__ = [
    "BackgroundSink",
    "Bins",
    "ConsoleSink",
    "Ending",
    "Event",
    "Histogram",
    "JsonlSink",
    "MetricBuffer",
    "ProcessUse",
    "Record",
    "Reduced",
    "Reduction",
    "Sink",
    "StepClock",
    "StepProfiler",
    "Value",
    "build_clock",
    "read_rows",
]

"""What a run says about itself: metrics and where they go."""

from disttrain.monitor.clock import StepClock, build_clock
from disttrain.monitor.memory import ProcessUse
from disttrain.monitor.metrics import Bins, Last, MetricBuffer, Reduced, Reduction
from disttrain.monitor.probe import build_probe
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
    "Last",
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
    "build_probe",
    "read_rows",
]

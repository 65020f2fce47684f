"""What a run says about itself: metrics and where they go."""

from disttrain.monitor.metrics import MetricBuffer
from disttrain.monitor.sinks import ConsoleSink, JsonlSink, Sink

__all__ = ["ConsoleSink", "JsonlSink", "MetricBuffer", "Sink"]

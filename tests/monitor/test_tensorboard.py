"""Event files, read back with TensorBoard's own reader."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from disttrain.monitor import Event, Histogram
from disttrain.monitor.sinks.tensorboard import TensorBoardSink


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0}).Reload()


def test_rows_events_and_samples(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    times = Histogram((0.1, 0.2, 0.4), (3, 1))
    sink.log({"step": 10, "unix_seconds": 1e9, "loss": 2.5, "lr/decay": 0.1, "step_seconds_histogram": times})
    sink.log({"step": 10, "validation_loss": 3.5, "step_seconds_histogram": Histogram((), ())})
    sink.event(Event(1e9, 10, "warning", "too hot"))
    sink.sample(10, "once\nupon")
    sink.close("completed")
    found = read(tmp_path)
    assert sorted(found.Tags()["scalars"]) == ["loss", "lr/decay", "validation_loss"]
    (loss,) = found.Scalars("loss")
    assert (loss.step, loss.value, loss.wall_time) == (10, 2.5, 1e9)
    (histogram,) = found.Histograms("step_seconds_histogram")
    assert histogram.histogram_value.num == 4
    assert b"too hot" in found.Tensors("events/warning/text_summary")[0].tensor_proto.string_val[0]


def test_a_resumed_run_hides_what_it_does_again(tmp_path: Path) -> None:
    for resumed, steps in ((0, range(1, 8)), (4, range(5, 11))):
        sink = TensorBoardSink(tmp_path, resumed)
        for step in steps:
            sink.log({"step": step, "loss": float(step + resumed)})
        sink.close("failed")
    found = read(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(s, float(s if s < 5 else s + 4)) for s in range(1, 11)]

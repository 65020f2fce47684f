"""What the first rank writes and shows; the other ranks have the same object and say nothing."""

from __future__ import annotations

from disttrain.checkpoint.manager import Saved
from disttrain.distributed.env import Ranks
from disttrain.monitor import ConsoleSink, JsonlSink
from disttrain.optim import OptimizerSet, Safeguards
from disttrain.optim.ownership import ownership, ownership_record, ownership_table
from disttrain.train.folder import State, disk_errors
from disttrain.train.preflight import PreparedRun


class RunOutput:
    """The run folder's files and the console of a run of `total_steps` that starts or resumes at `step`."""

    def __init__(self, run: PreparedRun, ranks: Ranks, step: int, total_steps: int, notes: list[str]) -> None:
        self.folder = run.folder
        self.console: ConsoleSink | None = None
        if not ranks.is_first:
            return
        with disk_errors(self.folder.path):
            self.folder.write_config(run.config)
            self.folder.write_status("running", step)
            if run.data.tokenizer is not None:
                run.data.tokenizer.save(self.folder.tokenizer)
            self.jsonl = JsonlSink(self.folder.metrics, resumed_step=step)
        self.console = ConsoleSink(total_steps, step)
        for note in notes:
            self.console.say(note)

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.say(text)

    def announce(self, optimizer: OptimizerSet, safeguards: Safeguards) -> None:
        """Who owns which parameter, and computes which matrix: all of it in the run folder, in brief on the console;
        and what watches over the steps."""
        if self.console is None:
            return
        rows, exchanges = ownership(optimizer), optimizer.matrix_optimizers
        tables = [plan.table() for exchange in exchanges for plan in exchange.plans]
        with disk_errors(self.folder.path):
            self.folder.write_ownership(ownership_record(rows), tables)
        for line in ownership_table(rows):
            self.console.say(line)
        for line in (line for exchange in exchanges for line in exchange.describe()):
            self.console.say(line)
        for line in safeguards.describe():
            self.console.say(line)

    def log(self, record: dict[str, float]) -> None:
        if self.console is not None:
            self.jsonl.log(record)
            self.console.log(record)

    def log_validation(self, step: int, tokens: int, loss: float, bits_per_byte: float | None) -> None:
        if self.console is None:
            return
        record = {"step": step, "tokens": tokens, "validation_loss": loss}
        if bits_per_byte is not None:
            record["validation_bits_per_byte"] = bits_per_byte
        self.jsonl.log(record)
        shown = "n/a (no tokenizer)" if bits_per_byte is None else f"{bits_per_byte:.4f}"
        self.console.say(f"validation at step {step}: loss {loss:.4f}, bits per byte {shown}")

    def total(self, steps: int) -> None:
        """The run has another length than was thought."""
        if self.console is not None:
            self.console.total(steps)

    def warn(self, text: str) -> None:
        if self.console is not None:
            self.console.say(f"warning: {text}")

    def log_checkpoint(self, saved: Saved) -> None:
        """What a committed checkpoint cost, and what went wrong besides."""
        if self.console is None:
            return
        record = {"step": saved.step, "checkpoint_bytes": saved.bytes, "checkpoint_stall_seconds": saved.stall_seconds}
        self.jsonl.log(record | {"checkpoint_write_seconds": saved.write_seconds})
        self.console.say(
            f"checkpoint of step {saved.step}: {saved.bytes / 1e6:,.1f} MB written in {saved.write_seconds:.2f} s, "
            f"training stood still for {saved.stall_seconds:.2f} s"
        )
        for note in saved.notes:
            self.warn(note)

    def sample(self, step: int, text: str | None) -> None:
        if self.console is not None and text:
            with disk_errors(self.folder.path):
                self.folder.add_sample(step, text)
            self.console.say(f"sample after {step} steps:\n{text}")

    def leave(self, state: State, step: int) -> None:
        """The last word of a run that ends as it should."""
        if self.console is None:
            return
        self.console.close()
        with disk_errors(self.folder.path):
            self.jsonl.close()
            self.folder.write_status(state, step)
        done = "done" if state == "completed" else "stopped on request with a checkpoint; start again to resume"
        self.console.say(f"{done}: step {step}, {self.folder.path}")

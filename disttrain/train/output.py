"""What the first rank writes and shows; the other ranks have the same object and say nothing."""

from __future__ import annotations

import time
from contextlib import suppress

import torch

from disttrain.checkpoint.manager import Saved
from disttrain.checkpoint.manifest import Manifest
from disttrain.config.deepspeed import ds_config
from disttrain.distributed.env import Ranks
from disttrain.monitor import ConsoleSink, Ending, Event, JsonlSink, Value
from disttrain.optim import OptimizerSet, Safeguards
from disttrain.optim.ownership import ownership, ownership_record, ownership_table
from disttrain.resilience import lost_peers
from disttrain.train.environment import describe_environment
from disttrain.train.folder import State, disk_errors
from disttrain.train.preflight import PreparedRun
from disttrain.train.run_time import RunTime
from disttrain.train.sinks import RunSinks, build_sinks, wandb_run_id


class RunOutput:
    """The run folder's files, the console and the other sinks of a run of `total_steps` that starts anew or goes on
    from the `resumed` checkpoint."""

    def __init__(
        self,
        run: PreparedRun,
        ranks: Ranks,
        device: torch.device,
        run_time: RunTime,
        resumed: Manifest | None,
        total_steps: int,
        notes: list[str],
    ) -> None:
        self.folder, self.run_time = run.folder, run_time
        self.step, self.tokens = (resumed.step, resumed.tokens) if resumed else (0, 0)
        self.console: ConsoleSink | None = None
        self.wandb_id: str | None = None
        self._checkpoint: dict[str, Value] = {}
        if not ranks.is_first:
            return
        environment = describe_environment(ranks, device)
        with disk_errors(self.folder.path):
            self.folder.write_config(run.config)
            if run.config.engine == "deepspeed":
                self.folder.write_ds_config(ds_config(run.config, ranks.world))
            self.folder.write_environment(environment)
            self._status("running")
            if run.data.tokenizer is not None:
                run.data.tokenizer.save(self.folder.tokenizer)
            self.jsonl = JsonlSink(self.folder.metrics, resumed_step=self.step)
        self.wandb_id = wandb_run_id(run, resumed)
        self.console = ConsoleSink(total_steps, self.step)
        # A sink may fail, and say so, before all of them are there.
        self.sinks = RunSinks({})
        self.sinks = build_sinks(run, resumed, self.wandb_id, environment, self.say, self.warn)
        self.event("resume" if resumed else "start", f"{ranks.world} processes on {environment['device']}")
        for note in notes:
            self.console.say(note)

    def reached(self, step: int, tokens: int) -> None:
        """Where the run is: what is told from now on is told of there."""
        self.step, self.tokens = step, tokens

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.say(text)

    def warn(self, text: str, kind: str = "warning") -> None:
        self.say(f"warning: {text}")
        self.event(kind, text)

    def rolled_back(self, step: int, tokens: int, reason: str) -> None:
        """The run goes on from an earlier step, whose rows are the last that stand."""
        before = self.step
        self.reached(step, tokens)
        self._checkpoint = {}
        if self.console is not None:
            with disk_errors(self.folder.path):
                self.jsonl.rewind(step)
        self.warn(f"rolled back from step {before} to {step}: {reason}", kind="rollback")

    def event(self, kind: str, text: str) -> None:
        """For the time line; nothing on the console."""
        if self.console is not None:
            self.sinks.event(Event(**self.folder.add_event(kind, self.step, text)))

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

    def log(self, record: dict[str, Value]) -> None:
        """A row of the step that was `reached`."""
        if self.console is not None:
            self._record(record)
            self.console.log(record)
            # A full disk must not end a run: the last state that was written stays.
            with suppress(OSError):
                self._status("running")

    def log_validation(self, loss: float, bits_per_byte: float | None) -> None:
        if self.console is None:
            return
        record: dict[str, Value] = {"step": self.step, "tokens": self.tokens, "unix_seconds": time.time()}
        record["validation_loss"] = loss
        if bits_per_byte is not None:
            record["validation_bits_per_byte"] = bits_per_byte
        self._record(record)
        shown = "n/a (no tokenizer)" if bits_per_byte is None else f"{bits_per_byte:.4f}"
        self.console.say(f"validation at step {self.step}: loss {loss:.4f}, bits per byte {shown}")

    def total(self, steps: int) -> None:
        """The run has another length than was thought."""
        if self.console is not None:
            self.console.total(steps)

    def log_checkpoint(self, saved: Saved) -> None:
        """What a committed checkpoint cost, which the next row tells, and what went wrong besides."""
        if self.console is None:
            return
        # No row of its own: when a save beside the training ends is chance, and rows are the same in every run.
        self._checkpoint = {
            "checkpoint_step": saved.step,
            "checkpoint_bytes": saved.bytes,
            "checkpoint_stall_seconds": saved.stall_seconds,
            "checkpoint_write_seconds": saved.write_seconds,
        }
        text = (
            f"checkpoint of step {saved.step}: {saved.bytes / 1e6:,.1f} MB written in {saved.write_seconds:.2f} s, "
            f"training stood still for {saved.stall_seconds:.2f} s"
        )
        self.console.say(text)
        self.event("checkpoint", text)
        for note in saved.notes:
            self.warn(note)

    def sample(self, text: str | None) -> None:
        if self.console is not None and text:
            with disk_errors(self.folder.path):
                self.folder.add_sample(self.step, text)
            self.sinks.sample(self.step, text)
            self.console.say(f"sample after {self.step} steps:\n{text}")

    def leave(self, state: Ending, reason: str | None = None) -> None:
        """The last word of a run that ends as it should; `reason` is why it was asked to stop."""
        if self.console is None:
            return
        if self._checkpoint:
            self._record({"step": self.step, "tokens": self.tokens, "unix_seconds": time.time()})
        self.console.close()
        done = "done" if state == "completed" else "stopped on request with a checkpoint; start again to resume"
        if state == "preempted":
            self.folder.stop_file.unlink(missing_ok=True)  # it was obeyed
            self.event("stop", f"{reason or 'another rank was asked to stop'}; {done}")
        else:
            self.event(state, done)
        # Before the sinks, which may take their time: whoever kills us meanwhile finds the truth.
        with disk_errors(self.folder.path):
            self.jsonl.close()
            self._status(state)
        self.sinks.close(state)
        self.console.say(f"{done}: step {self.step}, {self.folder.path}")

    def failed(self, error: BaseException) -> None:
        """The last word of a run that ends otherwise; the error itself is printed by others."""
        if self.console is None:
            return
        self.console.close()
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        self.event("failed", "the other ranks are gone" if lost_peers(error) else first_line)
        with suppress(OSError):
            self.jsonl.close()
        self.sinks.close("failed")

    def _record(self, record: dict[str, Value]) -> None:
        record |= self._checkpoint
        self._checkpoint = {}
        self.jsonl.log(record)
        self.sinks.log(record)

    def _status(self, state: State) -> None:
        self.folder.write_status(state, self.step, **self.run_time.status())

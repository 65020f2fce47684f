"""The training loop: step, look, save, until the end or a wish to stop."""

from __future__ import annotations

import torch

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.checkpoint.rollback import roll_back
from disttrain.data.loader import Microbatch, validation_batches
from disttrain.distributed.env import Ranks
from disttrain.monitor import Ending, StepProfiler
from disttrain.optim.noise_scale import ENOUGH, NoiseScale
from disttrain.parallel import device_notes, parameters_will_change
from disttrain.resilience import StopRequest, Watchdog
from disttrain.train.batches import resume_batches
from disttrain.train.begin import begin_run
from disttrain.train.build import build_batch_law, build_training
from disttrain.train.evaluate import evaluate
from disttrain.train.finish import bigram_line, sample_text
from disttrain.train.first_update import FirstUpdate
from disttrain.train.guard import BadStep, Recovery, StepGuard, weights_not_finite
from disttrain.train.measurements import Measurements
from disttrain.train.output import RunOutput
from disttrain.train.patience import Patience
from disttrain.train.position import Position
from disttrain.train.preflight import PreparedRun
from disttrain.train.replica_check import ReplicaCheck
from disttrain.train.run_time import kept_seconds, resume_time
from disttrain.train.saving import RunCheckpoints, room_note
from disttrain.train.step import StepResult, train_step


class TrainingLoop:
    """The parts of a run on one rank, and the position that they have reached."""

    def __init__(self, run: PreparedRun, ranks: Ranks, device: torch.device, watchdog: Watchdog) -> None:
        self.config, self.data, self.ranks, self.device = run.config, run.data, ranks, device
        self.parts = build_training(run.config, run.data, ranks, device)
        self.guard = StepGuard(self.parts.optimizer, run.config.parallel.param_dtype == "fp16")
        self.noise = NoiseScale(torch.device("cpu") if run.config.parallel.cpu_offload else device)
        section = run.config.checkpoint
        manager = CheckpointManager(
            LocalStorage(run.folder.checkpoints),
            section.keep_last,
            run.run_id,
            keep_every=section.keep_every,
            asynchronous=section.asynchronous,
        )
        resumed, self.batches, notes = begin_run(run.config, self.parts, manager, self._state(), ranks.world)
        self.position = Position(resumed.step, resumed.samples, resumed.tokens) if resumed else Position()
        self.total_steps = self.batches.schedule.steps_of(run.config.train.steps, run.config.train.tokens)
        # Lengths in steps go by the batches that the config names, whatever the run has made of them since.
        self.law = build_batch_law(run.config, self.parts.optimizer, run.config.train.batches())
        notes += device_notes(run.config.parallel, device) + room_note(manager, self._state())
        self.replicas = ReplicaCheck(run.config, self.parts.gpt, ranks.world)
        self.recovery = Recovery(run.config.resilience.anomaly, resumed.extra if resumed else {})
        self.run_time = resume_time(run.started, resumed.extra if resumed else {}, run.earlier)
        self.output = RunOutput(run, ranks, device, self.run_time, resumed, self.total_steps, notes)
        self.output.announce(self.parts.optimizer, self.parts.safeguards)
        self.patience = Patience(run.config.resilience, watchdog, self.run_time, self.output)
        self.first_update = FirstUpdate(self.parts.optimizer, self.output)
        self.checkpoints = RunCheckpoints(manager, section, self.output)
        self.profiler = StepProfiler(run.config.profile.steps, run.folder.traces, ranks, device)
        self.measured = Measurements(
            run.config, self.parts, ranks, device, self.run_time, self.noise, self.position.samples
        )

    def run(self, stop: StopRequest) -> Ending:
        self.run_time.ready()
        while self.position.step < self.total_steps:
            before = self.position.step
            stopping = self._step(stop.wanted)
            if self.position.step <= before:
                continue  # rolled back
            step, last = self.position.step, self.position.step >= self.total_steps
            # Not in a row of bad steps: what is kept from before it must not give way.
            saving = (self.checkpoints.due(step) and not self.recovery.in_row) or last or stopping
            # Before the checkpoint: a run that is cut short in the evaluation does it again when it resumes.
            if step % self.config.monitor.evaluate_every == 0 or last:
                self._evaluate()
            self.patience.enter("saving", step)
            self._compare_replicas(saving)
            if saving:
                self._save(last=last or stopping)
            if stopping and not last:
                return "preempted"
        self.patience.enter("the end", self.position.step)
        with self.run_time.lost_to("finish"):
            self._finish()
        return "completed"

    def _step(self, stop_wanted: bool) -> bool:
        """One optimizer step; whether the ranks have agreed to stop after it."""
        samples = self.batches.schedule.samples_at(self.position.tokens)
        length, every = self.config.train.sequence_length, self.config.monitor.noise_scale_every
        reached = self.position.after(samples, length)
        logging = reached.step % self.config.monitor.log_every == 0 or reached.step in (1, self.total_steps)
        self.patience.step(reached.step)
        self.profiler.before(reached.step)
        self.first_update.before()
        self.measured.before(logging)
        clock = self.measured.clock
        clock.start()
        batches = self.parts.loader.microbatches(self.position.samples, samples)
        for line in self.law.follow(samples * length):
            self.output.say(line)
        clock.lap("data")
        result = train_step(
            self.parts.engine,
            [(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)) for batch in batches],
            lr_factor=self.law.lr_factors(reached.tokens, samples * length),
            device=self.device,
            stop_wanted=stop_wanted,
            saving=self.checkpoints.busy,
            compare_weights=self.replicas.within_steps and self.replicas.due(reached.step),
            measure_noise=bool(every) and reached.step % every == 0,
            lap=clock.lap,
        )
        clock.stop()
        consumed = (self.position.samples, reached.samples - 1)
        self.position = reached
        self.output.reached(reached.step, reached.tokens)
        self.measured.after(result)
        self.first_update.after(result.update)
        if logging:
            self._log(result, samples * length)
        if self.profiler.due(reached.step, self.total_steps):
            with self.run_time.lost_to("profile"):
                for line in self.profiler.after(reached.step):
                    self.output.say(line)
        self._follow_noise()
        self.checkpoints.look(reached.step, result.saving)
        if result.update.weight_sums is not None:
            self.replicas.dist_compare(reached.step, result.update.weight_sums)
        self._answer(self.guard.look(reached.step, consumed, result))
        return result.stop

    def _compare_replicas(self, saving: bool) -> None:
        if self.replicas.between_steps(self.position.step, saving):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the step that is under way is no part of it
            with self.run_time.lost_within("comparison"):
                self.replicas.dist_compare(self.position.step)

    def _answer(self, seen: list[BadStep | None]) -> None:
        """Leave bad steps left out, or go back to before them and on behind their data."""
        for bad in seen:
            if bad is None:
                self.recovery.good_step()
                continue
            self.output.warn(f"step {bad.step} left out: {bad.reason}", kind="skipped")
            if self.recovery.must_roll_back(bad):
                self._roll_back(bad)
                return

    def _roll_back(self, bad: BadStep) -> None:
        self.patience.enter("rolling back", self.position.step)
        self.guard.forget()
        self.checkpoints.settle(self.position.step)
        manager, optimizer = self.checkpoints.manager, self.parts.optimizer

        def good() -> bool:
            self.parts.engine.loaded()
            return weights_not_finite(optimizer) == 0

        found = roll_back(manager, self._state(), self.recovery.first_bad, good)
        if found is None:
            raise self.recovery.nowhere_to_go(bad)
        manifest, samples = found.manifest, self.position.samples
        self.position = Position(manifest.step, samples, manifest.tokens)
        self.batches, _ = resume_batches(self.config, self.ranks.world, manifest.tokens, manifest.extra)
        self.total_steps = self.batches.schedule.steps_of(self.config.train.steps, self.config.train.tokens)
        self.output.total(self.total_steps)
        self.recovery.rolled_back()
        self.run_time.rolled_back(kept_seconds(manifest.extra))
        self.measured.restart(samples)
        reason = f"{bad.reason}; the run goes on with sample {samples:,}, behind all that it has seen"
        self.output.rolled_back(manifest.step, manifest.tokens, reason)

    def _log(self, result: StepResult, batch_tokens: int) -> None:
        """The loss of this very step, so that a trace does not depend on where a run was resumed."""
        left = self.total_steps - self.position.step
        record = self.measured.row(result, self.position, steps_left=left, batch_tokens=batch_tokens)
        for warning in self.measured.warnings:
            self.output.warn(f"step {self.position.step}: {warning}")
        self.output.log(record)

    def _follow_noise(self) -> None:
        """Double the batch where `train.batch_auto` says so; all ranks have the same averages."""
        train, auto = self.config.train, self.config.train.batch_auto
        if auto is None or self.position.step % auto.every_steps:
            return
        batch = self.batches.schedule.samples_at(self.position.tokens) * train.sequence_length
        scale = self.noise.tokens(least_weight=ENOUGH)
        if scale is None or scale < auto.ratio * batch or batch >= train.global_batch_tokens:
            return
        self.batches = self.batches.doubled(self.position.tokens)
        self.total_steps = self.batches.schedule.steps_of(train.steps, train.tokens)
        self.output.total(self.total_steps)
        self.output.say(f"noise scale of {scale:,.0f} tokens: the batch goes from {batch:,} to {2 * batch:,} tokens")

    def _evaluate(self) -> None:
        train = self.config.train
        batches = validation_batches(
            self.data.validation,
            train.sequence_length,
            self.config.monitor.evaluate_tokens,
            self.ranks.rank,
            self.ranks.world,
            train.microbatch_size,
        )
        batches = (self._next_batch(batch) for batch in batches)
        with self.run_time.lost_to("evaluation"), self.parts.engine.evaluation_weights():
            result = evaluate(self.parts.model, batches, self.data.bytes_per_token, self.device)
        self.output.log_validation(result.loss, result.bits_per_byte)

    def _next_batch(self, batch: Microbatch) -> Microbatch:
        self.patience.enter("a batch of the evaluation", self.position.step)
        return batch

    def _state(self) -> dict[str, torch.Tensor]:
        return {**self.parts.engine.state(), **self.noise.state()}

    def _save(self, last: bool) -> None:
        with self.run_time.lost_to("checkpoint"):
            self.checkpoints.save(
                self._state(),
                last=last,
                step=self.position.step,
                samples=self.position.samples,
                tokens=self.position.tokens,
                config=self.config.model_dump(mode="json"),
                data=self.data.identity,
                strategy=self.config.parallel.strategy,
                extra=self.batches.record()
                | self.run_time.record()
                | self.recovery.record()
                | {"wandb": {"id": self.output.wandb_id}},
            )

    def _finish(self) -> None:
        """A sample (every rank computes it: the model may be sharded), and the bar to compare with."""
        with self.parts.engine.evaluation_weights():
            text = sample_text(self.parts.model, self.data.tokenizer, self.config, self.device)
        parameters_will_change(self.parts.model)
        if self.ranks.is_first:
            if self.config.monitor.bigram_baseline:
                self.output.say(bigram_line(self.config, self.data, self.parts.order, self.position.samples))
            self.output.sample(text)

"""What a run measures of its steps, and the row that comes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from disttrain.config import RunConfig
from disttrain.distributed.env import Ranks
from disttrain.flops import model_flops_utilisation, peak_flops, training_flops_per_token
from disttrain.monitor import Bins, Last, MetricBuffer, ProcessUse, Reduced, Reduction, Value, build_clock, build_probe
from disttrain.optim.noise_scale import NoiseScale
from disttrain.optim.update_size import UpdateSizes
from disttrain.resilience import SlowRanks
from disttrain.resilience.slow import LEAST_SECONDS
from disttrain.train.build import Training, build_gpt
from disttrain.train.group_metrics import GroupMetrics
from disttrain.train.position import Position
from disttrain.train.run_time import RunTime
from disttrain.train.safeguard_metrics import SafeguardMetrics
from disttrain.train.step import StepResult

PARTS = ("data", "communication", "forward", "backward", "optimizer")
STEP_TIMES = Bins(1e-4, 1e4, per_decade=20)


class Measurements:
    """Values stay on the device between rows; a row costs one collective. `samples` have been consumed so far."""

    def __init__(
        self,
        config: RunConfig,
        parts: Training,
        ranks: Ranks,
        device: torch.device,
        run_time: RunTime,
        noise: NoiseScale,
        samples: int,
    ) -> None:
        self.config, self.ranks, self.run_time, self.noise = config, ranks, run_time, noise
        self.groups = GroupMetrics(parts.optimizer)
        self.safeguards = SafeguardMetrics(parts.optimizer, parts.safeguards)
        self.sizes = UpdateSizes(parts.optimizer.param_groups)
        self.clock = build_clock(device)
        self.probe = build_probe(device)
        self.slow_ranks = SlowRanks(
            config.resilience.slow_rank_factor, least_seconds=0.0 if self.probe else LEAST_SECONDS
        )
        self.warnings: list[str] = []
        """What the last row has brought to light."""
        self.use = ProcessUse(device)
        self.flops_per_token = training_flops_per_token(
            _matmul_parameters(config), config.model.n_layers, config.model.d_model, config.train.sequence_length
        )
        self.peak_flops = config.monitor.peak_flops_per_device or _peak_flops(device, config.parallel.param_dtype)
        names = [group["name"] for group in parts.optimizer.param_groups]
        self._squares = [(f"update/{name}", f"weights/{name}") for name in names]
        self.metrics = MetricBuffer(self._reductions(), device)
        self._logging = False
        self.restart(samples)

    def restart(self, samples: int) -> None:
        """A row begins; what was measured and has no row belongs to steps that do not stand."""
        self.clock.read()
        self.metrics.clear()
        self.groups.clear()
        self.safeguards.clear()
        self._steps, self._samples = 0, samples
        self._productive_seconds = self.run_time.productive_seconds
        self._lost_seconds = dict(self.run_time.lost_seconds)

    def before(self, logging: bool) -> None:
        """Before a step; with `logging` it will have a row."""
        self._logging = logging
        if logging:
            self.sizes.before()

    def after(self, result: StepResult) -> None:
        """After every step. Collective in nothing."""
        update = result.update
        self.run_time.step()
        self._steps += 1
        self.metrics.add("skipped_steps", update.skipped)
        self.groups.add(update.norms)
        self.safeguards.add(update)
        if update.chunks is not None:
            # What was left out teaches nothing.
            total = torch.where(update.skipped > 0, torch.nan, update.norms.total.square())
            self.noise.add(total, update.chunks, result.valid_tokens, result.chunk_squares)
        if self._logging:
            self.metrics.add("loss", result.loss_sum)
            for (moved, held), (updates, weights, elements) in zip(self._squares, self.sizes.after(), strict=True):
                self.metrics.add(moved, updates, elements)
                self.metrics.add(held, weights, elements)

    def row(self, result: StepResult, position: Position, *, steps_left: int, batch_tokens: int) -> dict[str, Value]:
        """What is known after a step that was announced as one to be logged. Collective."""
        reduced, steps = self._reduce(), self._steps
        self.warnings = self.safeguards.warnings() + self.slow_ranks.look(reduced.last("own_work_seconds"))
        length = self.config.train.sequence_length
        productive = self.run_time.productive_seconds - self._productive_seconds
        tokens_per_second = (position.samples - self._samples) * length / productive
        record: dict[str, Value] = {
            "step": position.step,
            "tokens": position.tokens,
            "unix_seconds": time.time(),
            "loss": reduced["loss"] / max(result.valid_tokens, 1),
            "grad_norm": result.update.grad_norm.item(),
            "valid_tokens": result.valid_tokens,
            "global_batch_tokens": batch_tokens,
            "tokens_per_second": tokens_per_second,
            "model_flops_per_second": tokens_per_second * self.flops_per_token,
            **self._utilisation(tokens_per_second * self.flops_per_token),
            "step_seconds": productive / steps,
            "seconds_left": productive / steps * steps_left,
            **self._times(reduced),
            **{name: reduced[name] for name in self.use.names if name != "cpu_share"},
            "goodput": self.run_time.goodput,
            **self.groups.record(result.update.norms),
            **self._sizes(reduced),
            **self.safeguards.record(result.update),
            **self.noise.record(length * self.ranks.world),
        }
        record["skipped_steps"] = reduced["skipped_steps"] / self.ranks.world
        if self.config.parallel.param_dtype == "fp16":
            record["loss_scale"] = result.update.loss_scale.item()
        if self.config.monitor.rank_metrics:
            record |= _by_rank(reduced, ["own_step_seconds", *self.use.names])
        self.restart(position.samples)
        return record

    def _reductions(self) -> Mapping[str, Reduction]:
        squares: dict[str, Reduction] = {name: "mean" for pair in self._squares for name in pair}
        parts: dict[str, Reduction] = {f"{part}_seconds": "mean" for part in PARTS}
        own: dict[str, Reduction] = {
            "own_step_seconds": "mean",
            "step_seconds_histogram": STEP_TIMES,
            "own_work_seconds": Last(16),
        }
        use: dict[str, Reduction] = dict.fromkeys(self.use.names, "max")
        sums: dict[str, Reduction] = {"loss": "sum", "skipped_steps": "sum"}
        return sums | squares | parts | own | use

    def _reduce(self) -> Reduced:
        parts, steps = self.clock.read()
        for part, seconds in parts.items():
            self.metrics.add(f"{part}_seconds", seconds, self._steps)
        self.metrics.add("own_step_seconds", sum(steps), self._steps)
        self.metrics.add("step_seconds_histogram", torch.tensor(steps))
        # What a GPU's events measure holds its waits for others: there only a probe tells who is slow.
        self.metrics.add("own_work_seconds", torch.tensor([self.probe.seconds()] if self.probe else steps))
        for name, value in self.use.look().items():
            self.metrics.add(name, value)
        return self.metrics.reduce()

    def _times(self, reduced: Reduced) -> dict[str, Value]:
        """Seconds of a step, on average over steps and ranks, and what stood between steps."""
        times: dict[str, Value] = {
            name: reduced[name] for name in (f"{part}_seconds" for part in PARTS) if reduced[name] == reduced[name]
        }
        for cause in ("evaluation", "checkpoint", "comparison"):
            lost = self.run_time.lost_seconds.get(cause, 0.0) - self._lost_seconds.get(cause, 0.0)
            times[f"{cause}_seconds"] = lost / self._steps
        return times | {"step_seconds_histogram": reduced.histograms["step_seconds_histogram"]}

    def _sizes(self, reduced: Reduced) -> dict[str, float]:
        record = {}
        for moved, held in self._squares:
            group = moved.removeprefix("update/")
            record[f"update_rms/{group}"] = reduced[moved] ** 0.5
            record[f"param_rms/{group}"] = reduced[held] ** 0.5
        return record

    def _utilisation(self, flops_per_second: float) -> dict[str, float]:
        if self.peak_flops is None:
            return {}
        return {"mfu": model_flops_utilisation(flops_per_second, self.ranks.world, self.peak_flops)}


def _matmul_parameters(config: RunConfig) -> int:
    """Of the whole model, however an engine holds it."""
    return build_gpt(config.model, config.train.sequence_length, torch.device("meta")).matmul_parameters


def _by_rank(reduced: Reduced, names: list[str]) -> dict[str, Any]:
    return {f"rank/{rank}/{name}": value for name in names for rank, value in enumerate(reduced.by_rank(name))}


def _peak_flops(device: torch.device, dtype: str) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None

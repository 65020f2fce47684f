"""How long each part of a run may take before its rank is taken to hang."""

from __future__ import annotations

from disttrain.config.resilience import ResilienceConfig
from disttrain.resilience import Watchdog
from disttrain.train.output import RunOutput
from disttrain.train.run_time import RunTime


class Patience:
    """Tells the watchdog what begins; warns once where a setting is shorter than a step."""

    def __init__(self, config: ResilienceConfig, watchdog: Watchdog, run_time: RunTime, output: RunOutput) -> None:
        self.config, self.watchdog, self.run_time, self.output = config, watchdog, run_time, output
        self._warned = False

    def enter(self, phase: str, step: int) -> None:
        """Something that takes as long as a collective may."""
        self.watchdog.enter(phase, self.config.collective_timeout_seconds, step)

    def step(self, step: int) -> None:
        """A step may take `hang_seconds`, or thrice what the last one took; the first one compiles and connects."""
        limit, last = self.config.hang_seconds, self.run_time.last_step_seconds
        if last is None:
            self.enter("the first step", step)
            return
        if last > limit and not self._warned:
            self._warned = True
            self.output.warn(
                f"resilience.hang_seconds = {limit:g} is shorter than a step, which took {last:.1f} s: a rank that "
                f"hangs is noticed after {3 * last:.0f} s; raise it"
            )
        self.watchdog.enter("a step", max(limit, 3 * last), step)

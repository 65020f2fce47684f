"""What a run measures and where it goes."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, model_validator

from disttrain.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class WandbConfig(Section):
    """Weights & Biases; keys and servers come from its own environment variables and `wandb login`."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """`online` falls back to `offline`, whose files `wandb sync` sends later, when the server cannot be reached."""
    project: str = "disttrain"
    entity: str | None = None
    name: str | None = None
    """Unset: run.name."""
    group: str | None = None
    job_type: str | None = None
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    notes: str | None = None
    alerts: bool = True
    """Alert when the run is stopped, fails or rolls back."""
    start_seconds: PositiveFloat = 60.0
    """How long the server may take to answer at the start; training does not wait for it."""
    finish_seconds: PositiveFloat = 30.0
    """How long the run waits at its end for what is not yet sent."""


class TensorBoardConfig(Section):
    enabled: bool = False
    """Event files in the run folder's tensorboard/."""


class PrometheusConfig(Section):
    port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """Where the first rank answers; unset for nowhere, 0 for a free port, which is printed."""
    address: str = "127.0.0.1"
    token_file: str | None = None
    """A file with the token that scrapers must send as `Authorization: Bearer TOKEN`."""

    @model_validator(mode="after")
    def _check_address(self) -> PrometheusConfig:
        try:
            local = ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            raise ValueError(f"address = {self.address!r} is not an IP address; 127.0.0.1 is this machine") from None
        if not local and self.token_file is None:
            raise ValueError(
                f"address = {self.address!r} lets other machines read the run's numbers: set token_file, a file with "
                "the token that they must send, or keep 127.0.0.1"
            )
        return self


class MonitorConfig(Section):
    log_every: PositiveInt = 10
    noise_scale_every: NonNegativeInt = 10
    """Steps between measurements of the gradient noise scale; 0 for none."""
    evaluate_every: PositiveInt = 250
    """Steps between evaluations; the last step always gets one."""
    evaluate_tokens: PositiveInt = 65_536
    bigram_baseline: bool = False
    """Print, at the end, what an add-k bigram model of the same training tokens would reach on the same validation."""
    sample_prompt: str = "\n"
    sample_tokens: NonNegativeInt = 128
    """Tokens of text generated at the end of the run; 0 for none."""
    rank_metrics: bool = False
    """Log each rank's own step time, memory and CPU share as `rank/RANK/...`; by default only sums and extremes."""
    peak_flops_per_device: PositiveFloat | None = None
    """What MFU is a share of, in FLOP/s; unset: that of devices that are known, and no MFU for others."""
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    tensorboard: TensorBoardConfig = Field(default_factory=TensorBoardConfig)
    prometheus: PrometheusConfig = Field(default_factory=PrometheusConfig)


class ProfileConfig(Section):
    steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] | None = None
    """First and last step to be profiled by torch's profiler, on every rank."""

    @model_validator(mode="after")
    def _check_steps(self) -> ProfileConfig:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps = {list(self.steps)}: the first step comes after the last one")
        return self

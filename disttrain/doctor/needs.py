"""What the run that is to come asks of the machines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disttrain.config import RunConfig
from disttrain.config.model import ModelConfig

STATE_BYTES_PER_PARAMETER = 12
"""fp32 weights and two fp32 moments: AdamW's, more than what most other optimizers keep."""
USUAL_VOCABULARY = 50_257


@dataclass(frozen=True)
class Needs:
    nodes: int = 1
    nproc: int = 1
    """Processes of each node."""
    hosts: tuple[str, ...] = ()
    """Names of the nodes, where they are known before."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    folder: Path = Path()
    """Where the run will write."""
    head: str | None = None
    port: int | None = None
    """Of the rendezvous, on the head."""
    checkpoint_bytes: int | None = None
    """None without a config."""
    checkpoints_kept: int = 1
    stop_seconds: float = 120.0
    """How long before the end of its job the run begins its last checkpoint."""
    config: RunConfig | None = None

    @property
    def world(self) -> int:
        return self.nodes * self.nproc


def needs_of(
    config: RunConfig | None,
    nodes: int,
    nproc: int,
    head: str | None,
    port: int | None,
    hosts: tuple[str, ...] = (),
) -> Needs:
    """From a config, or what holds for any run."""
    if config is None:
        return Needs(nodes=nodes, nproc=nproc, hosts=hosts, head=head, port=port)
    return Needs(
        nodes=nodes,
        nproc=nproc,
        hosts=hosts,
        device=config.device,
        folder=config.run_dir,
        head=head,
        port=port,
        checkpoint_bytes=STATE_BYTES_PER_PARAMETER * parameters(config.model, config.train.sequence_length),
        checkpoints_kept=config.checkpoint.keep_last,
        stop_seconds=config.resilience.stop_before_limit_seconds,
        config=config,
    )


def parameters(model: ModelConfig, sequence_length: int) -> int:
    """All weights of the matrices; biases and norms, which are a thousandth of them, are left out."""
    attention = 2 * model.d_model * model.d_model + 2 * model.d_model * model.kv_heads * model.head_dim
    mlp = (3 if model.mlp == "swiglu" else 2) * model.d_model * model.ff_width
    embeddings = (1 if model.tie_embeddings else 2) * (model.vocab_size or USUAL_VOCABULARY) * model.d_model
    positions = sequence_length * model.d_model if model.position == "learned" else 0
    return model.n_layers * (attention + mlp) + embeddings + positions

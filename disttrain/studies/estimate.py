"""How long a comparison may take: by the floating-point operations of its runs and what this machine does of them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from disttrain.config import RunConfig
from disttrain.flops import training_flops_per_token
from disttrain.studies.cells import run_config
from disttrain.studies.optimizers import centre
from disttrain.studies.plan import Cell, Plan

_NVIDIA = Path("/dev/nvidiactl")
_SIDE, _TRIALS = 512, 5
_SHARE_OF_PRODUCTS = 0.5
"""Of what matrix products alone reach, in training."""
_START_SECONDS = 3.0


def estimated_seconds(base: RunConfig, plan: Plan) -> float | None:
    """Of all runs one after the other on this machine's processor, right within a factor of a few; None for GPUs, which
    are not tried before there is a run."""
    if base.device == "cuda" or (base.device == "auto" and _NVIDIA.exists()):
        return None
    row = plan.baseline
    config = run_config(
        base, plan.protocol, plan.tokens, row, Cell(row.label, *centre(row.optimizer, base.optim), 0), ""
    )
    model, length = config.model, config.train.sequence_length
    flops = training_flops_per_token(matmul_parameters(config), model.n_layers, model.d_model, length)
    evaluations = plan.steps // config.monitor.evaluate_every + 1
    # An evaluation is a forward: a third of a step's work.
    tokens = plan.tokens + evaluations * config.monitor.evaluate_tokens / 3
    processes = config.train.nproc or 1
    a_run = _START_SECONDS + tokens * flops / (_SHARE_OF_PRODUCTS * processes * products_per_second())
    return a_run * (plan.search_cells + plan.final_cells)


def matmul_parameters(config: RunConfig) -> int:
    """Roughly: weights that multiply every token."""
    model = config.model
    width = model.d_model
    attention = 2 * width * width + 2 * width * width * model.kv_heads // model.n_heads
    mlp = (3 if model.mlp == "swiglu" else 2) * width * model.ff_width
    return model.n_layers * (attention + mlp) + width * (model.vocab_size or config.data.vocab_size)


def products_per_second() -> float:
    """FLOP/s of matrix products in fp32, here and now, with the threads that numpy takes."""
    left = np.ones((_SIDE, _SIDE), dtype=np.float32)
    best = 0.0
    for _ in range(_TRIALS):
        begin = time.perf_counter()
        left @ left
        best = max(best, 2 * _SIDE**3 / (time.perf_counter() - begin))
    return best

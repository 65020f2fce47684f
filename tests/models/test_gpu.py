"""One training step on a GPU is the step of the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.env import Ranks
from disttrain.distributed.mesh import build_mesh
from disttrain.distributed.process_group import distributed
from disttrain.engines import NativeEngine
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer
from disttrain.train.build import build_model
from disttrain.train.step import train_step

CONFIG = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, vocab_size=300, position="rope", norm="rmsnorm")
OPTIM = OptimConfig(lr=1e-3, clip_norm=0.5, eps=1e-3)
"""A large eps: AdamW's first step is otherwise the sign of the gradient, and rounding decides signs near zero."""
LENGTH = 32


def one_step(device: torch.device, parallel: ParallelConfig) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and the weights after a step in fp32."""
    with distributed(Ranks(), device, timeout_seconds=60):
        mesh = build_mesh(ParallelDims(1, 1), device.type)
        gpt, model = build_model(CONFIG, max_length=LENGTH, mesh=mesh, parallel=parallel, seed=0, device=device)
        optimizer = build_optimizer(gpt, OPTIM, GPT_PLAN)
        engine = NativeEngine(gpt, model, optimizer, parallel=parallel, device=device)
        tokens = torch.randint(300, (2, 4, LENGTH), generator=torch.Generator().manual_seed(0))
        result = train_step(engine, [(tokens[0], tokens[1])], lr_factor=1.0, device=device)
        weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in gpt.named_parameters()}
        cpu = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        return result.loss_sum.item() / result.valid_tokens, result.update.grad_norm.item(), cpu


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "ddp"},
        {"strategy": "zero1"},
        {"strategy": "zero2"},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "cpu_offload": True},
        {"strategy": "fsdp", "activation_checkpointing": "selective", "loss_chunk_tokens": 40},
        {"strategy": "fsdp", "compile": True},
    ],
    ids=str,
)
def test_a_step_on_cuda_is_the_step_on_the_cpu(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    loss, norm, weights = one_step(torch.device("cuda", 0), ParallelConfig(**settings))
    cpu_loss, cpu_norm, cpu_weights = one_step(torch.device("cpu"), ParallelConfig(strategy=settings["strategy"]))
    assert loss == pytest.approx(cpu_loss, rel=1e-4)
    assert norm == pytest.approx(cpu_norm, rel=1e-4)
    for name, expected in cpu_weights.items():
        # A bias starts at zero and has moved by the learning rate at most.
        size = max(expected.abs().max().item(), OPTIM.lr)
        assert (weights[name] - expected).abs().max() <= 1e-4 * size, name

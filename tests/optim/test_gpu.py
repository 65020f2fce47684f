"""What only a GPU can show: fused and foreach kernels, and a skip that the device decides on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from disttrain.config import OptimConfig
from disttrain.config.parallel import ParallelConfig
from disttrain.models import GPT_PLAN
from disttrain.optim import build_optimizer, matrix_optimizer
from disttrain.optim.stochastic_rounding import noise_key, round_to_bf16
from disttrain.testing.optimizer_parity import Toys, drawn_gradients, tensor_error
from tests.optim.resume_jobs import Run, cases, whole

pytestmark = pytest.mark.gpu
DDP: dict[str, Any] = {"strategy": "ddp"}


@pytest.mark.parametrize("name", cases())
def test_an_update_on_cuda_is_the_update_on_the_cpu(name: str) -> None:
    cpu = Run(1, DDP, cases()[name])
    cuda = Run(1, DDP, cases()[name])
    cuda.toys = Toys(1, torch.device("cuda"), ParallelConfig(**DDP))
    cuda.optimizer = build_optimizer(cuda.toys, cases()[name], GPT_PLAN, seed=5)
    for run in (cpu, cuda):
        run.train(range(5))
    for tensor, weight in whole(cpu.toys).items():
        assert tensor_error(tensor, whole(cuda.toys)[tensor].cpu(), weight) < 1e-11, tensor


@pytest.mark.parametrize("preset", ["adamw", "lion"])
def test_a_skipped_update_changes_nothing(preset: str) -> None:
    """Fused optimizers look at the flag on the device, the others ask for it."""
    toys = Toys(1, torch.device("cuda"), ParallelConfig(**DDP))
    before = whole(toys)
    optimizer = build_optimizer(toys, OptimConfig.model_validate({"preset": preset}), GPT_PLAN)
    for skip, same in ((1.0, True), (0.0, False)):
        toys.set_gradients(drawn_gradients(0))
        optimizer.step(skip=torch.tensor(skip, device="cuda"))
        assert torch.equal(whole(toys)["square"], before["square"]) is same


def test_rounding_draws_the_same_noise_on_every_device() -> None:
    source = torch.randn(1_000_003)
    key = noise_key(0, 1, "weight", "exp_avg")
    assert torch.equal(round_to_bf16(source.cuda(), key, 5).cpu(), round_to_bf16(source, key, 5))


def test_muon_computes_in_bf16_and_so_do_its_matrices_travel() -> None:
    """One process; what it computes is near what the CPU computes in fp64, and owners' state lies on the device."""
    weights = [nn.Parameter(torch.randn(96, 64, device=device)) for device in ("cuda", "cpu")]
    with torch.no_grad():
        weights[0].copy_(weights[1])
    optimizers = [matrix_optimizer("normuon", [("weight", weight)], lr=0.1) for weight in weights]
    for step in range(3):
        gradient = torch.randn(96, 64, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.to(weight.device)
            optimizer.step()
    assert optimizers[0].state[weights[0]]["row_mean_square"].is_cuda
    assert tensor_error("weight", weights[0].detach().cpu(), weights[1].detach()) < 0.02

"""AdamW in two groups: which parameter is where, and the numbers against torch and against the formulas."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from disttrain.config import ModelConfig, OptimConfig
from disttrain.models import GPT, GPT_PLAN, init_parameters
from disttrain.optim import OptimizerSet, build_optimizer, set_learning_rate
from disttrain.testing import RankPool
from tests.optim.jobs import step_gradient

CONFIG = ModelConfig(n_layers=2, d_model=10, n_heads=5, n_kv_heads=1, d_ff=13, vocab_size=53, qk_norm=True)
LR, BETAS, EPS, DECAY = 1e-2, (0.8, 0.9), 1e-6, 0.3
OPTIM = OptimConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
LENGTH = 5


def model() -> GPT:
    gpt = GPT(CONFIG, LENGTH).double()
    init_parameters(gpt, seed=0)
    return gpt


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def is_decayed(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name and not name.startswith(("wte", "wpe"))


def three_steps(gpt: GPT, optimizer: torch.optim.Optimizer | OptimizerSet) -> dict[str, Tensor]:
    for step in range(3):
        for name, parameter in gpt.named_parameters():
            parameter.grad = step_gradient(name, step, parameter.shape)
        optimizer.step()
    return weights(gpt)


def formulas(gpt: GPT) -> dict[str, Tensor]:
    """AdamW (arXiv 1711.05101), one tensor after the other."""
    (beta1, beta2), ends = BETAS, {}
    for name, weight in weights(gpt).items():
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        decays = is_decayed(name)
        for t in (1, 2, 3):
            gradient = step_gradient(name, t - 1, weight.shape)
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient * gradient
            step = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + EPS)
            weight = weight - LR * step - LR * DECAY * decays * weight
        ends[name] = weight
    return ends


def test_all_state_is_there_before_the_first_step() -> None:
    gpt = model()
    optimizer = build_optimizer(gpt, OPTIM, GPT_PLAN)
    lazy = torch.optim.AdamW(gpt.parameters(), fused=True)
    for parameter in gpt.parameters():
        assert {key: float(value.abs().sum()) for key, value in optimizer.state[parameter].items()} == {
            "step": 0.0,
            "exp_avg": 0.0,
            "exp_avg_sq": 0.0,
        }
        parameter.grad = torch.ones_like(parameter)
    lazy.step()
    for parameter in gpt.parameters():  # what torch would have made, in kind and order
        ours, theirs = optimizer.state[parameter], lazy.state[parameter]
        assert [(key, value.shape, value.dtype) for key, value in ours.items()] == [
            (key, value.shape, value.dtype) for key, value in theirs.items()
        ]


def test_three_steps_are_torchs_from_an_empty_state() -> None:
    ours = three_steps(gpt := model(), build_optimizer(gpt, OPTIM, GPT_PLAN))
    other = model()
    groups = [
        {"params": [p for n, p in other.named_parameters() if is_decayed(n) == decays], "weight_decay": DECAY * decays}
        for decays in (False, True)
    ]
    theirs = three_steps(other, torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_three_steps_are_those_of_the_formulas() -> None:
    gpt = model()
    expected = formulas(gpt)
    seen = three_steps(gpt, build_optimizer(gpt, OPTIM, GPT_PLAN))
    for name, weight in expected.items():
        assert (seen[name] - weight).abs().max() / weight.abs().max() < 1e-13, name


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_steps_are_those_of_one_process(pool: RankPool, world: int) -> None:
    gpt = model()
    expected = three_steps(gpt, build_optimizer(gpt, OPTIM, GPT_PLAN))
    for alike, seen in pool.run("tests.optim.jobs:sharded_optimizer", world, config=CONFIG, optim=OPTIM):
        assert alike
        for name, weight in expected.items():
            assert (seen[name] - weight).abs().max() / weight.abs().max() < 1e-14, name


def test_rates_are_computed_from_the_position() -> None:
    optimizer = build_optimizer(model(), OPTIM, GPT_PLAN)
    for factor in (0.5, 0.25, 1.0, 0.0):
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [factor * 1e-2] * 2


def test_it_goes_when_nobody_holds_it() -> None:
    gc.collect()
    gc.disable()
    try:
        inner = weakref.ref(build_optimizer(model(), OPTIM, GPT_PLAN).optimizers[0])
        assert inner() is None
    finally:
        gc.enable()

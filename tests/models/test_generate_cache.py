"""Generation with kept keys and values, of several prompts at once, against one prompt and whole windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from disttrain.models import GPT, generate_tokens
from disttrain.models.generate import sampling_probabilities
from disttrain.models.kv_cache import KVCache
from disttrain.testing import RankPool
from tests.models.generate_jobs import COUNT, CPU, MAX_LENGTH, PROMPTS, SHAPES, build, generate

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2, grouped": {"n_kv_heads": 2},
    "rope": {"position": "rope"},
    "qk_norm": {"qk_norm": True, "position": "rope"},
    "modern": {
        "position": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "n_kv_heads": 1,
        "qk_norm": True,
        "bias": False,
        "tie_embeddings": False,
    },
}
each_model = pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)


@torch.no_grad()
def plainly(model: GPT, prompt: list[int], seed: int, temperature: float) -> tuple[list[int], Tensor]:
    """One prompt, no cache: the tokens, and the logits [COUNT, vocab] behind them."""
    generator = torch.Generator().manual_seed(seed)
    tokens, seen = list(prompt), []
    for _ in range(COUNT):
        seen.append(model(torch.tensor([tokens[-MAX_LENGTH:]]))[0, -1])
        probabilities = sampling_probabilities(seen[-1], temperature, None, None)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokens[len(prompt) :], torch.stack(seen)


def watched(model: GPT) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """What will be filled with the shape of the tokens and the last logits of each forward."""
    shapes: list[tuple[int, ...]] = []
    logits: list[Tensor] = []

    def note(_: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        shapes.append(tuple(args[0].shape))
        logits.append(output[:, -1])

    model.register_forward_hook(note)
    return shapes, logits


@each_model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_each_prompt_what_it_gets_alone(settings: dict[str, Any], temperature: float) -> None:
    model = build(**settings)
    expected = [plainly(model, prompt, seed, temperature) for seed, prompt in enumerate(PROMPTS, 40)]
    shapes, logits = watched(model)
    assert generate(model, PROMPTS, 40, temperature) == [tokens for tokens, _ in expected]
    assert shapes == SHAPES
    difference = torch.stack(logits, 1) - torch.stack([reference for _, reference in expected])
    assert difference.abs().max() < 1e-12


@each_model
def test_a_prompt_alone_is_a_batch_of_one_with_its_seed(settings: dict[str, Any]) -> None:
    model = build(**settings)
    together = generate(model, PROMPTS, seed=7)
    assert together == [generate(model, [prompt], seed)[0] for seed, prompt in enumerate(PROMPTS, 7)]
    assert together != generate(model, PROMPTS, seed=8)


def test_positions_and_what_is_visible_behind_padding() -> None:
    """Also what the models above do not show on the CPU: padding sees itself, so that no softmax is over nothing."""
    cache = KVCache(torch.tensor([0, 2]))
    positions, visible = cache.append(3)
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert visible.int().tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]], [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]]
    positions, visible = cache.append(1)
    assert positions.tolist() == [[3], [1]]
    assert visible.int().tolist() == [[[[1, 1, 1, 1]]], [[[0, 0, 1, 1]]]]


def test_prompts_longer_than_the_model_sees() -> None:
    model = build(position="rope")
    prompts = [list(range(20)), [1, 2]]
    expected = [plainly(model, prompt, seed, 1.0)[0] for seed, prompt in enumerate(prompts)]
    shapes, _ = watched(model)
    assert generate(model, prompts) == expected
    assert shapes == [(2, MAX_LENGTH)] * COUNT


def test_the_context_matters_in_these_models() -> None:
    """Else the comparisons above would not see a wrong mask or a wrong position."""
    model = build()
    logits = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 0.1
    rolled = build(position="rope")(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[:, -1]
    assert (rolled[0] - rolled[1]).abs().max() > 0.1


def test_generation_compiles_nothing() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled for a shape of generation")

    expected = generate(build(), PROMPTS)
    model = build()
    for block in model.blocks:
        block.compile(backend=refuse, fullgraph=True)
    assert generate(model, PROMPTS) == expected


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_generate_what_one_process_does(pool: RankPool, strategy: str) -> None:
    expected = generate(build(position="rope"), PROMPTS)
    assert pool.run("tests.models.generate_jobs:generated_by_ranks", 2, strategy=strategy) == [expected] * 2


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_there_must_be_a_token_to_continue(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate_tokens(build(), prompts, 1, max_length=MAX_LENGTH, device=CPU)

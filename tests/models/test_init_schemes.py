"""Each initialisation scheme gives each kind of weight the spread of its formula, and a sane first loss."""

from __future__ import annotations

import math

import pytest
import torch

from disttrain.config import ModelConfig
from disttrain.models import GPT, init_parameters

SCHEMES = ("gpt2", "xavier", "t5", "small")
D, D_KV, D_FF, VOCAB, LAYERS = 128, 64, 320, 500, 3


def build(seed: int = 0, **settings: object) -> GPT:
    settings = {"n_layers": LAYERS, "d_model": D, "n_heads": 4, "vocab_size": VOCAB, **settings}
    model = GPT(ModelConfig.model_validate(settings), max_length=100)
    init_parameters(model, seed)
    return model


def deviations(q: float, kv: float, o: float, up: float, down: float, wte: float, head: float) -> dict[str, float]:
    layer = {"attention.wq": q, "attention.wk": kv, "attention.wv": kv, "attention.wo": o, "mlp.up": up, "mlp.gate": up}
    layer = {**layer, "mlp.down": down}
    blocks = {f"blocks.{i}.{name}.weight": std for i in range(LAYERS) for name, std in layer.items()}
    return {**blocks, "wte.weight": wte, "wpe.weight": wte, "head.weight": head}


SMALL = math.sqrt(2 / (5 * D))
EXPECTED = {
    "gpt2": deviations(0.03, 0.03, 0.03 / math.sqrt(6), 0.03, 0.03 / math.sqrt(6), 0.03, 0.03),
    "xavier": deviations(
        math.sqrt(2 / (D + D)),
        math.sqrt(2 / (D + D_KV)),
        math.sqrt(2 / (D + D)),
        math.sqrt(2 / (D + D_FF)),
        math.sqrt(2 / (D + D_FF)),
        0.03,
        math.sqrt(2 / (D + VOCAB)),
    ),
    "t5": deviations(D**-0.5, D**-0.5, D**-0.5, D**-0.5, D_FF**-0.5, 1.0, D**-0.5),
    "small": deviations(SMALL, SMALL, 2 / 3 / math.sqrt(D), SMALL, 2 / 3 / math.sqrt(D), SMALL, SMALL),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_matrix_has_the_spread_of_the_formula(scheme: str) -> None:
    model = build(init=scheme, init_std=0.03, n_kv_heads=2, d_ff=D_FF, mlp="swiglu", tie_embeddings=False)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert matrices.keys() == EXPECTED[scheme].keys()
    for name, weight in matrices.items():
        assert weight.std().item() == pytest.approx(EXPECTED[scheme][name], rel=0.05), name
        assert abs(weight.mean().item()) < 5 * EXPECTED[scheme][name] / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_are_zero_and_gains_one(scheme: str) -> None:
    vectors = {name: p for name, p in build(init=scheme, qk_norm=True).named_parameters() if p.ndim == 1}
    for name, vector in vectors.items():
        assert (vector == (0 if name.endswith(".bias") else 1)).all(), name


def test_a_tied_t5_embedding_carries_the_factor_of_the_logits() -> None:
    assert build(init="t5").wte.weight.std().item() == pytest.approx(D**-0.5, rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_loss_is_near_that_of_a_guess(scheme: str) -> None:
    tokens = torch.randint(VOCAB, (8, 100), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(VOCAB, (8, 100), generator=torch.Generator().manual_seed(2))
    loss = build(init=scheme, d_model=64)(tokens, labels).item() / tokens.numel()
    if scheme == "t5":
        # Its logits are normal with variance 1, and the log of the mean exp of those is 1/2.
        assert loss == pytest.approx(math.log(VOCAB) + 0.5, abs=0.15)
    else:
        assert loss == pytest.approx(math.log(VOCAB), rel=0.15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_depend_on_name_and_seed_alone(scheme: str) -> None:
    first = build(seed=1, init=scheme).state_dict()
    other = build(seed=2, init=scheme).state_dict()
    torch.manual_seed(5)
    again = build(seed=1, init=scheme).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim == 2)
    matrices = [value for value in first.values() if value.shape == (D, D)]
    assert len({value[0, 0].item() for value in matrices}) == len(matrices)


@pytest.mark.parametrize("scheme", ["xavier", "t5"])
def test_more_layers_leave_the_other_weights_as_they_are(scheme: str) -> None:
    shallow, deep = build(init=scheme, n_layers=1).state_dict(), build(init=scheme, n_layers=4).state_dict()
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())

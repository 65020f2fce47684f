"""The GPT against naive formulas, in fp64, for every combination of its choices."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from disttrain.config import ModelConfig
from disttrain.models import GPT, GPT_PLAN
from disttrain.models.attention import rotary_angles, rotate
from disttrain.models.sharding_plan import matches
from disttrain.testing.reference import reference_logits

LENGTH = 6
BOTH = (False, True)


def random_model(config: ModelConfig) -> GPT:
    """Every parameter random, norms and biases too: a term that is left out shows."""
    model = GPT(config, LENGTH).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return model


def some_tokens() -> Tensor:
    return torch.randint(11, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def small(**choices: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {"n_layers": 2, "d_model": 8, "n_heads": 4, "d_ff": 5, "vocab_size": 11} | choices
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_logits_are_those_of_the_formulas(position: str, norm: str, mlp: str, kv_heads: int) -> None:
    for qk_norm, bias, tie in itertools.product(BOTH, BOTH, BOTH):
        config = small(position=position, norm=norm, mlp=mlp, n_kv_heads=kv_heads)
        config = config.model_copy(update={"qk_norm": qk_norm, "bias": bias, "tie_embeddings": tie})
        model = random_model(config)
        with torch.no_grad():
            seen, expected = (
                model(some_tokens()),
                reference_logits(config, dict(model.named_parameters()), some_tokens()),
            )
        error = (seen - expected).abs().max() / expected.abs().max()
        assert error < 1e-12, (qk_norm, bias, tie)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_future_is_not_seen(position: str) -> None:
    model = random_model(small(position=position, n_kv_heads=2, qk_norm=True))
    tokens = some_tokens()
    before = model(tokens)
    for changed in range(LENGTH):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 11
        after = model(other)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert all((after[:, at] != before[:, at]).any() for at in range(changed, LENGTH))


def test_rope_sees_distances_only() -> None:
    """Moved by a thousand positions together, queries and keys give the same scores."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, LENGTH, 8, generator=generator, dtype=torch.float64)
    near = rotary_angles(torch.arange(LENGTH), 8, 10_000.0, like=q)
    far = rotary_angles(torch.arange(1_000, 1_000 + LENGTH), 8, 10_000.0, like=q)
    scores = [rotate(q, *angles)[0] @ rotate(k, *angles)[0].T for angles in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-12)
    assert not torch.allclose(scores[0], q @ k.T)


def test_labels_give_the_summed_loss() -> None:
    model = random_model(small())
    tokens = some_tokens()
    expected = -torch.log_softmax(model(tokens), -1).gather(-1, tokens[..., None]).sum()
    torch.testing.assert_close(model(tokens, tokens), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("tie", BOTH)
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_matmul_parameters_by_hand(mlp: str, tie: bool, position: str) -> None:
    config = small(mlp=mlp, tie_embeddings=tie, position=position, n_kv_heads=2, qk_norm=True)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    expected = 2 * (attention + (3 if mlp == "swiglu" else 2) * 8 * 5) + 8 * 11
    assert GPT(config, LENGTH).matmul_parameters == expected


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        GPT(small(vocab_size=None), LENGTH)


@pytest.mark.parametrize("bias", BOTH)
def test_the_plan_names_what_is_there(bias: bool) -> None:
    model = GPT(small(bias=bias, qk_norm=True, mlp="swiglu", tie_embeddings=False), LENGTH)
    names = [name for name, _ in model.named_parameters()]
    assert list(GPT_PLAN.units(model)) == list(model.blocks)
    residual = [name for name in names if matches(name, GPT_PLAN.residual_outputs)]
    assert residual == [f"blocks.{layer}.{part}.weight" for layer in (0, 1) for part in ("attention.wo", "mlp.down")]
    roles = {name: {role for role, pattern in GPT_PLAN.roles.items() if re.search(pattern, name)} for name in names}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    parts = {"attention_qk", "attention_vo", "mlp"}
    matrices = {name: roles[name] - {"matrices"} for name in names if "matrices" in roles[name]}
    assert matrices.keys() == linear - {"head.weight"}
    assert all(len(part & parts) == len(part) == 1 for part in matrices.values())
    assert matrices["blocks.1.attention.wk.weight"] == {"attention_qk"}
    assert matrices["blocks.1.attention.wo.weight"] == {"attention_vo"}
    assert matrices["blocks.1.mlp.gate.weight"] == {"mlp"}
    assert {name for name in names if roles[name] == {"head"}} == {"head.weight"}
    assert {name for name in names if roles[name] == {"embeddings"}} == {"wte.weight", "wpe.weight"}
    vectors = [roles[name] for name, parameter in model.named_parameters() if parameter.dim() == 1]
    assert all(held and held <= {"norms", "biases"} for held in vectors)

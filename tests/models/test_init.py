"""Initial weights: the same on every layout, of the right size, and a first loss of a model that knows nothing."""

import math

import pytest
import torch
from torch import Tensor

from disttrain.config import ModelConfig
from disttrain.models import GPT, cross_entropy_sum, generate_tokens, init_parameters
from disttrain.testing import RankPool
from tests.models.jobs import LENGTH

JOBS = "tests.models.jobs"
LAYOUTS = [("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("ddp", 2)]
# Five heads, one of them for keys and values: two rows for four ranks; 53 rows divide by no world.
TIED = ModelConfig(n_layers=2, d_model=10, n_heads=5, n_kv_heads=1, d_ff=41, vocab_size=53)
UNTIED = TIED.model_copy(update={"tie_embeddings": False, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu"})


def alone(config: ModelConfig) -> GPT:
    """The model of one process that knows nothing of groups."""
    model = GPT(config, LENGTH).double()
    init_parameters(model, seed=3)
    return model


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(("strategy", "world"), LAYOUTS)
def test_weights_do_not_depend_on_the_layout(pool: RankPool, strategy: str, world: int, config: ModelConfig) -> None:
    expected = weights(alone(config))
    results = pool.run(f"{JOBS}:initial_weights", world, strategy=strategy, config=config)
    for whole, _ in results:
        assert whole.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(whole[name], tensor)] == []
    if strategy == "fsdp":
        for name, tensor in expected.items():
            assert torch.equal(torch.cat([held[name] for _, held in results]), tensor), name


def test_ranks_do_not_draw_the_same_shard(pool: RankPool) -> None:
    """torch's own `nn.init` on a sharded CPU tensor gives every rank the same numbers."""
    (_, first), (_, second) = pool.run(f"{JOBS}:initial_weights", 2, strategy="fsdp", config=TIED)
    matrices = [name for name, tensor in first.items() if tensor.ndim == 2]
    assert len(matrices) == 14
    for name in matrices:
        rows = min(len(first[name]), len(second[name]))
        assert rows > 0
        assert not (first[name][:rows] == second[name][:rows]).any(), name


@pytest.mark.parametrize(("strategy", "world"), LAYOUTS)
def test_a_tied_head_stays_one_parameter(pool: RankPool, strategy: str, world: int) -> None:
    """Once `to_empty` had given embedding and head a storage each: two parameters drifted apart."""
    model = alone(TIED)
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 53
    model(tokens, tokens).backward()
    assert model.wte.weight.grad is not None
    for seen in pool.run(f"{JOBS}:tied_head", world, strategy=strategy, config=TIED):
        assert seen["same_at_first"]
        assert seen["same_at_last"]
        assert seen["names"] == ["wte.weight"]
        assert seen["matmul"] == model.matmul_parameters
        # The gradient of both uses; every rank has the same batch, and gradients are summed.
        torch.testing.assert_close(seen["gradient"], world * model.wte.weight.grad, rtol=1e-12, atol=1e-14)
        # With embedding and head at zero every logit is zero: the head sees what is written to the embedding.
        assert seen["largest_logit"] == 0.0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_sample_what_one_process_samples(pool: RankPool, strategy: str) -> None:
    expected = generate_tokens(alone(TIED), [[1, 2]], 9, max_length=LENGTH, device=torch.device("cpu"), seed=5)[0]
    assert pool.run(f"{JOBS}:sampled", 2, strategy=strategy, config=TIED, count=9) == [expected] * 2


def test_sizes_of_the_draws() -> None:
    config = ModelConfig(n_layers=3, d_model=96, n_heads=4, vocab_size=400, init_std=0.05)
    model = GPT(config, 128)
    init_parameters(model, seed=0)
    for name, weight in weights(model).items():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        residual = name.endswith(("attention.wo.weight", "mlp.down.weight"))
        std = 0.05 / math.sqrt(2 * 3) if residual else 0.05
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name


def test_each_name_and_each_seed_has_its_own_numbers() -> None:
    model = GPT(TIED, LENGTH)
    init_parameters(model, seed=0)
    one = {name: weight.clone() for name, weight in weights(model).items()}
    assert not (one["blocks.0.attention.wq.weight"] == one["blocks.1.attention.wq.weight"]).any()
    assert not (one["blocks.0.attention.wk.weight"] == one["blocks.0.attention.wv.weight"]).any()
    init_parameters(model, seed=1)
    assert not (one["wte.weight"] == model.wte.weight).any()
    init_parameters(model, seed=0)
    assert torch.equal(one["wte.weight"], model.wte.weight)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("norm", "mlp"), [("layernorm", "gelu"), ("rmsnorm", "swiglu")])
def test_the_first_loss_is_that_of_guessing(tie: bool, norm: str, mlp: str) -> None:
    config = ModelConfig.model_validate(
        {"n_layers": 2, "d_model": 64, "n_heads": 4, "vocab_size": 512, "norm": norm, "mlp": mlp, "tie_embeddings": tie}
    )
    model = GPT(config, 32)
    init_parameters(model, seed=0)
    tokens = torch.randint(512, (8, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:]).item() / tokens[:, 1:].numel()
    assert loss == pytest.approx(math.log(512), rel=0.05)

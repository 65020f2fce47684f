"""Initial weights that do not depend on how the model is sharded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from disttrain.config import ModelConfig
from disttrain.models.gpt import GPT
from disttrain.models.sharding_plan import GPT_PLAN, matches

EMBEDDINGS = ("wte.*", "wpe.*")


@torch.no_grad()
def init_parameters(model: GPT, seed: int) -> None:
    """Matrices and embeddings normal with the `initial_std` of the config's scheme, norm gains one, biases zero.

    Each parameter is drawn whole on the CPU in fp32 from a generator of its own name and `seed`; a rank keeps its
    slice and never holds more than one whole parameter. (`nn.init` on a sharded CPU DTensor would give every rank
    the same numbers.)
    """
    for name, parameter in model.named_parameters():
        _keep_slice(parameter, _draw(name, parameter.shape, model.config, seed))


def initial_std(name: str, shape: Sequence[int], config: ModelConfig) -> float:
    """Standard deviation of the weight `name` of `shape` [fan_out, fan_in] (embeddings: [rows, d_model])."""
    return _SCHEMES[config.init](name, shape, config)


def _gpt2(name: str, shape: Sequence[int], config: ModelConfig) -> float:
    """GPT-2: `init_std` everywhere, but residual outputs over sqrt(their number, 2 n_layers)."""
    return config.init_std / (math.sqrt(2 * config.n_layers) if matches(name, GPT_PLAN.residual_outputs) else 1)


def _xavier(name: str, shape: Sequence[int], config: ModelConfig) -> float:
    """Glorot and Bengio 2010: variance 2 / (fan_in + fan_out); 1 / fan_in, which often goes by this name, is LeCun's.

    Embeddings are look-ups without a fan and get `init_std`.
    """
    return config.init_std if matches(name, EMBEDDINGS) else math.sqrt(2 / sum(shape))


def _t5(name: str, shape: Sequence[int], config: ModelConfig) -> float:
    """T5 (arXiv 1910.10683, Mesh TensorFlow): variance 1 / fan_in; embeddings 1.

    T5 divides the query's std by sqrt(d_kv) because its attention has no such scale; ours has it. T5 multiplies the
    logits of a tied head by d_model^-1/2; ours has no such factor, so the tied embedding carries it.
    """
    lookup = matches(name, EMBEDDINGS) and not config.tie_embeddings
    return 1.0 if lookup else shape[1] ** -0.5


def _small(name: str, shape: Sequence[int], config: ModelConfig) -> float:
    """SmallInit (arXiv 1910.05895), sqrt(2 / (5 d_model)); residual outputs as in GPT-NeoX-20B (arXiv 2204.06745)."""
    if matches(name, GPT_PLAN.residual_outputs):
        return 2 / (config.n_layers * math.sqrt(config.d_model))
    return math.sqrt(2 / (5 * config.d_model))


_SCHEMES = {"gpt2": _gpt2, "xavier": _xavier, "t5": _t5, "small": _small}


def _draw(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    std = initial_std(name, shape, config)
    return torch.empty(shape).normal_(0.0, std, generator=parameter_generator(name, seed))


def parameter_generator(name: str, seed: int) -> torch.Generator:
    """The CPU generator that belongs to one parameter of one run."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def _keep_slice(parameter: Tensor, whole: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    region = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    parameter.to_local().copy_(whole[region])

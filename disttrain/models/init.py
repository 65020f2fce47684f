"""Initial weights that do not depend on how the model is sharded."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from disttrain.models.gpt import GPT
from disttrain.models.sharding_plan import GPT_PLAN, matches


@torch.no_grad()
def init_parameters(model: GPT, seed: int) -> None:
    """GPT-2's initialisation: normal(0, init_std), residual outputs over sqrt(2 n_layers), norms one, biases zero.

    Each parameter is drawn whole on the CPU in fp32 from a generator of its own name and `seed`; a rank keeps its
    slice and never holds more than one whole parameter. (`nn.init` on a sharded CPU DTensor would give every rank
    the same numbers.)
    """
    config = model.config
    for name, parameter in model.named_parameters():
        std = config.init_std
        if matches(name, GPT_PLAN.residual_outputs):
            std /= math.sqrt(2 * config.n_layers)
        _keep_slice(parameter, _draw(name, parameter, std, seed))


def _draw(name: str, parameter: Tensor, std: float, seed: int) -> Tensor:
    if parameter.ndim == 1:
        return torch.zeros(parameter.shape) if name.endswith(".bias") else torch.ones(parameter.shape)
    return torch.empty(parameter.shape).normal_(0.0, std, generator=parameter_generator(name, seed))


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

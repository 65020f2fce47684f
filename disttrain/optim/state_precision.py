"""Optimizer states in fewer bits between steps: bf16 with stochastic rounding, or eight bits in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from disttrain.errors import UserError
from disttrain.optim.sharding import first_element, like_sharded, local
from disttrain.optim.stochastic_rounding import noise_key, round_to_bf16

CHUNK_BYTES = 1 << 26
"""Of wide states that exist at a time."""
BLOCK = 256
SMALLEST = 4096
"""Smaller tensors are not worth eight bits, by the count of the whole tensor so that no layout decides."""
ROUNDING_STEP = "rounding_step"

State = dict[str, Tensor]


class LowPrecisionStates:
    """Wraps an optimizer whose state exists; the tensors under `keys` are wide only while they are updated.

    `inner` works on a few parameters at a time, so the wide states of all never exist together. `state` has the stored
    tensors, cut as the parameter is, and the count of steps that seeds the rounding. Raises UserError where the package
    that eight bits need is not installed.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        names: Mapping[nn.Parameter, str],
        keys: tuple[str, ...],
        dtype: Literal["bf16", "int8"],
        seed: int,
    ) -> None:
        self.inner = inner
        self.keys = keys
        self.codec: Codec = Bf16(names, seed) if dtype == "bf16" else Int8()
        self.state: dict[nn.Parameter, State] = {}
        for parameter, wide in ((p, inner.state[p]) for group in inner.param_groups for p in group["params"]):
            self.state[parameter] = {ROUNDING_STEP: torch.zeros(())} | dict(wide)
            self._store(parameter)
        inner.state.clear()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self) -> None:
        for group in self.inner.param_groups:
            for chunk in _chunks(group["params"]):
                with self._alone(group, chunk):
                    for parameter in chunk:
                        self.inner.state[parameter] = self._wide(parameter)
                    self.inner.step()
                for parameter in chunk:
                    self.state[parameter] |= self.inner.state.pop(parameter)
                    self.state[parameter][ROUNDING_STEP] += 1
                    self._store(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def _store(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        for key in self.keys:
            if self.codec.fits(parameter):
                state |= self.codec.encode(parameter, key, state.pop(key), int(state[ROUNDING_STEP]))

    def _wide(self, parameter: nn.Parameter) -> State:
        """What `inner` works on; the stored form gives way to it."""
        state = self.state[parameter]
        wide = {key: value for key, value in state.items() if key.split(".")[0] not in (*self.keys, ROUNDING_STEP)}
        for key in self.keys:
            wide[key] = self.codec.decode(parameter, key, state) if self.codec.fits(parameter) else state[key]
        return wide

    @contextmanager
    def _alone(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> Iterator[None]:
        """`inner` sees these parameters of this group only."""
        held = [(other, other["params"]) for other in self.inner.param_groups]
        try:
            for other, _ in held:
                other["params"] = parameters if other is group else []
            yield
        finally:
            for other, all_of_it in held:
                other["params"] = all_of_it


class Codec(Protocol):
    """How a state tensor is stored; every entry is cut along the parameter's rows."""

    def fits(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter's states are stored so, by its whole shape."""
        ...

    def encode(self, parameter: nn.Parameter, key: str, value: Tensor, step: int) -> State: ...

    def decode(self, parameter: nn.Parameter, key: str, state: State) -> Tensor:
        """The tensor in the parameter's type and layout."""
        ...


class Bf16:
    def __init__(self, names: Mapping[nn.Parameter, str], seed: int) -> None:
        self.names, self.seed = names, seed

    def fits(self, parameter: nn.Parameter) -> bool:
        return True

    def encode(self, parameter: nn.Parameter, key: str, value: Tensor, step: int) -> State:
        noise = noise_key(self.seed, step, self.names[parameter], key)
        rounded = round_to_bf16(local(value), noise, first_element(parameter))
        return {key: like_sharded(rounded, parameter, parameter.shape)}

    def decode(self, parameter: nn.Parameter, key: str, state: State) -> Tensor:
        return like_sharded(local(state[key]).to(parameter.dtype), parameter, parameter.shape)


class Int8:
    """torchao's dynamic maps over blocks of a row each, so that a cut along rows cuts no block (arXiv 2110.02861)."""

    def __init__(self) -> None:
        try:
            from torchao.optim import quant_utils
        except ImportError as error:
            raise UserError("optim: state_dtype = 'int8' needs torchao: pip install 'disttrain[lowbit]'") from error
        self.torchao = quant_utils
        self.maps = {signed: torch.tensor(quant_utils.create_dynamic_map(signed)) for signed in (True, False)}

    def fits(self, parameter: nn.Parameter) -> bool:
        return parameter.dim() > 1 and parameter.numel() >= SMALLEST

    def encode(self, parameter: nn.Parameter, key: str, value: Tensor, step: int) -> State:
        rows = local(value).float().flatten(1)
        blocks = -(-parameter.shape[1:].numel() // BLOCK)
        padded = torch.nn.functional.pad(rows, (0, blocks * BLOCK - parameter.shape[1:].numel()))
        if rows.shape[0]:
            scaled, scales = self.torchao.scale_tensor(padded, BLOCK)
            codes = self.torchao.quantize_8bit_with_qmap(scaled, self._map(key, rows))
        else:
            codes, scales = padded.to(torch.uint8), rows.new_zeros(0)
        codes = codes[:, : rows.shape[1]].reshape(local(value).shape)
        return {
            f"{key}.codes": like_sharded(codes.contiguous(), parameter, parameter.shape),
            f"{key}.scales": like_sharded(
                scales.reshape(-1, blocks), parameter, torch.Size((parameter.shape[0], blocks))
            ),
        }

    def decode(self, parameter: nn.Parameter, key: str, state: State) -> Tensor:
        codes, scales = local(state[f"{key}.codes"]), local(state[f"{key}.scales"])
        rows = codes.flatten(1)
        padded = torch.nn.functional.pad(rows, (0, scales.shape[1] * BLOCK - rows.shape[1]))
        if rows.shape[0]:
            padded = self.torchao.dequant_with_qmap(padded, self._map(key, scales), scales.reshape(-1))
        wide = padded[:, : rows.shape[1]].reshape(codes.shape).to(parameter.dtype)
        return like_sharded(wide.contiguous(), parameter, parameter.shape)

    def _map(self, key: str, device_of: Tensor) -> Tensor:
        """Second moments are never negative: their map has no use for a sign."""
        return self.maps["sq" not in key and "square" not in key].to(device_of.device)


def _chunks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters with gradients, as many at a time as have states of `CHUNK_BYTES` in fp32."""
    chunk: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        chunk.append(parameter)
        if sum(local(p).numel() * 8 for p in chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

"""What an owner does with a whole matrix, for each algorithm: a pure function, its settings, and the state it needs.

Anybody's function may be one: `update(matrix, state, **arguments) -> matrix`, named `package.module:name` in a config.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from disttrain.config.matrix_groups import SOAP, CustomMatrix, MatrixGroup, Muon, NorMuon, Shampoo
from disttrain.errors import UserError
from disttrain.optim.muon import State, muon_update, normuon_state, normuon_update
from disttrain.optim.newton_schulz import newton_schulz_flops, polynomials_of
from disttrain.optim.shampoo import shampoo_flops, shampoo_state, shampoo_update
from disttrain.optim.soap import soap_flops, soap_state, soap_update

STEP, MOMENTUM = "step", "momentum_buffer"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_TOYS = ((7, 3), (1, 4), (3, 8), (8, 8), (5, 1))


@dataclass(frozen=True)
class MatrixUpdate:
    """`function(matrix, state) -> direction`; `state[STEP]` counts from 1 and is not the function's to write."""

    function: Callable[[Tensor, State], Tensor]
    initial_state: Callable[[Tensor], State] = lambda matrix: {}
    """State tensors for a matrix, which may be on the meta device; they live with the owner only."""
    flops: Callable[[int, int], float] = lambda rows, columns: float(rows * columns * min(rows, columns))
    """Operations for a matrix of rows x columns: what owners are balanced by."""
    batched: bool = False
    """Whether the function takes stacks [N, A, B] of matrices, with stacked states, beside single ones."""
    wire_dtype: torch.dtype | None = None
    """In what matrices may travel without a bit of difference; None for the parameter's own."""

    def __call__(self, name: str, matrix: Tensor, state: Mapping[str, Tensor], step: Tensor) -> Tensor:
        """The direction, with `state` written in place; UserError for a function that breaks its promises."""
        working = {**state, STEP: step}
        try:
            direction = self.function(matrix, working)
        except Exception as error:
            where = "x".join(map(str, matrix.shape))
            raise UserError(f"{name}: its update raised {type(error).__name__} on {where}: {error}") from error
        if not isinstance(direction, Tensor) or direction.shape != matrix.shape:
            seen = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
            raise UserError(f"{name}: its update returned {seen} for a matrix of shape {tuple(matrix.shape)}")
        if unknown := working.keys() - state.keys() - {STEP}:
            raise UserError(
                f"{name}: its update made the state {', '.join(sorted(unknown))}, which initial_state did not: "
                "a checkpoint must know all state from the start"
            )
        for key, kept in state.items():
            if working[key].shape != kept.shape:
                made, was = tuple(working[key].shape), tuple(kept.shape)
                raise UserError(f"{name}: its update made the state {key} {made}, and initial_state {was}")
            if working[key] is not kept:
                kept.copy_(working[key])
        return direction


def matrix_update(config: MatrixGroup, parameter_dtype: torch.dtype, device: torch.device) -> MatrixUpdate:
    """The update of a group's section. Raises UserError for a function of the user's that cannot be had."""
    if isinstance(config, Muon):
        return _muon(config, _compute_dtype(config.compute_dtype, parameter_dtype, device))
    if isinstance(config, SOAP | Shampoo):
        settings: dict[str, Any] = {key: getattr(config, key) for key in ("betas", "eps", "every")}
    if isinstance(config, SOAP):
        return MatrixUpdate(partial(soap_update, **settings), partial(soap_state, max_dim=config.max_dim), soap_flops)
    if isinstance(config, Shampoo):
        function = partial(shampoo_update, ridge=config.ridge, **settings)
        return MatrixUpdate(function, partial(shampoo_state, max_dim=config.max_dim), shampoo_flops)
    assert isinstance(config, CustomMatrix)
    return _custom(config)


def _muon(config: Muon, dtype: torch.dtype) -> MatrixUpdate:
    polynomials = polynomials_of(config.coefficients)
    flops = partial(newton_schulz_flops, iterations=len(polynomials.steps))
    if isinstance(config, NorMuon):
        function = partial(
            normuon_update, polynomials=polynomials, dtype=dtype, beta2=config.beta2, row_eps=config.row_eps
        )
        return MatrixUpdate(function, normuon_state, flops, batched=True)
    # What is computed in bf16 loses nothing by travelling so: it would be rounded on arrival.
    wire = torch.bfloat16 if dtype == torch.bfloat16 else None
    function = partial(muon_update, polynomials=polynomials, dtype=dtype)
    return MatrixUpdate(function, flops=flops, batched=True, wire_dtype=wire)


def _compute_dtype(name: str, parameter_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if name in _DTYPES:
        return _DTYPES[name]
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16
    # The norm of a matrix in fp16 overflows.
    return torch.float32 if parameter_dtype == torch.float16 else parameter_dtype


def _custom(config: CustomMatrix) -> MatrixUpdate:
    found = _find(config.algorithm)
    try:
        update: Any = found() if inspect.isclass(found) else found
        takes = inspect.signature(update).parameters
    except Exception as error:
        raise UserError(
            f"{config.algorithm}: is neither a function of Python's nor a class without arguments that has "
            f"__call__(matrix, state): {type(error).__name__}: {error}"
        ) from error
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    if unknown := [] if anything else [name for name in config.arguments if name not in takes]:
        known = ", ".join(list(takes)[2:]) or "nothing besides the matrix and its state"
        raise UserError(f"{config.algorithm}: takes no {', '.join(unknown)}; it takes {known}")
    offered = {key: getattr(update, key) for key in ("initial_state", "flops", "batched") if hasattr(update, key)}
    made = MatrixUpdate(partial(update, **config.arguments), **offered)
    _self_test(config.algorithm, made)
    return made


def _find(algorithm: str) -> Any:
    path, _, name = algorithm.partition(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:
        hint = "; install it, or set PYTHONPATH to the folder that it is in" if isinstance(error, ImportError) else ""
        raise UserError(f"{algorithm}: cannot import {path}: {error}{hint}") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), n=1)
        raise UserError(f"{algorithm}: {path} has no {name}" + (f"; did you mean {path}:{near[0]}?" if near else ""))
    return getattr(module, name)


@torch.no_grad()
def _self_test(algorithm: str, update: MatrixUpdate) -> None:
    """Three steps on toy matrices, twice: what an owner does must depend on nothing but matrix and state."""
    generator = torch.Generator().manual_seed(0)
    for shape in _TOYS:
        gradients = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        size = f"{shape[0]}x{shape[1]}"
        try:
            if not 0 < update.flops(*shape) < math.inf:
                raise UserError(f"{algorithm}: flops{shape} is {update.flops(*shape)}; it must be positive")
            first, again = (_toy_run(algorithm, update, gradients) for _ in range(2))
            stacked = (
                _toy_run(algorithm, update, torch.stack([gradients] * 2, dim=1))[:, 1] if update.batched else first
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{algorithm}: {type(error).__name__} on a {size} matrix: {error}") from error
        if not torch.equal(first, again):
            raise UserError(f"{algorithm}: two runs on the same {size} matrices differ: it must be pure")
        if not torch.allclose(first, stacked, rtol=1e-9, atol=1e-12):
            raise UserError(
                f"{algorithm}: it says batched, and a stack of {size} matrices gives others than one by one"
            )


def _toy_run(algorithm: str, update: MatrixUpdate, gradients: Tensor) -> Tensor:
    """The directions for `gradients` [steps, A, B], or of stacks [steps, N, A, B]."""
    shape = gradients.shape[-2:]
    expected = update.initial_state(torch.empty(shape, device="meta"))
    state = update.initial_state(torch.zeros(shape, dtype=gradients.dtype))
    if taken := expected.keys() & {STEP, MOMENTUM}:
        raise UserError(f"{algorithm}: initial_state makes {', '.join(taken)}, which disttrain has: take another name")
    if shapes := [key for key in state if key not in expected or state[key].shape != expected[key].shape]:
        raise UserError(f"{algorithm}: initial_state gives other {', '.join(shapes)} for a meta tensor")
    if gradients.dim() == 4:
        state = {key: torch.stack([value] * gradients.shape[1]) for key, value in state.items()}
    steps = enumerate(gradients, start=1)
    return torch.stack([update(algorithm, g.clone(), state, torch.tensor(float(step))) for step, g in steps])

"""What the rank pool runs: `function(rank, world, **kwargs)` inside a gloo group."""

import errno
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from disttrain.checkpoint import tensor_file
from disttrain.checkpoint.agreement import all_gather_json, on_rank_zero
from disttrain.checkpoint.reading import open_checkpoint
from disttrain.checkpoint.state import model_state, training_state
from disttrain.errors import StorageError, UserError
from tests.checkpoint import toys


def save_step(
    rank: int, world: int, strategy: str, directory: Path, step: int, keep_last: int = 10
) -> dict[str, Tensor]:
    """Save a toy (seeded with `step`) and return the whole tensors that were saved."""
    state = training_state(*toys.build(strategy, seed=step))
    with toys.no_pickle():
        toys.save(directory, state, step, keep_last)
    return toys.full(state)


def load_latest(rank: int, world: int, strategy: str, directory: Path) -> tuple[dict[str, Tensor], int, list[str]]:
    """Load into a toy with other weights; returns the whole tensors, the step and what was passed over."""
    state = training_state(*toys.build(strategy, seed=1234))
    checkpoints = toys.manager(directory)
    with toys.no_pickle():
        info = checkpoints.latest()
        assert info is not None
        checkpoints.load(state, info)
    return toys.full(state), info.manifest.step, list(info.rejected)


def weights_only(rank: int, world: int, strategy: str, directory: Path) -> dict[str, Tensor]:
    model, _ = toys.build(strategy, seed=1234)
    reader, info = open_checkpoint(directory)
    reader.load_weights(model, info)
    return toys.full(model_state(model))


def save_with_full_disk(rank: int, world: int, directory: Path, broken_rank: int, step: int) -> list[str]:
    """Save while one rank's disk is full; returns what each rank was told."""
    state = training_state(*toys.build("fsdp", seed=step))
    full_disk = OSError(errno.ENOSPC, "No space left on device")
    effect = {"side_effect": full_disk} if rank == broken_rank else {"wraps": tensor_file._write_blocks}
    with patch.object(tensor_file, "_write_blocks", **effect):
        try:
            toys.save(directory, state, step)
        except UserError as error:
            return list(error.problems)
    return []


def load_mismatched(rank: int, world: int, directory: Path) -> tuple[list[str], bool]:
    """Ask for another set of tensors; returns the problems and whether the state kept every bit."""
    state = training_state(*toys.build("fsdp", seed=77))
    state["model.extra"] = torch.ones(3)
    del state["model.up.bias"]
    before = toys.full(state)
    checkpoints = toys.manager(directory)
    info = checkpoints.latest()
    assert info is not None
    try:
        checkpoints.load(state, info)
    except UserError as error:
        after = toys.full(state)
        return list(error.problems), all(torch.equal(before[name], after[name]) for name in before)
    raise AssertionError("loaded")


def agree(rank: int, world: int) -> tuple[list, str, list[str]]:
    """Exchange values of different length, and let rank 0 fail in the two ways it can."""
    gathered = all_gather_json({"rank": rank, "text": "é" * rank})
    assert on_rank_zero(lambda: [1, None, "x"]) == [1, None, "x"]

    def denied() -> None:
        raise StorageError("/somewhere: Permission denied")

    def defect() -> None:
        raise KeyError("bug")

    try:
        on_rank_zero(denied)
    except UserError as error:
        problem = str(error)
    kinds = []
    try:
        on_rank_zero(defect)
    except Exception as error:
        kinds.append(type(error).__name__)
    return gathered, problem, kinds

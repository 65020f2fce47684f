"""The stream of samples, a pure function of (seed, position), and the microbatches each rank takes from it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from disttrain.config.layout import microbatch_sizes
from disttrain.data.permutation import derive_key, permute
from disttrain.data.token_shards import ShardSet
from disttrain.errors import UserError

IGNORE_LABEL = -100
"""The label of a position that counts for nothing, in the loss and in its mean."""


@dataclass(frozen=True)
class Microbatch:
    """`tokens` and `labels`, both int64 [rows, sequence_length]; labels[:, i] follows tokens[:, i]."""

    tokens: np.ndarray
    labels: np.ndarray


class SampleOrder:
    """The endless stream of training samples: sample p is the same whoever asks, and whatever was asked before.

    A sample is a window of sequence_length + 1 tokens at a multiple of sequence_length in its shard.
    Every epoch takes each window once: shard after shard, the shards and the windows of each in an
    order that the epoch draws anew. A shard that no asked-for position needs is never opened.
    """

    def __init__(self, shards: ShardSet, sequence_length: int, seed: int) -> None:
        self._shards = shards
        self._sequence_length = sequence_length
        self._seed = seed
        self._windows: dict[int, int] = {}
        self._epoch_samples: int | None = None
        self._enter(0)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, window) of the sample at `position`.

        Raises `UserError` when the whole set has no window.
        """
        if self._epoch_samples is None and not self._reach(0, position):
            # Now the first epoch is counted to its end, and every other one is as long.
            self._epoch_samples = self._starts[-1]
            if self._epoch_samples == 0:
                raise UserError(too_short("training set", self._shards, self._sequence_length))
        epoch, rest = divmod(position, self._epoch_samples) if self._epoch_samples else (0, position)
        self._reach(epoch, rest)
        visit = bisect_right(self._starts, rest) - 1
        shard = int(self._visits[visit])
        key = derive_key("windows", self._seed, epoch, shard)
        return shard, permute(rest - self._starts[visit], self._windows[shard], key)

    def window(self, position: int) -> np.ndarray:
        """The tokens of the sample at `position`, int64 [sequence_length + 1]."""
        shard, window = self.locate(position)
        return _window(self._shards.tokens(shard), window, self._sequence_length)

    def _enter(self, epoch: int) -> None:
        """Begin the list of the first samples of the shards of an epoch, in the order it visits them."""
        count = len(self._shards)
        self._epoch = epoch
        self._visits = permute(np.arange(count), count, derive_key("shards", self._seed, epoch))
        self._starts = [0]

    def _reach(self, epoch: int, rest: int) -> bool:
        """Extend the list until it covers sample `rest` of the epoch; False if the epoch ends before."""
        if epoch != self._epoch:
            self._enter(epoch)
        while self._starts[-1] <= rest and len(self._starts) <= len(self._visits):
            shard = int(self._visits[len(self._starts) - 1])
            if shard not in self._windows:
                self._windows[shard] = _window_count(self._shards.tokens(shard), self._sequence_length)
            self._starts.append(self._starts[-1] + self._windows[shard])
        return self._starts[-1] > rest


class BatchLoader:
    """One rank's rows of every global batch; the batch is the same for any world and any accumulation."""

    def __init__(self, order: SampleOrder, microbatch_samples: int, rank: int, world: int) -> None:
        self._order, self._most, self._rank, self._world = order, microbatch_samples, rank, world

    def microbatches(self, position: int, samples: int) -> list[Microbatch]:
        """This rank's microbatches of the global batch of `samples` that begins at `position` of the whole run.

        Raises `UserError` when the batch does not divide over the ranks.
        """
        own, rest = divmod(samples, self._world)
        if rest or not own:
            nearest = max(self._world, round(samples / self._world) * self._world)
            raise UserError(
                f"global batch of {samples} samples: {self._world} ranks cannot share it; nearest: {nearest}"
            )
        first = position + self._rank * own
        rows = np.stack([self._order.window(first + i) for i in range(own)])
        sizes = microbatch_sizes(own, self._most)
        return [_microbatch(part) for part in np.split(rows, np.cumsum(sizes)[:-1])]


def validation_batches(
    shards: ShardSet, sequence_length: int, max_tokens: int, rank: int, world: int, rows: int
) -> Iterator[Microbatch]:
    """The first max_tokens // sequence_length windows (at least one) in stored order, dealt to the ranks.

    Every rank gets as many batches, all [rows, sequence_length]; rows that are missing at the end are
    there with labels of `IGNORE_LABEL`. Raises `UserError` when the whole set has no window.
    """
    if not has_window(shards, sequence_length):
        raise UserError(too_short("validation set", shards, sequence_length))
    windows = islice(_stored_windows(shards, sequence_length), max(1, max_tokens // sequence_length))
    while batch := list(islice(windows, world * rows)):
        mine = batch[rank * rows : (rank + 1) * rows]
        padded = np.zeros((rows, sequence_length + 1), dtype=np.int64)
        for i, (shard, window) in enumerate(mine):
            padded[i] = _window(shards.tokens(shard), window, sequence_length)
        microbatch = _microbatch(padded)
        microbatch.labels[len(mine) :] = IGNORE_LABEL
        yield microbatch


def has_window(shards: ShardSet, sequence_length: int) -> bool:
    """Whether some shard holds sequence_length + 1 tokens; opens no shard after the first that does."""
    return next(_stored_windows(shards, sequence_length), None) is not None


def too_short(name: str, shards: ShardSet, sequence_length: int) -> str:
    """The problem with a set that has no window, in words and numbers; opens every shard."""
    sizes = [shards.tokens(i).size for i in range(len(shards))]
    return (
        f"{name}: {sum(sizes)} tokens in {len(sizes)} shards, the longest {max(sizes, default=0)}, but one sample "
        f"needs sequence_length {sequence_length} + 1 = {sequence_length + 1} tokens of one shard; "
        "shorten the sequence or give more data"
    )


def _stored_windows(shards: ShardSet, sequence_length: int) -> Iterator[tuple[int, int]]:
    for shard in range(len(shards)):
        for window in range(_window_count(shards.tokens(shard), sequence_length)):
            yield shard, window


def _window_count(tokens: np.ndarray, sequence_length: int) -> int:
    # One token more than the windows hold: the last label has to come from somewhere.
    return max(0, tokens.size - 1) // sequence_length


def _window(tokens: np.ndarray, window: int, sequence_length: int) -> np.ndarray:
    first = window * sequence_length
    return np.array(tokens[first : first + sequence_length + 1], dtype=np.int64)


def _microbatch(rows: np.ndarray) -> Microbatch:
    return Microbatch(tokens=rows[:, :-1].copy(), labels=rows[:, 1:].copy())

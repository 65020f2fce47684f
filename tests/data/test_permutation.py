from __future__ import annotations

import numpy as np
import pytest

from disttrain.data.permutation import derive_key, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 65, 1000, 4096, 12289])
def test_is_a_bijection(n: int) -> None:
    image = permute(np.arange(n), n, key=3)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


@pytest.mark.parametrize("n", [2**50, 2**50 - 1, 10**12, 2**33 + 1])
def test_huge_ranges_have_no_collisions(n: int) -> None:
    index = np.concatenate([np.arange(20_000), np.arange(n - 20_000, n)])
    image = permute(index, n, key=derive_key("huge", 1))
    assert np.unique(image).size == index.size
    assert image.min() >= 0
    assert image.max() < n
    # 40 000 uniform draws: both halves of the range are met about as often.
    assert abs(np.mean(image < n // 2) - 0.5) < 0.02


@pytest.mark.parametrize("n", [1, 6, 1000, 2**50 - 3])
def test_ints_and_arrays_agree(n: int) -> None:
    index = [i for i in (0, 1, 5, n // 2, n - 1) if i < n]
    for dtype in (np.int64, np.uint64):
        image = permute(np.array(index, dtype=dtype), n, key=2**64 - 1)
        assert image.dtype == dtype
        assert image.tolist() == [permute(i, n, key=2**64 - 1) for i in index]
    square = np.arange(4).reshape(2, 2)
    assert permute(square, 4, 1).shape == (2, 2)


def test_keys_give_different_orders() -> None:
    index = np.arange(1000)
    images = [permute(index, 1000, derive_key("epoch", 0, epoch)) for epoch in range(4)]
    for i, one in enumerate(images):
        assert np.mean(one == index) < 0.02
        assert all(np.mean(one == other) < 0.02 for other in images[:i])


def test_small_ranges_are_drawn_evenly() -> None:
    firsts = [permute(0, 5, derive_key(key)) for key in range(2000)]
    assert np.bincount(firsts, minlength=5).min() > 320


def test_the_order_never_changes() -> None:
    assert permute(np.arange(8), 8, derive_key("golden", 7)).tolist() == GOLDEN


def test_keys_tell_parts_apart() -> None:
    keys = {derive_key(1, 2), derive_key(12), derive_key("1", 2), derive_key("1", "2"), derive_key(2, 1)}
    assert len(keys) == 5
    assert all(0 <= key < 2**64 for key in keys)


GOLDEN = [5, 6, 4, 3, 0, 1, 7, 2]

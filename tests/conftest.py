"""Fixtures that every test may use."""

from collections.abc import Iterator

import pytest

from disttrain.testing import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Rank processes that live as long as the test session; they start when the first job needs them."""
    with RankPool() as pool:
        yield pool

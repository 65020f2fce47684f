"""Which ranks talk to each other in which round, so that every link is measured and no two share a rank."""

from __future__ import annotations

from collections.abc import Sequence

MOST_ROUNDS = 16

Round = list[tuple[int, int]]


def tournament(ranks: Sequence[int], most: int = MOST_ROUNDS) -> list[Round]:
    """Rounds of disjoint pairs: each rank meets each other one once (the circle method), as far as `most` rounds go."""
    seats: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    rounds = []
    for _ in range(min(len(seats) - 1, most)):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return [pairs for pairs in rounds if pairs]


def link_rounds(world: int, local_world: int) -> list[Round]:
    """First inside all nodes at once, then between the first ranks of the nodes."""
    nodes = [range(first, min(first + local_world, world)) for first in range(0, world, local_world)]
    inside = [tournament(node) for node in nodes]
    longest = max(len(rounds) for rounds in inside)
    together = [[pair for rounds in inside if turn < len(rounds) for pair in rounds[turn]] for turn in range(longest)]
    return [*together, *tournament([node[0] for node in nodes])]

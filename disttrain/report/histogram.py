"""The step times of a whole run, added up from the histograms of its log rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disttrain.report.curves import Floats
from disttrain.report.run_record import RunRecord
from disttrain.report.table import LARGEST

COMMON_BINS = 60


@dataclass(frozen=True)
class StepTimes:
    """`counts[i]` steps took between `edges[i]` and `edges[i + 1]` seconds; empty bins at both ends are cut off."""

    edges: Floats
    counts: Floats

    def quantile(self, share: float) -> float:
        """The upper edge of the bin that holds it, in seconds."""
        reached = np.searchsorted(np.cumsum(self.counts), share * self.counts.sum() - 1e-9)
        return float(self.edges[min(int(reached) + 1, len(self.edges) - 1)])


def step_times(run: RunRecord) -> StepTimes | None:
    """All histograms of a run as one.

    Rows may show different parts of one set of edges. Where they do not fit into one set (a run that went on with
    another version), their counts go into common bins by the middles of their own.
    """
    found: dict[tuple[float, ...], Floats] = {}
    for row in run.log.rows:
        if (histogram := _checked(row.get("step_seconds_histogram"))) is not None:
            edges, counts = histogram
            key = tuple(edges)
            found[key] = found[key] + counts if key in found else counts
    if not found:
        return None
    parts = [(np.array(key), counts) for key, counts in found.items()]
    return _united(parts) or _rebinned(parts)


def _united(parts: Sequence[tuple[Floats, Floats]]) -> StepTimes | None:
    """Exact counts, if no edge of one part lies inside a bin of another."""
    edges = np.unique(np.concatenate([own for own, _ in parts]))
    counts = np.zeros(len(edges) - 1)
    for own, of_own in parts:
        places = np.searchsorted(edges, own)
        if (np.diff(places) != 1).any():
            return None
        counts[places[:-1]] += of_own
    return _cut(edges, counts)


def _checked(histogram: object) -> tuple[Floats, Floats] | None:
    """Edges that rise and one count between two of them; None for anything else."""
    if not isinstance(histogram, dict):
        return None
    try:
        edges = np.array(histogram.get("edges"), dtype=float)
        counts = np.array(histogram.get("counts"), dtype=float)
    except (TypeError, ValueError):
        return None
    if edges.ndim != 1 or counts.ndim != 1 or len(edges) != len(counts) + 1 or not counts.any():
        return None
    sound = (np.abs(edges) < LARGEST).all() and (np.diff(edges) > 0).all()
    return (edges, counts) if sound and (counts >= 0).all() and (counts < LARGEST).all() else None


def _rebinned(parts: Sequence[tuple[Floats, Floats]]) -> StepTimes:
    cut = [_cut(edges, counts) for edges, counts in parts]
    low, high = min(part.edges[0] for part in cut), max(part.edges[-1] for part in cut)
    positive = max(low, high * 1e-6)
    edges = np.geomspace(positive, high, COMMON_BINS + 1)
    middles = np.concatenate([(part.edges[:-1] + part.edges[1:]) / 2 for part in cut])
    counts, _ = np.histogram(np.clip(middles, positive, high), edges, weights=np.concatenate([p.counts for p in cut]))
    return _cut(edges, counts.astype(float))


def _cut(edges: Floats, counts: Floats) -> StepTimes:
    filled = np.flatnonzero(counts)
    first, last = filled[0], filled[-1]
    return StepTimes(edges[first : last + 2], counts[first : last + 1])

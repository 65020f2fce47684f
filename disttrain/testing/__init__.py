"""Tools for testing distributed code on one machine, without ports and without pytest.

`RankPool` runs a function on several ranks in a few hundredths of a second; `JobError` names the ranks that failed.
"""

from disttrain.testing.pool import JobError, RankPool

__all__ = ["JobError", "RankPool"]

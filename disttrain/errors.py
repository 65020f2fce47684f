"""Errors that are written for people, and the exit codes that scripts rely on."""

from __future__ import annotations

from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_GIVE_UP = 70
"""Of a rank, to the parent that started it: starting again would come to the same end. The command says 1."""
EXIT_PREEMPTED = 75
"""Stopped on request with a committed checkpoint: start me again (EX_TEMPFAIL of sysexits.h)."""


class UserError(Exception):
    """Bad input: each problem is one line with the place, what is wrong, the arithmetic and the remedy.

    The commands print the problems without a traceback and leave with `exit_code`.
    """

    exit_code = EXIT_BAD_INPUT
    start_again = False
    """Whether a run that ended so may come to another end by itself when it is started again."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class NumericalError(UserError):
    """Numbers that are none: the training went wrong, not the input."""

    exit_code = EXIT_FAILED


class StorageError(UserError):
    """A disk that refuses: nothing is wrong with the input, and trying again later may help."""

    exit_code = EXIT_FAILED


class CorruptionError(UserError):
    """Memory that no longer holds what was written to it: the last checkpoint is as good as it was."""

    exit_code = EXIT_FAILED
    start_again = True


class LaunchError(UserError):
    """A peer that does not come or cannot be reached: the cluster's doing, and trying again later may help."""

    exit_code = EXIT_FAILED
    start_again = True

"""Which checkpoints may go: only ever older than a newer one that is whole."""

from __future__ import annotations

from disttrain.checkpoint.storage import Storage
from disttrain.errors import UserError


class Retention:
    """Keeps the newest `keep_last` whole checkpoints, those of every `keep_every` steps, and what `protect` names.

    Torn or damaged ones never count. A look at sizes is enough here: what is kept too long does no harm.
    """

    def __init__(self, storage: Storage, keep_last: int, keep_every: int | None) -> None:
        if keep_last < 1:
            raise UserError(f"checkpoint.keep_last: {keep_last} would delete every checkpoint; use 1 or more")
        self.storage = storage
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.protected: str | None = None
        """The checkpoint that was last verified byte by byte, which is never deleted."""

    def delete_old(self, newest: str) -> list[str]:
        """Delete what lies before `newest` and need not stay; later ones, passed over once, stay. Rank 0 only.

        Returns lines about what could not be deleted.
        """
        problems: list[str] = []
        kept = 1
        for name in self.storage.committed():
            if name >= newest:
                continue
            whole = self._whole(name)
            if whole and kept < self.keep_last:
                kept += 1
            elif name != self.protected and not (whole and self._rounds(name)) and kept >= self.keep_last:
                try:
                    self.storage.remove(name)
                except UserError as error:
                    problems += [f"an old checkpoint stays: {problem}" for problem in error.problems]
        return problems

    def _whole(self, name: str) -> bool:
        try:
            return not self.storage.missing(name, self.storage.read_manifest(name))
        except UserError:
            return False

    def _rounds(self, name: str) -> bool:
        return self.keep_every is not None and int(name.removeprefix("step-")) % self.keep_every == 0

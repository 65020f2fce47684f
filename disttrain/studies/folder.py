"""The folder of a comparison: its plan, its runs, and what came of it.

plan.json    result.json    table.md    compare.svg    compare.html
cells/NAME/  an ordinary run folder     cells/NAME.log     cells/NAME.claim
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.errors import UserError
from disttrain.studies.plan import FORMAT, Cell, Plan, growth_problems, plan_from


@dataclass(frozen=True)
class ComparisonFolder:
    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    def cell(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.name

    def log(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.log"

    def claim(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.claim"

    def check(self, plan: Plan) -> None:
        """UserError when the folder holds another comparison, or something else."""
        if not self.plan.exists():
            strangers = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
            if strangers:
                raise UserError(f"{self.path}: holds {sorted(strangers)[0]} and no plan.json; choose another --folder")
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: is a file; choose another --folder")
            return
        before = self._stored_plan()
        if not (self.path / "cells").exists():
            return  # what --plan-only has left; nothing was trained by it
        if problems := growth_problems(before, plan):
            remedy = f"{self.path} holds another comparison: undo the change, or choose another --folder"
            raise UserError([*problems, remedy])

    def write_plan(self, plan: Plan, command: str, estimated_seconds: float | None) -> None:
        more = {"command": command, "estimated_seconds": estimated_seconds}
        self.write("plan.json", json.dumps(plan.stored() | more, indent=1) + "\n")

    def write(self, name: str, content: str) -> None:
        """Beside it, then renamed. UserError when that is not possible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            whole = self.path / f"{name}.{socket.gethostname()}-{os.getpid()}.tmp"
            whole.write_text(content, encoding="utf-8")
            whole.replace(self.path / name)
        except OSError as error:
            raise UserError(
                f"{self.path / name}: cannot be written: {error.strerror}; choose another --folder"
            ) from None

    def _stored_plan(self) -> Plan:
        try:
            stored: dict[str, Any] = json.loads(self.plan.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise UserError(f"{self.plan}: format {stored['format']}, this version reads {FORMAT}")
            return plan_from(stored)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.plan}: is no plan of a comparison; choose another --folder") from None

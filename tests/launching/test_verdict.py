"""The end of the Slurm scripts: status.json decides, if this start has written it; only a time limit means requeue."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching.rendered import ROOT, SCRIPTS

FAR, NEAR, NO_LIMIT = 100_000, 100, 0


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.endswith(".sbatch")])
@pytest.mark.parametrize(
    ("state", "code", "left", "exit_code", "requeued"),
    [
        ("completed", 0, NEAR, 0, False),
        ("completed", 143, FAR, 0, False),  # torchrun's code hides that of its ranks
        ("preempted", 75, NEAR, 0, True),
        ("preempted", 1, NEAR, 0, True),
        ("preempted", 75, FAR, 0, False),  # somebody stopped it
        ("preempted", 75, NO_LIMIT, 0, False),  # and again
        ("failed", 1, FAR, 1, False),
        ("running", 0, NEAR, 1, False),  # ended without a word
        ("running", 137, FAR, 137, False),
        ("old preempted", 1, NEAR, 1, False),  # of the start before: this one has not come so far
        ("old completed", 0, FAR, 0, False),  # nothing to do
        ("", 2, FAR, 2, False),
    ],
)
def test_verdict(script: str, state: str, code: int, left: int, exit_code: int, requeued: bool, tmp_path: Path) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "called"}\n')
    fake.chmod(0o755)
    status, began = tmp_path / "status.json", tmp_path / "began"
    began.touch()
    if state:
        status.write_text(json.dumps({"state": state.removeprefix("old "), "step": 7}, indent=2) + "\n")
        shift = -10 if state.startswith("old ") else 10
        os.utime(status, (time.time() + shift,) * 2)
    text = (ROOT / "launch" / script).read_text()
    verdict = text[text.index("# status.json decides") :]
    setting = f"set -euo pipefail\nrun_dir={tmp_path} began={began} code={code}\n"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "9", "SLURM_JOB_END_TIME": str(int(time.time()) + left)}
    if left == NO_LIMIT:
        del env["SLURM_JOB_END_TIME"]
    ended = subprocess.run(["bash", "-c", setting + verdict], env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (exit_code, "")
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert called == ("requeue 9\n" if requeued else "")

"""The GPUs of a machine, as nvidia-smi tells of them in XML: a field that a driver does not know is just not there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

from disttrain.distributed.env import visible_gpus
from disttrain.doctor.facts import Gpu, Gpus

SMI_SECONDS = 20.0
"""A driver in trouble lets nvidia-smi wait for ever."""

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SLOW = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


def gather_gpus(command: str = "nvidia-smi") -> Gpus:
    """Absence is a fact like any other."""
    seen = visible_gpus()
    if shutil.which(command) is None:
        return Gpus(seen=seen)
    try:
        done = subprocess.run(
            [command, "-q", "-x"], capture_output=True, text=True, timeout=SMI_SECONDS, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        return Gpus(seen=seen, error=f"no answer within {SMI_SECONDS:g} s" if late else str(error))
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        return Gpus(seen=seen, error=said[-1][:200] if said else f"exit code {done.returncode}")
    return parse_smi(done.stdout).model_copy(update={"seen": seen})


def parse_smi(text: str) -> Gpus:
    """The output of `nvidia-smi -q -x`; `error` says where it is none."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        return Gpus(error=f"its output is damaged: {error}")
    return Gpus(
        driver=_text(root, "driver_version"),
        driver_cuda=_text(root, "cuda_version"),
        cards=tuple(_card(card) for card in root.findall("gpu")),
    )


def _card(card: ElementTree.Element) -> Gpu:
    ecc = _text(card, "ecc_mode/current_ecc")
    volatile = card.find("ecc_errors/volatile")
    counts = [] if volatile is None else [entry.text or "" for entry in volatile.iter() if "uncorrect" in entry.tag]
    # Before Ampere errors are counted one level deeper, by kind of bit and place, with a total.
    double = [_text(card, "ecc_errors/volatile/double_bit/total") or ""]
    numbers = [int(count) for count in (*counts, *double) if count.isdecimal()]
    pending = (
        "remapped_rows/remapped_row_pending",
        "retired_pages/pending_retirement",
        "retired_pages/pending_blacklist",
    )
    return Gpu(
        name=_text(card, "product_name") or "",
        uuid=_text(card, "uuid") or "",
        memory_bytes=_memory(_text(card, "fb_memory_usage/total")),
        memory_used_bytes=_memory(_text(card, "fb_memory_usage/used")),
        ecc={"Enabled": True, "Disabled": False}.get(ecc or ""),
        uncorrected_errors=sum(numbers) if numbers else None,
        repair_pending=any(_text(card, path) == "Yes" for path in pending),
        repair_failed=_text(card, "remapped_rows/remapped_row_failure") == "Yes",
        slowed_by=tuple(name.replace("_", " ") for name in _SLOW if _slowed(card, name)),
    )


def _slowed(card: ElementTree.Element, name: str) -> bool:
    """Drivers before 535 call the reasons throttle reasons."""
    kinds = ("clocks_event_reason", "clocks_throttle_reason")
    return any(_text(card, f"{kind}s/{kind}_{name}") == "Active" for kind in kinds)


def _text(element: ElementTree.Element, path: str) -> str | None:
    """None for N/A too."""
    text = (element.findtext(path) or "").strip()
    return None if text in ("", "N/A", "[N/A]") else text


def _memory(text: str | None) -> int | None:
    number, _, unit = (text or "").partition(" ")
    return int(number) * _UNITS[unit] if number.isdecimal() and unit in _UNITS else None


def infiniband(root: Path = Path("/")) -> tuple[str, ...]:
    folder = root / "sys/class/infiniband"
    return tuple(sorted(device.name for device in folder.iterdir())) if folder.is_dir() else ()

"""Which versions of everything a node has. Torch tells its own without being imported, which would take seconds."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import platform
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from disttrain import __version__

PACKAGE = Path(__file__).parents[1]


def gather_versions() -> dict[str, str]:
    """By name; what is not installed is left out."""
    found = {"python": platform.python_version(), "disttrain": __version__, "disttrain code": _code(PACKAGE)}
    if (torch := torch_versions()) is not None:
        found |= torch
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"] or ""
        if name in ("numpy", "safetensors"):
            found[name] = package.version
        elif name.startswith("nvidia-nccl-cu"):
            found["NCCL"] = package.version
    return found


def torch_versions(folder: Path | None = None) -> dict[str, str] | None:
    """From the file that torch's build writes; None where there is no torch. `folder` is for tests."""
    if folder is None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent
    values: dict[str, object] = {}
    with suppress(OSError, SyntaxError, ValueError):
        for node in ast.parse((folder / "version.py").read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                values[target.id] = value.value
    names = {"torch": "__version__", "CUDA": "cuda"}
    return {name: str(values[key]) for name, key in names.items() if values.get(key)}


def _code(folder: Path) -> str:
    """Eight digits that differ where the package's files do: a checkout changes without its version."""
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()

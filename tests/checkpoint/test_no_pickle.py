"""No file can run code: the package has no way to unpickle one."""

import ast
from pathlib import Path

import disttrain

PACKAGE = Path(disttrain.__file__).parent
# The test pool hands jobs to its own child processes through pipes; it reads no file.
EXEMPT = PACKAGE / "testing"
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


def _violations(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            modules = [f"{node.value.id}.{node.attr}"]
        bad = [m for m in modules if m in ("torch.load", "torch.save")]
        if not path.is_relative_to(EXEMPT):
            bad += [m for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
        found += [f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in bad]
    return found


def test_the_package_never_pickles_a_file():
    assert [line for path in sorted(PACKAGE.rglob("*.py")) for line in _violations(path)] == []


def test_the_check_finds_what_it_looks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    source = tmp_path / "bad.py"
    source.write_text("import torch, pickle\nfrom torch import save\nfrom pickle import loads\ntorch.load('x')\n")
    assert len(_violations(source)) >= 4

"""The floors of the house, read from the syntax tree: who may import whom, and what must stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "disttrain"

FLOORS = (
    ("schedule", "flops", "errors"),
    ("config",),
    ("models", "data", "distributed"),
    ("parallel", "optim", "monitor"),
    ("checkpoint",),
    ("engines", "resilience", "planner"),
    ("train",),
    ("launching", "doctor", "studies", "report", "testing"),
    ("cli",),
    ("__main__",),  # on top of the commands, which it starts
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

READS_ENVIRONMENT = (
    "distributed.env",
    "distributed.process_group",
    "distributed.arrival",
    "launching.elastic",
    "launching.node",
    "cli.train",
    "testing.",
)
TORCH_FREE = (
    *(f"disttrain.{room}" for room in (*FLOORS[0], *FLOORS[1])),
    "disttrain.data.source",
    "disttrain.train.preflight",
    "disttrain.checkpoint.manifest",
    "disttrain.checkpoint.verification",
    "disttrain.checkpoint.placement",
    "disttrain.checkpoint.untrusted",
    "disttrain.distributed.env",
    "disttrain.distributed.network",
    "disttrain.report",
    "disttrain.launching.node",
    "disttrain.launching.files",
    "disttrain.launching.parent",
    "disttrain.cli.app",
)
IMPORTED_IN_THE_CHILD = {("disttrain.testing.process", "disttrain.testing.worker")}
"""The entry point of a new process: its parent must not import it."""
LONGEST_FILE = 260
LONGEST_FUNCTION = 60

Trees = dict[str, ast.Module]


def package_trees() -> Trees:
    """The syntax tree of every module of the package, by dotted name; `x.__init__` for packages."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert len(files) > 40
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text()) for file in files}


def trees(sources: dict[str, str]) -> Trees:
    """Fake modules: `trees({"config.load": "import x"})` is disttrain.config.load."""
    return {f"{PACKAGE}.{name}": ast.parse(source) for name, source in sources.items()}


def room(module: str) -> str:
    """`disttrain.config.load` is in the room `config`; the package's own __init__ has none."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything of ours that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = module.split(".")[: -node.level]
                source = ".".join([*base, source] if source else base)
            if source.split(".")[0] == PACKAGE:
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def floor_problems(modules: Trees) -> list[str]:
    problems = []
    for module, tree in modules.items():
        own = room(module)
        if own and own not in FLOOR:
            problems.append(f"{module}: no floor has a room {own}")
            continue
        for line, name in imports(module, tree):
            other = room(name)
            if other in ("", "__version__", own):
                continue
            if other not in FLOOR:
                problems.append(f"{module}:{line} imports {name}: no floor has a room {other}")
            elif FLOOR[other] >= FLOOR.get(own, -1):
                problems.append(f"{module}:{line} imports {name}: F{FLOOR[other]} from F{FLOOR.get(own, -1)}")
    return problems


def edges(modules: Trees) -> dict[str, set[str]]:
    """Which module imports which; a name that is no module stands for the module that holds it."""
    known = {module.removesuffix(".__init__"): module for module in modules}
    graph: dict[str, set[str]] = {}
    for module, tree in modules.items():
        names = [name for _, name in imports(module, tree)]
        found = {known.get(name) or known.get(name.rpartition(".")[0]) for name in names}
        graph[module] = {t for t in found if t and t != module and (module, t) not in IMPORTED_IN_THE_CHILD}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module not in done:
            for following in sorted(graph.get(module, ())):
                if ring := visit(following, [*way, module]):
                    return ring
            done.add(module)
        return []

    return next((ring for module in graph if (ring := visit(module, []))), [])


def init_problems(modules: Trees) -> list[str]:
    """`__init__.py` files hold a docstring, imports, `__all__` and `__version__`."""
    problems = []
    for module, tree in modules.items():
        if not module.endswith(".__init__"):
            continue
        if ast.get_docstring(tree) is None:
            problems.append(f"{module}: no docstring")
        for node in tree.body[1:]:
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")
            if not named and not isinstance(node, ast.Import | ast.ImportFrom):
                problems.append(f"{module}:{node.lineno}: {type(node).__name__}")
    return problems


def environment_problems(modules: Trees) -> list[str]:
    problems = []
    for module, tree in modules.items():
        if module.removeprefix(f"{PACKAGE}.").startswith(READS_ENVIRONMENT):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                names = [alias.name for alias in node.names]
            else:
                continue
            if not {"environ", "getenv", "putenv"}.isdisjoint(names):
                problems.append(f"{module}:{node.lineno} uses the environment")
    return problems


def function_problems(modules: Trees) -> list[str]:
    return [
        f"{module}:{node.lineno} {node.name} has {length} lines"
        for module, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]


def test_modules_import_from_lower_floors_only() -> None:
    assert floor_problems(package_trees()) == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("config.load", "from disttrain.models import GPT", "F2 from F1"),
        ("config.load", "import disttrain.train.loop", "F6 from F1"),
        ("config.load", "from ..train import loop", "F6 from F1"),
        ("models.gpt", "def f():\n    from disttrain.data.loader import BatchLoader", "F2 from F2"),
        ("errors", "from disttrain import flops", "F0 from F0"),
        ("__init__", "from disttrain.errors import UserError", "F0 from F-1"),
        ("helpers.text", "", "no floor has a room helpers"),
        ("train.loop", "from disttrain.helpers import x", "no floor has a room helpers"),
    ],
)
def test_the_floor_check_can_fail(module: str, source: str, problem: str) -> None:
    problems = floor_problems(trees({module: source}))
    assert len(problems) == 1
    assert problem in problems[0]


def test_what_the_floor_check_allows() -> None:
    fine = "from disttrain import __version__\nfrom disttrain.config.run import RunConfig\nfrom . import build"
    assert floor_problems(trees({"train.loop": fine})) == []


def test_no_module_imports_itself_in_a_ring() -> None:
    graph = edges(package_trees())
    assert sum(len(targets) for targets in graph.values()) > 100
    assert cycle(graph) == []


def test_the_ring_check_can_fail() -> None:
    ring = trees(
        {
            "models.__init__": "from disttrain.models.gpt import GPT",
            "models.gpt": "from disttrain.models.loss import f",
            "models.loss": "from disttrain.models import GPT",
        }
    )
    assert cycle(edges(ring)) == ["disttrain.models.__init__", "disttrain.models.gpt", "disttrain.models.loss"]


def test_init_files_only_re_export() -> None:
    assert init_problems(package_trees()) == []


def test_the_init_check_can_fail() -> None:
    assert init_problems(trees({"models.__init__": "'''Models.'''\nREGISTRY = {}"})) == [
        "disttrain.models.__init__:2: Assign"
    ]
    assert init_problems(trees({"models.__init__": "from disttrain.models.gpt import GPT"})) != []


def test_the_environment_is_read_in_few_places() -> None:
    assert environment_problems(package_trees()) == []


@pytest.mark.parametrize(
    "source", ["import os\nx = os.environ['A']", "from os import environ", "import os\nos.getenv('A')"]
)
def test_the_environment_check_can_fail(source: str) -> None:
    assert len(environment_problems(trees({"train.loop": source}))) == 1
    assert environment_problems(trees({"distributed.env": source})) == []


def test_files_and_functions_are_short() -> None:
    lengths = {str(file): len(file.read_text().splitlines()) for file in (ROOT / PACKAGE).rglob("*.py")}
    assert {file: length for file, length in lengths.items() if length > LONGEST_FILE} == {}
    assert function_problems(package_trees()) == []
    long_one = "def f():\n" + "    pass\n" * LONGEST_FUNCTION
    assert function_problems(trees({"train.loop": long_one})) == ["disttrain.train.loop:1 f has 61 lines"]


def test_no_file_is_called_utils_and_no_path_of_somebody_is_inside() -> None:
    files = list((ROOT / PACKAGE).rglob("*.py"))
    assert [file for file in files if file.stem in ("utils", "util", "helpers", "misc", "common")] == []
    assert [file for file in files if any(home in file.read_text() for home in ("/home/", "/root/", "/Users/"))] == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_brings_in_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout == "False\n"

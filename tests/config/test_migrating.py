"""docs/migrating.md: its keys exist, on our side and on theirs, and its example is what the command prints."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from disttrain.config import RunConfig
from disttrain.config.deepspeed_keys import NO_COUNTERPART
from disttrain.config.from_deepspeed import from_deepspeed
from disttrain.config.load import valid_keys

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
SECTIONS = [*RunConfig.model_fields]
KEYS = set(valid_keys(optional=True))


def part(title: str) -> str:
    """From one heading to the next."""
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line for line in part(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def keys_in(text: str) -> list[str]:
    """What is in backquotes and looks like a key."""
    return [code for code in re.findall(r"`([^`]*)`", text) if re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", code)]


def ours() -> list[str]:
    return [key for key in keys_in(PAGE) if "." in key and key.split(".")[0] in SECTIONS]


def test_every_key_of_ours_is_in_the_schema() -> None:
    sections_too = {key.rpartition(".")[0] for key in KEYS}
    assert len(set(ours())) > 35
    assert set(ours()) - KEYS - sections_too == set()


@pytest.mark.parametrize("title", ["DeepSpeed's JSON", "Accelerate's YAML", "A torchrun script"])
def test_the_second_column_holds_keys_of_ours(title: str) -> None:
    table = rows(title)
    assert len(table) > 15
    named = {key for _, second, *_ in table for key in keys_in(second)} - {"true", "false"}
    assert named - KEYS == set()


def test_deepspeeds_keys_are_those_that_the_command_knows(tmp_path: Path) -> None:
    """Given with a value that nothing takes, each is dealt with by name, and none is called unknown."""
    named = {key for first, *_ in rows("DeepSpeed's JSON") for key in keys_in(first)}
    for key in sorted(key for key in named if not key.startswith(("optimizer.", "scheduler."))):
        nested: object = None
        for name in reversed(key.split(".")):
            nested = {name: nested}
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(nested))
        inside = any(known.startswith(f"{key}.") for known in NO_COUNTERPART)  # a section
        assert inside or "has no such key" not in from_deepspeed(file, {}), key


def test_accelerates_keys_are_real() -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    launch = pytest.importorskip("accelerate.commands.launch")
    dataclasses = pytest.importorskip("accelerate.utils.dataclasses")
    classes = (config_args.ClusterConfig, dataclasses.DataLoaderConfiguration, dataclasses.ProjectConfiguration)
    real = {field for kind in classes for field in kind.__dataclass_fields__}
    real |= {action.dest for action in launch.launch_command_parser()._actions}
    real |= {"step_scheduler_with_optimizer", "log_with"}  # arguments of Accelerator itself
    named = {key for first, *_ in rows("Accelerate's YAML") for key in keys_in(first)}
    assert len(named) > 30
    assert named - real == set()


def test_the_example_is_what_the_command_makes(tmp_path: Path) -> None:
    theirs, mine = (re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)[0] for kind in ("json", "toml"))
    file = tmp_path / "ds_config.json"
    file.write_text(theirs)
    text = from_deepspeed(file, {"train.sequence_length": 2048, "train.steps": 20000}, world=16)
    assert tomllib.loads(text) == tomllib.loads(mine)

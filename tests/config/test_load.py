"""Reading configs: every problem at once, in words that name the place and the way out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from disttrain.config import RunConfig, load_config
from disttrain.config.load import _OTHER_NAMES, flat_items, valid_keys
from disttrain.errors import UserError

ROOT = Path(__file__).parents[2]
GOOD = "[train]\nsteps = 1\n"


def write(folder: Path, text: str, name: str = "a.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str, **numbers: int) -> list[str]:
    """What a load is refused for, the folder's name left out."""
    with pytest.raises(UserError) as refused:
        load_config(path, list(overrides), **numbers)
    return [problem.replace(f"{path.parent}/", "") for problem in refused.value.problems]


def test_every_problem_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
[train]
sequence_length = 100
steps = 5
[optim]
learning_rate = 1e-3
lr = nan
eps = -inf
weight_decay = -0.1
betas = [0.9, 1.0]
[modle]
n_layers = 2
[model]
n_layer = 2
d_ff = "wide"
[checkpoint]
every = true
"""
    assert set(problems(write(tmp_path, text), "data.vocab_size=12", nproc=3)) == {
        "a.toml:5: optim.learning_rate: unknown key; nearest valid key: optim.lr",
        "a.toml:6: optim.lr: must be a finite number (got nan)",
        "a.toml:7: optim.eps: must be a finite number (got -inf)",
        "a.toml:8: optim.weight_decay: must be greater than or equal to 0 (got -0.1)",
        "a.toml:9: optim.betas.1: must be less than 1 (got 1.0)",
        "a.toml:11: modle: unknown key; nearest valid key: model",
        "a.toml:13: model.n_layer: unknown key; nearest valid key: model.n_layers",
        "a.toml:14: model.d_ff: must be a valid integer (got 'wide')",
        "a.toml:16: checkpoint.every: must be a valid integer (got True)",
        "override 'data.vocab_size=12': data.vocab_size: must be greater than or equal to 257 (got 12)",
        "a.toml:2: train: global_batch_tokens = 4096 is not a multiple of sequence_length = 100; nearest: 4000 or 4100",
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=0", "train.steps: must be greater than 0 (got 0)"),
        ("train.steps=2.0", "train.steps: must be a valid integer (got 2.0)"),
        ('train.steps="2"', "train.steps: must be a valid integer (got '2')"),
        ("train.seed=-1", "train.seed: must be greater than or equal to 0 (got -1)"),
        ("optim.lr=true", "optim.lr: must be a valid number (got True)"),
        ("optim.lr=inf", "optim.lr: must be a finite number (got inf)"),
        ("monitor.bigram_baseline=1", "monitor.bigram_baseline: must be a valid boolean (got 1)"),
        (
            "parallel.strategy=zero9",
            "parallel.strategy: must be 'ddp', 'zero1', 'zero2', 'fsdp' or 'hsdp'",
        ),
        ("optim.betas=[0.9]", "optim.betas: must be two numbers, or three where the algorithm has as many; not 1"),
        ("train.tokens=4", "train: set exactly one of steps and tokens: how long the run is"),
        ("model.d_model=100", "d_model = 100 does not split into n_heads = 6 equal heads; nearest: d_model = 102"),
        ("model.n_kv_heads=4", "n_heads = 6 is not a multiple of n_kv_heads = 4"),
        ("model=3", "model: a section, written as a [model] table (got 3)"),
        ("run=3", "run: a section, written as a [run] table (got 3)"),
        ("device=tpu", "device: must be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
    ],
)
def test_wrong_values(tmp_path: Path, override: str, said: str) -> None:
    (problem,) = problems(write(tmp_path, GOOD), override)
    assert said in problem
    assert problem.startswith((f"override {override!r}: ", "a.toml:2: train: set exactly"))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trian", "train"),
        ("train.step", "train.steps"),
        ("optim.block_size", "train.sequence_length"),
        ("model.lr", "optim.lr"),
        ("parallell.strategy", "parallel"),
    ],
)
def test_the_nearest_valid_key(tmp_path: Path, key: str, nearest: str) -> None:
    (problem,) = problems(write(tmp_path, GOOD), f"{key}=1")
    assert problem.endswith(
        f"{key.partition('.')[0] if nearest == 'parallel' else key}: unknown key; nearest valid key: {nearest}"
    )


def test_names_of_other_frameworks_lead_to_keys_that_exist() -> None:
    assert set(_OTHER_NAMES.values()) <= set(valid_keys())


def test_a_missing_section_is_said(tmp_path: Path) -> None:
    assert problems(write(tmp_path, "")) == ["train: missing; set it in the file or as an override"]


def test_extends_in_order_with_the_place_of_each_value(tmp_path: Path) -> None:
    write(tmp_path, "[train]\nsteps = 1\nseed = 1\n[optim]\nlr = 0.1\neps = 0.5", "base.toml")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", 'extends = "../base.toml"\n[train]\nseed = 2\n[optim]\neps = 0.25', "middle.toml")
    top = write(tmp_path, 'extends = "sub/middle.toml"\n[optim]\nlr = 0.2\n')
    loaded = load_config(top, ["optim.weight_decay=0.0"], nproc=2)
    config, origins = loaded.config, {k: v.replace(f"{tmp_path}/", "") for k, v in loaded.origins.items()}
    assert (config.train.steps, config.train.seed, config.optim.lr, config.optim.eps) == (1, 2, 0.2, 0.25)
    assert origins == {
        "train.steps": "sub/../base.toml:2",
        "train.seed": "sub/middle.toml:3",
        "optim.eps": "sub/middle.toml:5",
        "optim.lr": "a.toml:3",
        "optim.weight_decay": "override 'optim.weight_decay=0.0'",
        "train.nproc": "--nproc",
        "run.name": "the config file's name",
    }
    assert config.run.name == "a"


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ('"a.toml"', "leads back to a file that extends this one"),
        ('"b.toml"', "leads back to a file that extends this one"),
        ('"none.toml"', "none.toml: no such file; here are "),
        ("3", "extends = 3 must be the path of one TOML file"),
        ("false", "extends = False must be the path of one TOML file"),
        ('""', "a folder without config.json"),
    ],
)
def test_extends_that_leads_nowhere(tmp_path: Path, extends: str, said: str) -> None:
    write(tmp_path, 'extends = "./a.toml"\n', "b.toml")
    (problem,) = problems(write(tmp_path, f"extends = {extends}\n{GOOD}"))
    assert said in problem


@pytest.mark.parametrize("text", ["[train\nsteps = 1", "[train]\nsteps = 1\nsteps = 2", "\x00"])
def test_text_that_is_no_toml(tmp_path: Path, text: str) -> None:
    (problem,) = problems(write(tmp_path, text))
    assert problem.startswith("a.toml: not valid TOML: ")


def test_a_missing_file_names_those_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert problems(tmp_path / "b.toml") == ["b.toml: no such file; here are a.toml"]


def test_overrides_may_leave_out_quotes_and_may_be_lists(tmp_path: Path) -> None:
    words = ["run.name=my-run", "data.path=some/file.txt", "optim.betas=[0.8, 0.9]", "train.steps = 7", "optim.lr=1"]
    config = load_config(write(tmp_path, GOOD), [*words, 'run.dir="a=b"']).config
    assert (config.run.name, config.data.path, config.run.dir) == ("my-run", "some/file.txt", "a=b")
    assert (config.optim.betas, config.train.steps, config.optim.lr) == ((0.8, 0.9), 7, 1.0)
    assert isinstance(config.optim.lr, float)


@pytest.mark.parametrize("override", ["train.steps", "=3", ".=3", "train..steps=3", "--nproc", ""])
def test_overrides_of_another_form(tmp_path: Path, override: str) -> None:
    assert problems(write(tmp_path, GOOD), override) == [
        f"override {override!r}: write it as key.path=value, for example train.steps=100"
    ]


def test_an_override_through_a_value(tmp_path: Path) -> None:
    assert problems(write(tmp_path, GOOD), "train.steps.more=3") == [
        "override 'train.steps.more=3': train.steps is a value, so train.steps.more cannot be set in it"
    ]


@pytest.mark.parametrize("nproc", [0, -2])
def test_no_processes(tmp_path: Path, nproc: int) -> None:
    assert problems(write(tmp_path, GOOD), nproc=nproc) == [
        f"--nproc: train.nproc: must be greater than 0 (got {nproc})"
    ]


def test_the_mesh_is_not_judged_by_a_broken_section(tmp_path: Path) -> None:
    text = GOOD + "microbatch_size = 0\n[parallel]\nstrategy = 'ddp'\ndp_shard = 2\n"
    found = problems(write(tmp_path, text), world=2)
    assert "train.microbatch_size: must be greater than 0" in found[0]
    assert "ddp does not shard" in found[1]
    (only,) = problems(write(tmp_path, text.replace("'ddp'", "'dpp'").replace("= 0", "= 1")), world=2)
    assert "parallel.strategy" in only


def test_a_run_folder_loads_to_the_config_that_it_was_written_from(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    words = [f"run.dir={folder}", "run.name=other", "optim.betas=[0.8, 0.9]", "model.n_kv_heads=2", "optim.lr=1e-5"]
    config = load_config(write(tmp_path, GOOD), words).config.with_vocab_size(300)
    write(folder, json.dumps(config.model_dump(mode="json")), "config.json")
    loaded = load_config(folder, [])
    assert loaded.config == config
    assert loaded.config.model.vocab_size == 300
    assert loaded.origins["optim.lr"] == str(folder / "config.json")
    assert load_config(folder, ["train.steps=9"]).config.train.steps == 9


def test_a_moved_run_folder_is_the_run_folder(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["run.dir=gone"]).config
    write(tmp_path, json.dumps(config.model_dump(mode="json")), "config.json")
    assert load_config(tmp_path, []).config.run_dir == tmp_path


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_a_broken_run_folder(tmp_path: Path, text: str) -> None:
    write(tmp_path, text, "config.json")
    (problem,) = problems(tmp_path)
    assert "config.json: " in problem


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path)
    assert problem.endswith("a folder without config.json; name a .toml file or a run folder")


def test_configs_are_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), []).config
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.device = "cpu"
    sized = config.with_vocab_size(300)
    assert (config.model.vocab_size, sized.model.vocab_size) == (None, 300)


def test_the_length_of_a_run_in_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, "[train]\ntokens = 10_000\nglobal_batch_tokens = 4096\n")
    assert load_config(path, []).config.train.total_steps == 3
    assert load_config(path, ["train.tokens=8192"]).config.train.total_steps == 2


def test_flat_items_and_valid_keys_agree(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), []).config
    assert list(flat_items(config)) == valid_keys()
    assert flat_items(config)["train.steps"] == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_load(path: Path) -> None:
    config = load_config(path, []).config
    assert isinstance(config, RunConfig)
    assert config.run.name == path.stem


def test_loading_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    code = (
        "import sys, pathlib; from disttrain.config import load_config; "
        f"print(load_config(pathlib.Path({str(path)!r}), [], nproc=2).config.train.nproc, 'torch' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout == "2 False\n"

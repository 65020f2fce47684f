"""One test per past bug, named after its cause."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from disttrain.config import ModelConfig, OptimConfig
from disttrain.config.parallel import ParallelConfig
from disttrain.data.corpus import file_corpus, read_texts
from disttrain.data.token_shards import bin_shard_sets
from disttrain.models import GPT, GPT_PLAN
from disttrain.models.generate import sampling_probabilities
from disttrain.optim import build_optimizer
from disttrain.optim.loss_scale import INITIAL_SCALE, LossScale
from disttrain.parallel.ddp import summing_hook
from disttrain.testing import RankPool

TINY = ModelConfig(n_layers=1, d_model=8, n_heads=2, vocab_size=11)


def test_fused_sgd_does_not_know_dtensors() -> None:
    """`torch.optim.SGD(fused=True)` raises on sharded parameters, at the first step only."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    model = torch.nn.Module()
    model.register_parameter("weight", parameter)
    for preset in ("sgd", "momentum", "nesterov"):
        optimizer = build_optimizer(model, OptimConfig.model_validate({"preset": preset}), GPT_PLAN)
        assert [inner.defaults["fused"] for inner in optimizer.optimizers] in ([None], [False])


def test_to_empty_gives_a_tied_head_storage_of_its_own() -> None:
    """A DDP run trained embedding and head apart: its first loss differed from FSDP's in the fifth digit."""
    with torch.device("meta"):
        model = GPT(TINY, max_length=4)
    model.to_empty(device="cpu")
    assert model.head.weight is not model.wte.weight, "torch keeps ties now: GPT.tie_weights can go"
    model.tie_weights()
    assert model.head.weight is model.wte.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_postponed_annotations_hide_the_types_that_ddp_checks_on_its_hook() -> None:
    annotations = [parameter.annotation for parameter in inspect.signature(summing_hook(None)).parameters.values()]
    assert not any(isinstance(annotation, str) for annotation in annotations)


def test_a_loss_scale_that_passed_through_a_run_without_one_begins_anew() -> None:
    """fp16, then fp32, then fp16 again trained at scale 1; a real scale of 1 jumped to 65536."""

    def carried(source: LossScale, enabled: bool) -> LossScale:
        target = LossScale(enabled, torch.device("cpu"))
        for name, tensor in target.state().items():
            tensor.copy_(source.state()[name])
        target.loaded()
        return target

    fp16 = LossScale(True, torch.device("cpu"))
    fp16.scale.fill_(1.0)
    assert carried(fp16, True).scale == 1.0
    fp32 = carried(fp16, False)
    assert fp32.scale == 1.0
    assert carried(fp32, True).scale == INITIAL_SCALE


def test_a_graph_with_the_hooks_of_checkpointing_in_it_does_not_compile(pool: RankPool) -> None:
    settings = {"strategy": "fsdp", "compile": True, "activation_checkpointing": "full"}
    job = "tests.parallel.memory_jobs:train"
    seen = pool.run(job, 2, timeout_seconds=200, settings=settings, steps=1)[0]
    plain = pool.run(job, 2, settings={"strategy": "fsdp"}, steps=1)[0]
    assert seen["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    with pytest.raises(ValidationError, match="selective"):
        ParallelConfig(compile=True, activation_checkpointing="selective")


def test_a_file_of_one_long_line_has_no_line_end_to_cut_at(tmp_path: Path) -> None:
    text = "größer als gedacht " * 20_000
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    corpus = file_corpus(tmp_path / "one.txt", 0.1)
    pieces = sorted((*corpus.train, *corpus.validation), key=lambda piece: piece.start)
    assert len(corpus.validation) > 0
    assert "".join("".join(read_texts(piece)) for piece in pieces) == text


def test_the_smallest_temperature_divides_to_infinity() -> None:
    probabilities = sampling_probabilities(torch.tensor([1.0, 3.0, 2.0]), 1e-310, None, None)
    assert probabilities.tolist() == [0, 1, 0]


def test_val_is_a_word_and_not_a_part_of_one(tmp_path: Path) -> None:
    for name in ("retrieval_0.bin", "interval.bin", "fineweb_val_0.bin"):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / name)
    train, validation = bin_shard_sets(tmp_path, 0.1)
    assert (len(train), len(validation)) == (2, 1)


def test_compilation_made_the_number_of_heads_a_symbol(pool: RankPool) -> None:
    """The second compiled model of a process: torch's attention takes no comparison of symbols for a bool."""
    assert pool.run("tests.parallel.memory_jobs:two_compiled_models", 2) == [2, 2]


def test_ddp_cut_its_buckets_anew_after_the_first_step(pool: RankPool) -> None:
    """Of four ranks the parts were then added in another order: a resumed run was not the uninterrupted one."""
    for first, second, third in pool.run("tests.parallel.resume_jobs:first_and_later_gradients", 4):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_a_rank_that_called_early_left_a_lock_to_the_next_fork(tmp_path: Path) -> None:
    """Its call at the agent's store was looked up in a thread, under a lock of libc, while the next rank was forked."""
    code = """
import os, sys, time, psutil
from disttrain.launching.elastic import launch_ranks
from disttrain.resilience import StopRequest

def entry(folder):
    seen = len(psutil.Process(os.getppid()).children())
    open(f"{folder}/{os.environ['RANK']}", "w").write(str(seen))

if __name__ == "__main__":
    with StopRequest() as stop:
        print(launch_ranks(entry, (sys.argv[1],), 6, "cpu", stop).code)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "0\n", ended.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(rank): "6" for rank in range(6)}


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_stop_signal_ended_a_rank_that_was_done_and_the_agent_waited_for_it(number: str) -> None:
    """It collects results a moment later: by a condition that waits for all who wait at it."""
    code = f"""
import os, signal, threading
from disttrain.cli.train import await_collection
from disttrain.launching import elastic
from disttrain.resilience import StopRequest

elastic._agent_options = lambda: {{"signals_to_handle": "SIGQUIT", "monitor_interval": 2.0}}

def entry(parent):
    await_collection(parent)
    threading.Timer(0.5, os.kill, (parent, signal.{number})).start()

if __name__ == "__main__":
    with StopRequest() as stop:
        print(elastic.launch_ranks(entry, (os.getpid(),), 1, "cpu", stop).code)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "0\n", ended.stderr

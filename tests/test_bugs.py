"""One test per past bug, named after its cause."""

from __future__ import annotations

import inspect

import torch

from disttrain.config import ModelConfig
from disttrain.models import GPT
from disttrain.parallel.ddp import summing_hook

TINY = ModelConfig(n_layers=1, d_model=8, n_heads=2, vocab_size=11)


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

"""A model of `transformers` with disttrain as a library: FSDP2, Muon and AdamW, clipping, a loss that counts tokens.

    pip install 'disttrain[hf]'
    python examples/muon_transformers.py
    torchrun --standalone --nproc-per-node 2 examples/muon_transformers.py

What disttrain must know of a model is its plan: names, as below for Llama. Nothing is downloaded: weights are random,
the text is a source file of Python's. Spaces are not predicted, so that every process has another number of tokens.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from disttrain.config import OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.data.loader import IGNORE_LABEL
from disttrain.distributed.collectives import dist_all_gather_rows, dist_sum_integers
from disttrain.distributed.env import Ranks, read_ranks
from disttrain.distributed.mesh import build_mesh
from disttrain.distributed.process_group import distributed, select_device
from disttrain.models import ShardingPlan, cross_entropy_sum
from disttrain.optim import build_optimizer, dist_clip_gradients, set_learning_rate
from disttrain.optim.ownership import ownership, ownership_table
from disttrain.parallel.fsdp import apply_fsdp
from disttrain.schedule import LrSchedule

BATCH, LENGTH, STEPS = 16, 64, 30
LLAMA = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    use_cache=False,
)
LLAMA_PLAN = ShardingPlan(
    fsdp_units=("model.layers.*",),
    roles={
        "embeddings": r"embed_tokens\.",
        "head": r"lm_head\.",
        "norms": r"norm\.",
        "biases": r"\.bias$",
        "matrices": r"layers\..*_proj\.weight$",
    },
    residual_outputs=("*.o_proj.weight", "*.down_proj.weight"),
)
TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))


def batch(step: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This process's rows of the global batch, and what follows each byte."""
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    rows = TEXT[starts[ranks.rank :: ranks.world] + torch.arange(LENGTH + 1)]
    labels = rows[:, 1:]
    return rows[:, :-1], labels.masked_fill(labels == ord(" "), IGNORE_LABEL)


def main() -> None:
    ranks = read_ranks() or Ranks()
    device = select_device("auto", ranks.local_rank)
    with distributed(ranks, device, timeout_seconds=60):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LLAMA).to(device)  # whole and equal everywhere, then cut
        parallel = ParallelConfig(strategy="fsdp")
        mesh = build_mesh(ParallelDims.resolve(parallel.strategy, None, None, ranks.world), device.type)
        apply_fsdp(model, mesh, LLAMA_PLAN, parallel)
        optimizer = build_optimizer(model, OptimConfig(preset="muon", lr=0.01, clip_norm=1.0), LLAMA_PLAN)
        if ranks.is_first:
            print("\n".join(ownership_table(ownership(optimizer))))

        schedule = LrSchedule("cosine", warmup_tokens=3, horizon_tokens=STEPS, final_ratio=0.1)
        for step in range(1, STEPS + 1):
            tokens, labels = batch(step, ranks)
            [valid_tokens] = dist_sum_integers(int((labels != IGNORE_LABEL).sum()))
            loss_sum = cross_entropy_sum(model(input_ids=tokens.to(device)).logits, labels.to(device))
            # Gradients are summed over processes, never averaged: the one division is by the tokens of all of them.
            (loss_sum / valid_tokens).backward()
            dist_clip_gradients(optimizer.param_groups, unscale=torch.ones((), device=device))
            set_learning_rate(optimizer, schedule.factor(step))
            optimizer.step()
            optimizer.zero_grad()
            total = dist_all_gather_rows(loss_sum.detach().double().reshape(1)).sum().item()
            if ranks.is_first:
                print(f"step {step} loss {total / valid_tokens!r}", flush=True)
    # FSDP2 holds the group a while longer, and a thread of gloo can abort a process in the interpreter's teardown.
    os._exit(0)


if __name__ == "__main__":
    main()

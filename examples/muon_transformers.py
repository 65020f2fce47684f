"""disttrain's sharding, groups, optimizers and clipping around a model of `transformers`, in a loop of your own.

    python examples/muon_transformers.py
    torchrun --standalone --nproc-per-node 2 examples/muon_transformers.py

A small Llama with random weights learns Python's own `pydoc` page by page of bytes. Processes have unequal numbers of
labels, and all print the same losses up to rounding: the loss is a sum over the tokens of all of them.
"""

import pydoc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from disttrain.config import OptimConfig, ParallelDims
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.collectives import dist_sum_integers
from disttrain.distributed.env import Ranks, read_ranks
from disttrain.distributed.mesh import build_mesh
from disttrain.distributed.process_group import distributed, select_device
from disttrain.models import ShardingPlan
from disttrain.optim import build_optimizer, dist_clip_gradients, set_learning_rate
from disttrain.parallel.fsdp import apply_fsdp

LENGTH, BATCH, STEPS, WARMUP = 64, 16, 20, 4
IGNORED = -100

# What the parts of a Llama are, by its parameters' names: this is all that disttrain must be told of a model.
LLAMA = ShardingPlan(
    fsdp_units=("model.layers.*",),
    roles={
        "embeddings": r"embed_tokens",
        "head": r"^lm_head",
        "norms": r"norm\.weight$",
        "biases": r"\.bias$",
        "matrices": r"layers\..*_proj\.weight$",
    },
    residual_outputs=("*.o_proj.weight", "*.down_proj.weight"),
)
OPTIM = OptimConfig.model_validate({"preset": "muon", "lr": 4e-3, "clip_norm": 1.0})


def global_batch(step: int) -> torch.Tensor:
    """[BATCH, LENGTH + 1] bytes; the rows end in padding of different lengths."""
    text = Path(pydoc.__file__).read_bytes()
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=torch.Generator().manual_seed(step))
    rows = torch.tensor([list(text[start : start + LENGTH + 1]) for start in starts.tolist()])
    return rows.masked_fill(torch.arange(LENGTH + 1) > LENGTH - 3 * torch.arange(BATCH)[:, None], IGNORED)


def main() -> None:
    ranks = read_ranks() or Ranks()
    device = select_device("auto", ranks.local_rank)
    with distributed(ranks, device, timeout_seconds=120):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=LENGTH,
            )
        ).to(device)  # whole and equal everywhere, then cut
        parallel = ParallelConfig(strategy="fsdp")
        apply_fsdp(
            model, build_mesh(ParallelDims.resolve("fsdp", None, None, ranks.world), device.type), LLAMA, parallel
        )
        optimizer = build_optimizer(model, OPTIM, LLAMA)
        if ranks.is_first:
            print("\n".join(line for muon in optimizer.matrix_optimizers for line in muon.describe()))

        for step in range(1, STEPS + 1):
            rows = global_batch(step)
            mine = rows.chunk(ranks.world)[ranks.rank].to(device)
            labels = mine[:, 1:]
            (tokens,) = dist_sum_integers(int((labels != IGNORED).sum()))
            logits = model(mine[:, :-1].clamp(min=0)).logits
            loss = (
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum") / tokens
            )
            loss.backward()  # gradients are summed over processes, never averaged

            norms = dist_clip_gradients(optimizer.param_groups, unscale=torch.ones((), device=device))
            set_learning_rate(optimizer, min(1.0, step / WARMUP))
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            dist.all_reduce(total)
            if ranks.is_first:
                print(f"step {step} loss {total.item()!r} norm {norms.total.item():.3f}", flush=True)


if __name__ == "__main__":
    main()

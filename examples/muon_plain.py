"""Muon in a loop of your own: torch's modules, FSDP2 or DDP, schedulers and clipping; one function is ours.

    python examples/muon_plain.py
    torchrun --standalone --nproc-per-node 2 examples/muon_plain.py fsdp
    torchrun --standalone --nproc-per-node 2 examples/muon_plain.py ddp

Muon needs whole matrices, which under FSDP2 no process has: `matrix_optimizer` brings each to one process, which
computes its update. All three print the same losses up to rounding. The task is to count in steps of 1 to 4.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from disttrain.optim import matrix_optimizer

VOCAB, WIDTH, LENGTH, BATCH, STEPS = 64, 64, 16, 48, 30


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        settings = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **settings) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def global_batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    first, stride = (torch.randint(*span, (BATCH, 1), generator=generator) for span in ((0, VOCAB), (1, 5)))
    return (first + stride * torch.arange(LENGTH + 1)) % VOCAB


def main() -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    assert BATCH % world == 0, f"a mean of means is right for equal slices only: {BATCH} rows over {world} processes"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Model().to(device)  # whole, and equal everywhere: what is drawn on shards depends on how they are cut
    model: nn.Module = module
    if world > 1:
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group()
        if sys.argv[1:] == ["ddp"]:
            model = DistributedDataParallel(module)
        else:
            for unit in (*module.blocks, module):
                fully_shard(unit)

    hidden = {name: p for name, p in module.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    rest = [p for name, p in module.named_parameters() if name not in hidden]
    # In "muon"'s place: "normuon", "soap", "shampoo", or a function of your own as "package.module:name".
    q_k_v = {"match": "in_proj_weight", "sizes": WIDTH}  # three matrices in one parameter
    muon = matrix_optimizer("muon", hidden.items(), lr=0.02, split=[q_k_v])
    optimizers = [muon, torch.optim.AdamW(rest, lr=0.02)]
    schedulers = [CosineAnnealingLR(optimizer, STEPS) for optimizer in optimizers]

    for step in range(1, STEPS + 1):
        rows = global_batch(step).chunk(world)[rank].to(device)
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step} loss {mean.item()!r}", flush=True)
    if world > 1:
        dist.destroy_process_group()
        # FSDP2 holds the group a while longer, and a thread of gloo can abort a process in the interpreter's teardown.
        os._exit(0)


if __name__ == "__main__":
    main()

"""The Python API in one page: what `disttrain train` does, as a plain loop.

    python examples/plain_loop.py configs/quickstart.toml train.steps=20
    torchrun --standalone --nproc-per-node 2 examples/plain_loop.py configs/quickstart.toml train.steps=20

It trains from the start and leaves a checkpoint in the run folder, which `disttrain generate` can open.
"""

import os
import sys
from pathlib import Path

import torch

from disttrain.checkpoint.local import LocalStorage
from disttrain.checkpoint.manager import CheckpointManager
from disttrain.config import load_config
from disttrain.data.loader import validation_batches
from disttrain.distributed.collectives import dist_all_gather_rows
from disttrain.distributed.env import Ranks, read_ranks
from disttrain.distributed.process_group import distributed, select_device
from disttrain.train.build import build_batch_law, build_training
from disttrain.train.evaluate import evaluate
from disttrain.train.preflight import prepare_run
from disttrain.train.step import train_step


def main() -> None:
    ranks = read_ranks() or Ranks()
    # Settings, data and vocabulary, checked: a UserError here says in words what is wrong.
    run = prepare_run(load_config(Path(sys.argv[1]), sys.argv[2:], world=ranks.world).config)
    config, data, train = run.config, run.data, run.config.train
    device = select_device(config.device, ranks.local_rank)

    with distributed(ranks, device, config.resilience.collective_timeout_seconds):
        parts = build_training(config, data, ranks, device)

        sizes = train.batches()
        law = build_batch_law(config, parts.optimizer, sizes)
        samples = tokens = 0
        for step in range(1, train.total_steps + 1):
            size = sizes.samples_at(tokens)
            # Any step's batch can be asked for: the data is a function of how many samples were used before.
            batches = parts.loader.microbatches(samples, size)
            samples, tokens = samples + size, tokens + size * train.sequence_length
            law.follow(size * train.sequence_length)
            rates = law.lr_factors(tokens, size * train.sequence_length)
            tensors = [(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)) for batch in batches]
            result = train_step(parts.engine, tensors, lr_factor=rates, device=device)
            # Each rank has the sum over its own tokens; waiting for it at every step is for show, not for speed.
            loss_sum = dist_all_gather_rows(result.loss_sum.double().reshape(1)).sum().item()
            if ranks.is_first:
                print(f"step {step} loss {loss_sum / result.valid_tokens!r}", flush=True)

        CheckpointManager(LocalStorage(run.folder.checkpoints), config.checkpoint.keep_last, run.run_id).save(
            parts.engine.state(),
            step=train.total_steps,
            samples=samples,
            tokens=tokens,
            config=config.model_dump(mode="json"),
            data=data.identity,
            strategy=config.parallel.strategy,
        )
        most, rows = config.monitor.evaluate_tokens, train.microbatch_size
        windows = validation_batches(data.validation, train.sequence_length, most, ranks.rank, ranks.world, rows)
        with parts.engine.evaluation_weights():
            measured = evaluate(parts.model, windows, data.tokenizer and data.tokenizer.bytes_per_token, device)
        if ranks.is_first:
            run.folder.write_config(config)
            if data.tokenizer is not None:
                data.tokenizer.save(run.folder.tokenizer)
            print(f"validation loss {measured.loss!r}", flush=True)
    # FSDP2 holds the group a while longer, and a thread of gloo can abort a process in the interpreter's teardown.
    os._exit(0)


if __name__ == "__main__":
    main()

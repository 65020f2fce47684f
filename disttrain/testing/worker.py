"""A rank's side of the pool. Only workers and the fork server import it: its imports are what they start with."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from io import TextIOWrapper
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2 imports it at its first use, which would cost each new worker half a second
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor

from disttrain.testing.process import Job, Report


def serve(rank: int, device: str, stack_file: Path, connection: Connection) -> None:
    """Run the jobs that arrive on `connection` until the parent closes it or dies."""
    # First of all: a fork of a process that ran a two-thread operation hangs in its first multi-threaded one.
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(stack_file.parent,), daemon=True).start()
    _prepare_process(rank, device, stack_file.parent)
    environment = dict(os.environ)
    with suppress(EOFError, OSError):
        connection.send(Report(pickle.dumps(None)))
        while True:
            job: Job = connection.recv()
            torch.manual_seed(rank)  # unseeded ranks differ, as where a launcher started them, yet repeat
            connection.send(_run(rank, device, stack_file, job))
            connection.recv()  # every rank has reported, and none failed
            if dist.is_initialized():  # a job may have ended its group itself
                dist.destroy_process_group()
            if os.environ != environment:
                os.environ.clear()
                os.environ.update(environment)
            torch.set_default_dtype(torch.float32)


def _prepare_process(rank: int, device: str, folder: Path) -> None:
    # A data loader in a job starts its workers as it does in a rank that a launcher started.
    multiprocessing.set_start_method(None, force=True)
    # What a killed job leaves behind goes when the pool does.
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    # The parent handles Ctrl-C, which a terminal sends to every process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    # Without this gloo resolves the host's own name, which fails on many laptops.
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)


def _end_with_parent(folder: Path) -> None:
    """Wait for the parent's death; the main thread may be in a collective and would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _run(rank: int, device: str, stack_file: Path, job: Job) -> Report:
    """The report of one job; after a success its process group is still alive."""
    with open(stack_file, "w") as stacks:
        # A timer of faulthandler rather than a signal from the parent: jobs have handlers of their own to test.
        faulthandler.dump_traceback_later(job.timeout_seconds, file=stacks)
        try:
            return Report(_pickle(job.function, _call(rank, device, job)))
        except BaseException:
            return Report(error=traceback.format_exc(), seconds=time.monotonic())
        finally:
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.flush()


def _call(rank: int, device: str, job: Job) -> Any:
    module, _, name = job.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{job.store}",
        rank=rank,
        world_size=job.world,
        timeout=timedelta(seconds=job.timeout_seconds),
    )
    return function(rank, job.world, **pickle.loads(job.kwargs))


def _pickle(function: str, result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise TypeError(
            f"the result of {function}, {type(result).__name__}, cannot be pickled for the way to the caller: "
            "return numbers, strings, arrays and tensors in lists and dicts; of a DTensor its full_tensor()"
        ) from error

"""disttrain doctor: are machines, network and ranks fit for a run. Without ranks to measure it needs no torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from disttrain.config import RunConfig
from disttrain.config.load import layout_problems, load_config
from disttrain.distributed.env import Ranks, read_ranks, read_variables
from disttrain.doctor import (
    Finding,
    Launch,
    Needs,
    Record,
    as_json,
    exit_code,
    gather_node,
    host_name,
    judge,
    needs_of,
    print_findings,
    responsible_for,
    write_failing_nodes,
)
from disttrain.doctor.facts import Node
from disttrain.doctor.launcher import VARIABLES, read_head, read_launch, read_nodes, shared_folder
from disttrain.doctor.meeting import Exchange, FolderExchange, meet
from disttrain.doctor.reach import wait_for_port
from disttrain.errors import EXIT_FAILED, UserError

FAILING_NODES = "failing_nodes.txt"
Tell = Callable[[Record], int]


def doctor_command(
    config: Annotated[Path | None, typer.Argument(help="The run's TOML file, to know what it will need.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Start so many ranks here and measure (train.nproc).")] = None,
    share: Annotated[Path | None, typer.Option(help="A folder that all nodes see: they compare each other.")] = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes will come.")] = None,
    hosts: Annotated[str | None, typer.Option(help="Their names: a,b,c. Who does not come is named.")] = None,
    head: Annotated[str | None, typer.Option(help="HOST or HOST:PORT of the rendezvous (MASTER_ADDR).")] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for other nodes and ranks.")] = 20.0,
    failing_nodes: Annotated[Path | None, typer.Option(help=f"Default: {FAILING_NODES} in --share, or here.")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="Findings and facts as one JSON object.")] = False,
) -> None:
    """Check machines, network and ranks before a run; exit code 1 when something will break it."""
    _check_numbers(nproc, nodes, wait)
    names = [name.strip() for name in (hosts or "").split(",") if name.strip()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--hosts {hosts}: {', '.join(twice)} is there twice; name each node once")
    variables = read_variables(VARIABLES)
    ranks = _ranks_to_measure(share is not None)
    if ranks is not None and ranks.head:
        variables |= {"MASTER_ADDR": ranks.head, "MASTER_PORT": str(ranks.port)}
    file = failing_nodes or (share or Path()) / FAILING_NODES
    count = read_nodes(nodes, names, variables)
    if share is not None and ranks is None and count is None:
        raise UserError(f"--share {share}: how many nodes will come? Say --nodes N, or --hosts with their names")
    if ranks is not None:
        count, nproc = _of_launcher(ranks, nproc)
    settings = _load(config, overrides or [], count or 1, nproc) if config is not None else None
    wanted = nproc or (settings.train.nproc if settings else None)
    needs = needs_of(settings, count or 1, wanted or 1, *read_head(head, variables), tuple(names))
    exchange = _folder(shared_folder(share, variables), wait) if share is not None else None
    if ranks is not None:
        launched = _Launched(ranks, read_launch(variables), needs, wait, exchange)
        code = launched.answer(lambda record: _tell(record, needs, file, as_json_, alone=True))
        sys.stdout.flush()
        # Not by sys.exit: threads of gloo have been seen to abort a rank in the interpreter's teardown.
        os._exit(code)
    node = gather_node(needs)
    record = Record(here=node.host, nodes={node.host: node})
    if exchange is not None:
        record = meet(exchange, node, needs, wait)
    if wanted is not None and "torch" in node.versions:
        record = _with_ranks(record, wanted, needs)
    raise typer.Exit(_tell(record, needs, file, as_json_, alone=exchange is None))


class _Launched:
    """One of a launcher's ranks. The first one speaks for all; all leave with the same exit code."""

    def __init__(self, ranks: Ranks, launch: Launch, needs: Needs, wait: float, exchange: Exchange | None) -> None:
        self.ranks, self.launch, self.needs, self.wait, self.exchange = ranks, launch, needs, wait, exchange
        self.listens = ranks.is_first and not launch.agent_listens

    def answer(self, tell: Tell) -> int:
        speaks = self.ranks.local_rank == 0
        began = time.monotonic()
        problem = None if self.listens else wait_for_port(self.launch.host, self.launch.port, self.wait)
        node = gather_node(self.needs, head_is_open=not self.listens) if speaks else Node(host=host_name())
        if problem is not None or node.network.port_taken is not None:
            waited = time.monotonic() - began
            record = Record(here=node.host, nodes={node.host: node}, head_error=problem, waited_seconds=waited)
            return tell(record) if speaks else EXIT_FAILED
        try:
            return self._measure(node, tell)
        except RuntimeError as error:  # torch's for a store that is gone or cannot be opened
            what = str(error).strip().splitlines()[0][:200]
            where = f"{self.launch.host}:{self.launch.port}"
            print(f"error: rank {self.ranks.rank} on {node.host}: {where}: {what}", file=sys.stderr, flush=True)
            return EXIT_FAILED

    def _measure(self, node: Node, tell: Tell) -> int:
        # Only now: torch takes seconds to import, and a head that is not there has been found out.
        from disttrain.doctor.launched import open_store, tell_verdict, visit, wait_for_verdict

        store = open_store(self.launch, self.ranks, self.wait)
        record = visit(store, self.ranks, self.needs, node, self.wait, self.exchange)
        if self.ranks.is_first and record is not None:
            code = tell(record)
            tell_verdict(store, self.ranks, code)
            return code
        if (heard := wait_for_verdict(store, self.ranks)) is None:
            print(f"error: rank {self.ranks.rank} on {node.host}: rank 0 says nothing", file=sys.stderr, flush=True)
            return EXIT_FAILED
        return heard


def _tell(record: Record, needs: Needs, file: Path, json_wanted: bool, alone: bool) -> int:
    """Print, write the hosts to leave out, and say with which exit code to leave.

    Where nodes have met in a folder the first one speaks about all, the others about themselves; else one is `alone`.
    """
    findings = judge(record, needs)
    first = record.here == next(iter(record.nodes), record.here)
    failing = _write(file, responsible_for(record, findings, alone), findings)
    if json_wanted:
        print(as_json(record, findings, failing))
    else:
        own = findings if first else [finding for finding in findings if record.here in finding.where]
        print_findings(own, Console(soft_wrap=False))
        if first and failing:
            print(f"{file}: {', '.join(failing)}")
    return exit_code(findings)


def _write(file: Path, hosts: set[str], findings: list[Finding]) -> list[str]:
    try:
        return write_failing_nodes(file, hosts, findings)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; set --failing-nodes to a file elsewhere") from error


def _with_ranks(record: Record, nproc: int, needs: Needs) -> Record:
    from disttrain.doctor.local_ranks import run_local_ranks

    try:
        ranks, missing = run_local_ranks(nproc, needs.device, record.here)
    except UserError as error:
        return record.model_copy(update={"not_measured": error.problems[0]})
    return record.model_copy(update={"ranks": tuple(ranks), "missing_ranks": missing})


def _ranks_to_measure(share: bool) -> Ranks | None:
    """Those that a launcher has started; one task of srun a node, with a folder to meet in, is no rank but a doctor."""
    ranks = read_ranks()
    return None if share and ranks is not None and ranks.head and ranks.local_world == 1 else ranks


def _of_launcher(ranks: Ranks, nproc: int | None) -> tuple[int, int]:
    """Nodes, and processes of each."""
    if nproc not in (None, ranks.local_world):
        raise UserError(
            f"--nproc {nproc}, but a launcher has started {ranks.local_world} processes here already: leave it out"
        )
    return max(1, ranks.world // ranks.local_world), ranks.local_world


def _load(file: Path, overrides: list[str], nodes: int, nproc: int | None) -> RunConfig:
    """With the mesh and batches checked for all nodes together, where the number of processes is known."""
    config = load_config(file, overrides, nproc=nproc, check_layout=False).config
    processes = config.train.nproc
    if problems := layout_problems(config, nodes * processes if processes else None):
        raise UserError(problems)
    return config


def _folder(folder: Path, wait: float) -> FolderExchange:
    try:
        return FolderExchange(folder, host_name(), wait)
    except OSError as error:
        raise UserError(f"--share {folder}: {error.strerror}; name a folder that all nodes can write to") from error


def _check_numbers(nproc: int | None, nodes: int | None, wait: float) -> None:
    problems = [
        f"--{name} {value}: there must be at least one"
        for name, value in (("nproc", nproc), ("nodes", nodes))
        if value is not None and value < 1
    ]
    if not 0 < wait <= 3600:
        problems.append(f"--wait {wait:g}: must be above 0 and at most 3600 seconds")
    if problems:
        raise UserError(problems)

"""`python -m disttrain.launching.node -- COMMAND`: look at the network of this node, then become the command.

The scripts that `disttrain launch` writes start torchrun, or a rank, through it. No torch here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from disttrain.distributed.env import read_variables
from disttrain.distributed.network import SOCKET_VARIABLES, interface_addresses
from disttrain.errors import LaunchError, UserError
from disttrain.launching.network import (
    Route,
    check_interface,
    resolve,
    somebody_listens,
    wait_for_head,
    way_out,
)
from disttrain.launching.roll_call import Member, Nodes, call_roll, join_roll

REACH_SECONDS = 30.0
WAIT_SECONDS = 600.0
_INDICES = ("SLURM_PROCID", "JOB_COMPLETION_INDEX", "PET_NODE_RANK", "SKYPILOT_NODE_RANK", "RANK")
"""Which of the nodes (or ranks) we are, as the scheduler says it; the first one hosts the meeting point."""


class Prepared(NamedTuple):
    variables: dict[str, str]
    """To be added for the command."""
    held: socket.socket | None
    """What keeps other jobs from this head's port until the command has ended."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Never returns: the process becomes the command, or leaves with what is wrong (2, or 1 for nodes that are not
    there)."""
    options = _options(arguments)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the middle of a wait
    try:
        ready = prepare(options, os.environ)
        program = shutil.which(options.command[0])
        if program is None:
            raise UserError(
                f"{options.command[0]}: no such program on {socket.gethostname()}; is the environment active?"
            )
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    if ready.held is not None:
        ready.held.set_inheritable(True)
    os.execve(program, options.command, {**os.environ, **ready.variables})


def prepare(options: argparse.Namespace, environment: Mapping[str, str]) -> Prepared:
    """Look at head, port and interface, and wait for the other nodes.

    Raises UserError (a bad setting) or LaunchError (a head, or a node, that is not there).
    """
    head, port = _endpoint(options, environment)
    address = resolve(head, options.reach)
    route = _own_end(options, environment, head, address)
    index = _index(environment)
    first, held = _is_first(index, address), None
    own = Member(socket.gethostname(), index)
    if first:
        held = _hold_port(route.address, port)
        if options.nodes.most > 1:
            call_roll(_listen(route.address, port), options.nodes, own, options.wait, _say)
    elif options.nodes.most > 1:
        join_roll(address, port, own, options.reach, options.wait, _say)
    else:
        wait_for_head(address, port, options.reach, options.wait, _say)
    said = options.interface
    names = {variable: said or environment.get(variable) or route.interface for variable in SOCKET_VARIABLES}
    variables = {
        **{variable: name for variable, name in names.items() if name},
        # torchrun reads its options from PET_*: a command line that says otherwise goes before.
        "PET_RDZV_ENDPOINT": f"{head}:{port}",
        "PET_LOCAL_ADDR": route.address,
        "PET_RDZV_CONF": ",".join(filter(None, (f"is_host={int(first)}", environment.get("PET_RDZV_CONF")))),
        "MASTER_ADDR": head,
        "MASTER_PORT": str(port),
        # With one store for all attempts, ranks that were started again look for those that died.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **({"PET_SHUTDOWN_TIMEOUT": str(options.stop)} if options.stop else {}),
    }
    return Prepared(variables, held)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m disttrain.launching.node", description=__doc__)
    parser.add_argument("--head", help="name or address of the first node; else PET_RDZV_ENDPOINT or *_MASTER_ADDR")
    parser.add_argument("--port", type=int, help="where the meeting point listens; the same on all nodes")
    parser.add_argument("--interface", help="network interface; else the one on the route to the head")
    parser.add_argument("--reach", type=float, default=REACH_SECONDS, help="seconds for the head's machine to answer")
    parser.add_argument(
        "--wait", type=float, default=WAIT_SECONDS, help="seconds for the job and all nodes to be there; 0: do not"
    )
    parser.add_argument(
        "--nodes", type=_nodes, default=Nodes(1, 1), help="N or LEAST:MOST: so many must be there before any starts"
    )
    parser.add_argument("--stop", type=int, help="seconds that ranks may take to stop; torchrun's own are 30")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to become")
    options = parser.parse_args(arguments)
    options.command = options.command[options.command[:1] == ["--"] :]
    if not options.command:
        parser.error("no command to become: python -m disttrain.launching.node [options] -- COMMAND ...")
    return options


def _nodes(text: str) -> Nodes:
    """As torchrun reads --nnodes."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise argparse.ArgumentTypeError(f"{text}: must be N or LEAST:MOST, numbers of nodes from 1 on")
    return Nodes(int(least), int(most or least))


def _endpoint(options: argparse.Namespace, environment: Mapping[str, str]) -> tuple[str, int]:
    host, _, port = environment.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    head = options.head or host or environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR")
    number = options.port or port or environment.get("PET_MASTER_PORT") or environment.get("MASTER_PORT")
    if not head or not number:
        raise UserError(
            "where is the head? give --head and --port, or set PET_RDZV_ENDPOINT or MASTER_ADDR and MASTER_PORT"
        )
    if not str(number).isdigit() or not 0 < int(number) < 1 << 16:
        raise UserError(f"port {number!r}: must be a number from 1 to 65535")
    return head, int(number)


def _own_end(options: argparse.Namespace, environment: Mapping[str, str], head: str, address: str) -> Route:
    """Of the interface that was chosen, for all or for gloo, or of the route to the head."""
    chosen = {"--interface": options.interface} if options.interface else read_variables(SOCKET_VARIABLES, environment)
    ends = {said_by: check_interface(said_by, value) for said_by, value in chosen.items()}
    return ends.get("--interface") or ends.get("GLOO_SOCKET_IFNAME") or way_out(head, address)


def _index(environment: Mapping[str, str]) -> int | None:
    text = next((environment[name] for name in _INDICES if name in environment), "")
    return int(text) if text.isdecimal() else None


def _is_first(index: int | None, address: str) -> bool:
    """By the scheduler's number where there is one, else by whose address the head's is."""
    if index is not None:
        return index == 0
    return address.startswith("127.") or any(address in own for own in interface_addresses().values())


def _hold_port(address: str, port: int) -> socket.socket | None:
    """Two jobs on one head would meet each other in place of their own; UserError for the second one.

    torchrun listens only seconds from now: until then, and as long as it runs, we hold a name that only one process of
    a machine (or container) can have. It is no file, and gone with its process. None where there are no such names.
    """
    try:
        taken = somebody_listens(address, port)
    except OSError as error:
        raise LaunchError(f"the head cannot reach itself at {address}:{port} ({error.strerror}): is it up?") from None
    if taken:
        raise _taken(address, port)
    if not sys.platform.startswith("linux"):
        return None
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0disttrain/head/{port}")
    except OSError:
        held.close()
        raise _taken(address, port) from None
    return held


def _listen(address: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError:
        raise _taken(address, port) from None


def _taken(address: str, port: int) -> UserError:
    return UserError(
        f"port {port} on the head {socket.gethostname()} ({address}) is in use: another job, or what is left of "
        f"one, has it (`ss -ltnp 'sport = :{port}'` names who listens); end it, or give this job another id or port"
    )


def _say(text: str) -> None:
    print(f"{socket.gethostname()}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

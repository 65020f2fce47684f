"""What a node does before its command: head, port, interface, each of them wrong once."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from disttrain.errors import LaunchError, UserError
from disttrain.launching import network, node
from tests.cli.helpers import environment, run

NOWHERE = "192.0.2.1"
"""Nobody's address (RFC 5737)."""


def prepared(*arguments: str, **variables: str) -> dict[str, str]:
    return node.prepare(node._options([*arguments, "--", "true"]), variables).variables


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_first_node(free_port: int) -> None:
    changes = prepared("--head", "127.0.0.1", "--port", str(free_port), "--stop", "120")
    assert changes == {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TP_SOCKET_IFNAME": "lo",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port}",
        "PET_LOCAL_ADDR": "127.0.0.1",
        "PET_RDZV_CONF": "is_host=1",
        "PET_SHUTDOWN_TIMEOUT": "120",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def test_another_node_joins_who_listens(taken_port: int) -> None:
    """The scheduler's number goes before the address, which two nodes of one machine share."""
    for index in ("SLURM_PROCID", "JOB_COMPLETION_INDEX", "PET_NODE_RANK", "SKYPILOT_NODE_RANK", "RANK"):
        changes = prepared("--head", "127.0.0.1", "--port", str(taken_port), **{index: "1"})
        assert changes["PET_RDZV_CONF"] == "is_host=0"


@pytest.mark.parametrize(
    "variables",
    [
        {"PET_RDZV_ENDPOINT": "127.0.0.1:{port}"},
        {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "{port}"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"},
    ],
)
def test_kubernetes_and_others_say_where_the_head_is(variables: dict[str, str], free_port: int) -> None:
    said = {name: value.format(port=free_port) for name, value in variables.items()}
    assert prepared(**said)["PET_RDZV_ENDPOINT"] == f"127.0.0.1:{free_port}"


def test_what_was_chosen_stays(free_port: int) -> None:
    chosen = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^docker", "PET_RDZV_CONF": "join_timeout=60"}
    changes = prepared("--head", "127.0.0.1", "--port", str(free_port), **chosen)
    assert changes["NCCL_SOCKET_IFNAME"] == "^docker"
    assert changes["PET_RDZV_CONF"] == "is_host=1,join_timeout=60"


def test_two_jobs_on_one_head(taken_port: int) -> None:
    with pytest.raises(UserError) as caught:
        prepared("--head", "127.0.0.1", "--port", str(taken_port))
    assert f"port {taken_port} on the head {socket.gethostname()} (127.0.0.1) is in use: another job" in str(
        caught.value
    )


def test_an_interface_that_is_said_goes_before_the_environment(free_port: int) -> None:
    changes = prepared("--head", "127.0.0.1", "--port", str(free_port), "--interface", "lo", GLOO_SOCKET_IFNAME="eth9")
    assert (changes["GLOO_SOCKET_IFNAME"], changes["PET_LOCAL_ADDR"]) == ("lo", "127.0.0.1")


def test_gloo_may_be_given_several_interfaces(free_port: int) -> None:
    """Names with commas, which it takes in turn; each of them must be there."""
    said = prepared("--head", "127.0.0.1", "--port", str(free_port), GLOO_SOCKET_IFNAME="lo,lo")
    assert (said["GLOO_SOCKET_IFNAME"], said["PET_LOCAL_ADDR"]) == ("lo,lo", "127.0.0.1")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME = lo,eth9: on .* the interface eth9 is not there"):
        prepared("--head", "127.0.0.1", "--port", str(free_port), GLOO_SOCKET_IFNAME="lo,eth9")


@pytest.mark.parametrize(
    "said", [{"--interface": "eth9"}, {"GLOO_SOCKET_IFNAME": "eth9"}, {"NCCL_SOCKET_IFNAME": "eth9"}]
)
def test_an_interface_that_is_not_there(said: dict[str, str], free_port: int) -> None:
    options = [word for name, value in said.items() if name.startswith("--") for word in (name, value)]
    variables = {name: value for name, value in said.items() if not name.startswith("--")}
    with pytest.raises(UserError) as caught:
        prepared("--head", "127.0.0.1", "--port", str(free_port), *options, **variables)
    assert f"{next(iter(said))} = eth9: on {socket.gethostname()} the interface eth9 is not there; there are" in str(
        caught.value
    )
    assert "lo (127.0.0.1)" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "where is the head? give --head and --port"),
        (("--head", "127.0.0.1", "--port", "99999"), "port 99999: must be a number from 1 to 65535"),
    ],
)
def test_no_endpoint(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        prepared(*arguments)
    assert said in str(caught.value)


def test_a_name_without_an_address() -> None:
    with pytest.raises(LaunchError, match=r"the head 'head\.invalid' has no address on .* after 0 s"):
        prepared("--head", "head.invalid", "--port", "1", "--reach", "0")


def test_a_head_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named after `reach` seconds, of which the last try may take some."""
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(network.time, "monotonic", lambda: float(next(times)))
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)

    def silent(*_: object, **__: object) -> None:
        raise OSError(113, "No route to host")

    monkeypatch.setattr(network.socket, "create_connection", silent)
    with pytest.raises(LaunchError) as caught:
        network.wait_for_head(NOWHERE, 20001, reach_seconds=30, wait_seconds=600)
    assert f"the head {NOWHERE}:20001 cannot be reached from {socket.gethostname()} (No route to host" in str(
        caught.value
    )
    assert next(times) <= 50


def test_a_head_whose_job_has_not_begun(free_port: int) -> None:
    """The others wait for it, and say so once; without a wait its machine's answer is enough."""
    said: list[str] = []
    network.wait_for_head("127.0.0.1", free_port, reach_seconds=30, wait_seconds=0, say=said.append)
    assert said == []
    with pytest.raises(LaunchError, match=f"answers, but nobody listens at port {free_port} after 1 s"):
        network.wait_for_head("127.0.0.1", free_port, reach_seconds=30, wait_seconds=1, say=said.append)
    assert said == [f"the head 127.0.0.1 answers; waiting until the job there listens at port {free_port}"]

    def begin() -> None:
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", free_port)) as server:
            server.accept()[0].close()

    head = threading.Thread(target=begin)
    head.start()
    network.wait_for_head("127.0.0.1", free_port, reach_seconds=30, wait_seconds=60)
    head.join()


def test_a_machine_whose_name_is_a_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's 127.0.1.1: nobody else could reach it, so the end of the default route is taken."""
    ends = {"127.0.1.1": network.Route("127.0.0.1", "lo"), "192.0.2.1": network.Route("10.0.0.5", "eth0")}
    monkeypatch.setattr(network, "route_to", lambda address: ends[address])
    assert network.way_out("head", "127.0.1.1") == network.Route("10.0.0.5", "eth0")
    ends["127.0.0.1"] = ends["127.0.1.1"]
    assert network.way_out("127.0.0.1", "127.0.0.1").interface == "lo"  # somebody means it


def test_it_becomes_the_command(free_port: int) -> None:
    """The same process, with its own variables and ours."""
    code = "import os, json; print(json.dumps([os.getpid(), os.environ['OWN'], os.environ['PET_RDZV_ENDPOINT']]))"
    options = ("--head", "127.0.0.1", "--port", free_port, "--", sys.executable, "-c", code)
    env = environment(OWN="kept")
    ended = run(sys.executable, "-m", "disttrain.launching.node", *options, env=env)
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)[1:] == ["kept", f"127.0.0.1:{free_port}"]


@pytest.mark.parametrize("text", ["x", "0", "3:2", "-1", "1:2:3"])
def test_numbers_of_nodes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of two nodes would be waited for to the end."""
    assert node._options(["--nodes", "2:4", "--", "true"]).nodes == (2, 4)
    with pytest.raises(SystemExit) as caught:
        node._options([f"--nodes={text}", "--", "true"])
    assert caught.value.code == 2
    assert f"{text}: must be N or LEAST:MOST" in capsys.readouterr().err


def test_bad_input_shows_no_traceback(taken_port: int) -> None:
    command = (sys.executable, "-m", "disttrain.launching.node", "--head", "127.0.0.1", "--port")
    ended = run(*command, taken_port, "--", "true")
    assert ended.code == 2
    assert ended.err.startswith(f"error: port {taken_port} on the head")
    assert len(ended.err.splitlines()) == 1
    ended = run(*command, 1, "--", "no-such-program")
    assert (ended.code, ended.err.startswith("error: no-such-program: no such program on")) == (2, True)
    ended = run(*command, 1)
    assert (ended.code, "no command to become" in ended.err) == (2, True)

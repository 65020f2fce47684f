"""What a launcher, a scheduler and a config say, and all facts of this machine together."""

from __future__ import annotations

import socket

import pytest

from disttrain.config.monitor import MonitorConfig, WandbConfig
from disttrain.doctor.facts import Node
from disttrain.doctor.gather import gather_node, gather_packages, host_name
from disttrain.doctor.launcher import Launch, read_head, read_launch, read_nodes
from disttrain.doctor.needs import Needs
from disttrain.errors import UserError

TORCHRUN = {
    "MASTER_ADDR": "h",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "j",
    "TORCHELASTIC_RESTART_COUNT": "1",
}


def test_facts_survive_the_way_to_another_node() -> None:
    node = gather_node(Needs(head="127.0.0.1", port=None))
    assert Node.model_validate_json(node.model_dump_json()) == node
    assert node.host == host_name()
    assert node.network.route is not None
    assert node.network.route.interface == "lo"


def test_slurm_gives_nodes_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert host_name() == "n7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert host_name() == socket.gethostname()


def test_where_a_launcher_has_us_meet() -> None:
    assert read_launch(TORCHRUN) == Launch("h", 29500, True, "doctor///j/1")
    slurm = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"}
    assert read_launch(slurm) == Launch("h", 1, False, "doctor/7/2//0")
    with pytest.raises(UserError, match="MASTER_PORT x: must be a port number"):
        read_launch({"MASTER_ADDR": "h", "MASTER_PORT": "x"})


@pytest.mark.parametrize(
    ("option", "found"),
    [
        (None, ("h", 29500)),
        ("a", ("a", None)),
        ("a:5", ("a", 5)),
        ("fd00::2", ("fd00::2", None)),
        ("[fd00::2]:5", ("fd00::2", 5)),
    ],
)
def test_the_head(option: str | None, found: tuple[str, int | None]) -> None:
    assert read_head(option, TORCHRUN) == found
    assert read_head(None, {}) == (None, None)


def test_how_many_nodes_will_come() -> None:
    slurm = {"SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_NUM_NODES": "4"}
    assert read_nodes(None, [], slurm) == 2
    assert read_nodes(3, [], slurm) == 3
    assert read_nodes(None, ["a", "b"], {}) == 2
    assert read_nodes(None, [], {}) is None


def test_a_wandb_server_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb comes with the extra [wandb]")
    online = MonitorConfig(wandb=WandbConfig(mode="online"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        found = gather_packages(online)
        assert (found.wandb_server, found.wandb_error, found.problems) == (f"127.0.0.1:{port}", None, ())
    assert gather_packages(online).wandb_error == "Connection refused"
    # Nobody is called when the run would not go online.
    assert gather_packages(MonitorConfig()).wandb_server is None

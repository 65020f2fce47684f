"""Settings of what is watched."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from disttrain.config.monitor import MonitorConfig, ProfileConfig, PrometheusConfig
from disttrain.errors import UserError
from disttrain.train import extras
from disttrain.train.extras import check_extras, prometheus_token


def test_the_defaults_watch_nothing_from_outside() -> None:
    config = MonitorConfig()
    assert (config.wandb.mode, config.tensorboard.enabled, config.prometheus.port) == ("disabled", False, None)
    assert config.prometheus.address == "127.0.0.1"


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.3", "::"])
def test_other_machines_need_a_token(address: str) -> None:
    with pytest.raises(ValidationError, match="set token_file"):
        PrometheusConfig(address=address)
    assert PrometheusConfig(address=address, token_file="token").address == address


def test_an_address_is_an_address() -> None:
    with pytest.raises(ValidationError, match="not an IP address"):
        PrometheusConfig(address="localhost")
    for loopback in ("127.0.0.1", "127.0.0.2", "::1"):
        PrometheusConfig(address=loopback)


def test_steps_to_profile() -> None:
    assert ProfileConfig.model_validate({"steps": [10, 12]}).steps == (10, 12)
    for steps in ([12, 10], [0, 3], [1], [1, 2, 3]):
        with pytest.raises(ValidationError):
            ProfileConfig.model_validate({"steps": steps})


@pytest.mark.parametrize("content", [None, "", "short", "with space in the middle", "é" * 20])
def test_tokens_that_are_none(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="openssl rand"):
        prometheus_token(PrometheusConfig(port=0, token_file=str(file)))


def test_a_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert prometheus_token(PrometheusConfig(port=0, token_file=str(tmp_path / "token"))) == "0123456789abcdef"
    assert prometheus_token(PrometheusConfig(port=None, token_file="nowhere")) is None


def test_packages_that_are_missing_are_all_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    section = {"wandb": {"mode": "offline"}, "tensorboard": {"enabled": True}, "prometheus": {"port": 0}}
    with pytest.raises(UserError) as refused:
        check_extras(MonitorConfig.model_validate(section))
    assert [problem.split("'")[1] for problem in refused.value.problems] == [
        "disttrain[wandb]",
        "disttrain[tensorboard]",
        "disttrain[prometheus]",
    ]
    check_extras(MonitorConfig())


def test_a_folder_of_an_earlier_run_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not extras._installed("no_such_package")
    assert extras._installed("json")

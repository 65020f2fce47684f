"""Packages that only some settings need, and the token of a sink: looked for before anything is started."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from disttrain.config.monitor import MonitorConfig, PrometheusConfig
from disttrain.errors import UserError

_LEAST_TOKEN = 16


def check_extras(monitor: MonitorConfig, engine: str = "native") -> None:
    """UserError for engines and sinks that cannot be: a missing package, a token that cannot be read."""
    wanted = {
        f"engine = {engine!r}": (engine, engine, engine != "native"),
        "monitor.wandb.mode": ("wandb", "wandb", monitor.wandb.mode != "disabled"),
        "monitor.tensorboard.enabled": ("tensorboard", "tensorboard", monitor.tensorboard.enabled),
        "monitor.prometheus.port": ("prometheus_client", "prometheus", monitor.prometheus.port is not None),
    }
    problems = [
        f"{setting}: the package {package} is not installed; pip install 'disttrain[{extra}]', or leave the setting out"
        for setting, (package, extra, on) in wanted.items()
        if on and not _installed(package)
    ]
    try:
        prometheus_token(monitor.prometheus)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)


def prometheus_token(config: PrometheusConfig) -> str | None:
    """What scrapers must send; None where anybody who reaches the port may read."""
    if config.port is None or config.token_file is None:
        return None
    setting = f"monitor.prometheus.token_file = {config.token_file}"
    try:
        token = Path(config.token_file).expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not plain ASCII text"
        raise UserError(f"{setting}: {reason}; write a token into it, `openssl rand -hex 16` makes one") from error
    if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
        raise UserError(
            f"{setting}: a token has at least {_LEAST_TOKEN} characters, without spaces (this has {len(token)}); "
            "`openssl rand -hex 16` makes one"
        )
    return token


def _installed(package: str) -> bool:
    """A folder of that name beside us (wandb/ of an earlier run, say) is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None

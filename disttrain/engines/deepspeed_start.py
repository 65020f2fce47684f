"""How DeepSpeed is called, and what is said in its place."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from pydantic import ValidationError
from torch import nn

from disttrain.engines.handed_over import HandedOver
from disttrain.errors import UserError


def initialize(model: nn.Module, handed: HandedOver, ds_config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around `model`; UserError for what it cannot do here, or refuses in the user's own file."""
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops

    check_fp16(deepspeed.accelerator.get_accelerator(), ds_config)
    # An all-reduce for inference within one machine, which training does not call: its build takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls collectives by names that newer torches have others for.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    log = logging.getLogger("DeepSpeed")
    # It would warn of our optimizer, which it does not know, and tell what we have told it.
    log.setLevel(logging.ERROR)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=handed, config=ds_config, dist_init_required=False)
    except ValidationError as error:
        raise UserError(
            f"deepspeed.config_file: DeepSpeed refuses {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})"
            for e in error.errors()
        ) from error
    log.setLevel(logging.WARNING)
    return engine


def check_fp16(accelerator: Any, ds_config: dict[str, Any]) -> None:
    """DeepSpeed would end in a ValueError."""
    if ds_config.get("fp16", {}).get("enabled") and not accelerator.is_fp16_supported():
        raise UserError(
            f"parallel.param_dtype = 'fp16': DeepSpeed does not compute in it on this {accelerator.device_name()}, "
            "which has no units for it; use bf16, or engine = 'native'"
        )

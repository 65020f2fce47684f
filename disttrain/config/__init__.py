"""Settings: frozen sections, mesh arithmetic, the loader. No torch here: bad input is refused before it is needed."""

from disttrain.config.layout import ParallelDims
from disttrain.config.load import LoadedConfig, load_config
from disttrain.config.model import ModelConfig
from disttrain.config.optim import OptimConfig
from disttrain.config.run import RunConfig

__all__ = ["LoadedConfig", "ModelConfig", "OptimConfig", "ParallelDims", "RunConfig", "load_config"]

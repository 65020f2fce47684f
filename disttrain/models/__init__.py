"""Plain modules that know nothing of parallelism."""

from disttrain.models.generate import generate_tokens
from disttrain.models.gpt import GPT
from disttrain.models.init import init_parameters
from disttrain.models.loss import cross_entropy_sum
from disttrain.models.sharding_plan import GPT_PLAN, ShardingPlan

__all__ = ["GPT", "GPT_PLAN", "ShardingPlan", "cross_entropy_sum", "generate_tokens", "init_parameters"]

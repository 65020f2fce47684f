"""disttrain: distributed training of GPT-style models whose result is that of one process."""

__version__ = "0.1.0"

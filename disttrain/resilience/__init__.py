"""How a run looks after itself: requests to stop, and ranks that hang or are slow."""

from disttrain.resilience.hang import lost_peers
from disttrain.resilience.restarts import RestartBudget
from disttrain.resilience.signals import STOP_SIGNALS, StopRequest, heard_signals
from disttrain.resilience.slow import SlowRanks
from disttrain.resilience.watchdog import Watchdog

__all__ = ["STOP_SIGNALS", "RestartBudget", "SlowRanks", "StopRequest", "Watchdog", "heard_signals", "lost_peers"]

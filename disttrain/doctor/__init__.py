"""Checks before a run: facts are gathered, and pure functions make findings of them. Only the modules whose ranks
measure something (`launched`, `local_ranks`, `measure`, `links`, `rank_results`) import torch."""

from disttrain.doctor.facts import Record
from disttrain.doctor.finding import Finding, exit_code, failing_hosts
from disttrain.doctor.gather import gather_node, host_name
from disttrain.doctor.judge import judge, responsible_for, write_failing_nodes
from disttrain.doctor.launcher import Launch
from disttrain.doctor.needs import Needs, needs_of
from disttrain.doctor.text import as_json, print_findings

__all__ = [
    "Finding",
    "Launch",
    "Needs",
    "Record",
    "as_json",
    "exit_code",
    "failing_hosts",
    "gather_node",
    "host_name",
    "judge",
    "needs_of",
    "print_findings",
    "responsible_for",
    "write_failing_nodes",
]

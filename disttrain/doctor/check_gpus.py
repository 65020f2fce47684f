"""Are the GPUs there, usable and healthy. On machines without one there is little to say."""

from __future__ import annotations

from disttrain.doctor.facts import Gpu, Node
from disttrain.doctor.finding import Finding
from disttrain.doctor.needs import Needs
from disttrain.doctor.words import size

BUSY_BYTES = 1 << 30
"""More memory than a driver keeps for itself: another process is on the card."""


def check_gpus(node: Node, needs: Needs) -> list[Finding]:
    gpus, where = node.gpus, (node.host,)
    if needs.device == "cpu":
        return []
    if gpus.error is not None:
        what = f"nvidia-smi: {gpus.error}"
        return [Finding("breaks", "gpus", what, where, "restart the driver or the node; leave it out meanwhile")]
    if not gpus.cards and gpus.seen is None:
        return _none(node, needs)
    findings = [*_build(node), *_count(node, needs)]
    for index, card in enumerate(gpus.cards):
        findings += _card(card, f"GPU {index} ({card.name})", node.host)
    if findings:
        return findings
    name = gpus.cards[0].name if gpus.cards else gpus.seen
    what = f"{len(gpus.cards) or ''} {name}, driver {gpus.driver}, no uncorrected memory errors".strip()
    return [Finding("ok", "gpus", what, where, figures={"gpus": len(gpus.cards)})]


def _none(node: Node, needs: Needs) -> list[Finding]:
    if needs.device == "cuda":
        what = 'device = "cuda", and this machine shows no GPU'
        remedy = "ask the scheduler for GPUs (--gpus-per-node, nvidia.com/gpu), or set device=cpu"
        return [Finding("breaks", "gpus", what, (node.host,), remedy)]
    return [Finding("ok", "gpus", "no GPU here: the run will use the CPU and gloo", (node.host,), figures={"gpus": 0})]


def _build(node: Node) -> list[Finding]:
    """`disttrain train` refuses a GPU that its torch cannot use."""
    cuda, served = node.versions.get("CUDA"), node.gpus.driver_cuda
    if "torch" in node.versions and cuda is None:
        what = f"torch {node.versions['torch']} is a build without CUDA, and there is a GPU"
        return [Finding("breaks", "gpus", what, (node.host,), "install a CUDA build of torch, or set device=cpu")]
    if cuda is not None and served is not None and _major(cuda) > _major(served):
        what = f"torch wants CUDA {cuda}, driver {node.gpus.driver} serves up to {served}"
        return [Finding("breaks", "gpus", what, (node.host,), "update the driver, or install torch for an older CUDA")]
    return []


def _count(node: Node, needs: Needs) -> list[Finding]:
    """CUDA_VISIBLE_DEVICES may show fewer than there are; more processes than cards is an error either way."""
    cards = len(node.gpus.cards)
    if not cards or needs.nproc <= cards:
        return []
    what = f"{needs.nproc} processes on this node and {cards} GPUs: one process per GPU"
    return [Finding("breaks", "gpus", what, (node.host,), f"use --nproc {cards}", {"gpus": cards})]


def _card(card: Gpu, name: str, host: str) -> list[Finding]:
    where, findings = (host,), []
    figures = {"uuid": card.uuid, "uncorrected_errors": card.uncorrected_errors}
    if card.repair_failed:
        remedy = "have the card replaced; leave the node out"
        findings.append(
            Finding("breaks", "gpus", f"{name}: a memory row could not be remapped", where, remedy, figures)
        )
    if card.uncorrected_errors:
        what = f"{name}: {card.uncorrected_errors} uncorrected memory errors (ECC) since the driver was loaded"
        remedy = "reset the card or restart the node, and leave it out if they come back"
        findings.append(Finding("breaks", "gpus", what, where, remedy, figures))
    if card.repair_pending:
        what = f"{name}: a memory repair waits for a reset"
        findings.append(Finding("warning", "gpus", what, where, "reset the card before a long run", figures))
    if card.slowed_by:
        what = f"{name}: its clock is held down ({', '.join(card.slowed_by)})"
        findings.append(Finding("warning", "gpus", what, where, "look after cooling and power of the node", figures))
    if (card.memory_used_bytes or 0) > BUSY_BYTES:
        what = f"{name}: {size(card.memory_used_bytes or 0)} of {size(card.memory_bytes or 0)} are in use already"
        remedy = "nvidia-smi shows by whom: end what an earlier run left behind"
        findings.append(Finding("warning", "gpus", what, where, remedy, figures))
    return findings


def _major(version: str) -> int:
    head = version.split(".")[0]
    return int(head) if head.isdecimal() else 0

"""What nvidia-smi says, parsed from made-up output, and what is concluded. No GPU was near these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.doctor.check_gpus import check_gpus
from disttrain.doctor.facts import Gpus
from disttrain.doctor.needs import Needs
from disttrain.doctor.nvidia import gather_gpus, infiniband, parse_smi
from tests.doctor.made_up import CARD, VERSIONS, healthy, only

EIGHT = Needs(nproc=8)


def smi(card: str) -> str:
    return (
        "<?xml version='1.0'?><nvidia_smi_log>"
        "<driver_version>570.86.15</driver_version><cuda_version>12.8</cuda_version>"
        f"<attached_gpus>1</attached_gpus><gpu id='00000000:01:00.0'>{card}</gpu></nvidia_smi_log>"
    )


MODERN = smi("""
  <product_name>NVIDIA H100 80GB HBM3</product_name><uuid>GPU-17</uuid>
  <fb_memory_usage><total>81559 MiB</total><reserved>500 MiB</reserved><used>4 MiB</used></fb_memory_usage>
  <ecc_mode><current_ecc>Enabled</current_ecc><pending_ecc>Enabled</pending_ecc></ecc_mode>
  <ecc_errors>
    <volatile><sram_correctable>9</sram_correctable><sram_uncorrectable_parity>1</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>0</sram_uncorrectable_secded><dram_correctable>7</dram_correctable>
      <dram_uncorrectable>2</dram_uncorrectable></volatile>
    <aggregate><dram_uncorrectable>50</dram_uncorrectable></aggregate>
  </ecc_errors>
  <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
  <remapped_rows><remapped_row_pending>Yes</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
  <clocks_event_reasons><clocks_event_reason_hw_slowdown>Active</clocks_event_reason_hw_slowdown>
    <clocks_event_reason_sw_thermal_slowdown>Not Active</clocks_event_reason_sw_thermal_slowdown></clocks_event_reasons>
""")
OLD = smi("""
  <product_name>Tesla V100-SXM2-32GB</product_name><uuid>GPU-3</uuid>
  <ecc_mode><current_ecc>Enabled</current_ecc></ecc_mode>
  <ecc_errors><volatile><double_bit><device_memory>3</device_memory><total>3</total></double_bit></volatile></ecc_errors>
  <retired_pages><pending_retirement>Yes</pending_retirement></retired_pages>
  <clocks_throttle_reasons><clocks_throttle_reason_hw_thermal_slowdown>Active</clocks_throttle_reason_hw_thermal_slowdown>
  </clocks_throttle_reasons>
""")


def test_a_modern_card() -> None:
    gpus = parse_smi(MODERN)
    (card,) = gpus.cards
    assert (gpus.driver, gpus.driver_cuda, gpus.error) == ("570.86.15", "12.8", None)
    assert (card.name, card.uuid, card.ecc, card.memory_bytes) == ("NVIDIA H100 80GB HBM3", "GPU-17", True, 81559 << 20)
    assert card.uncorrected_errors == 3  # correctable ones are no harm, and those of earlier years are past
    assert (card.repair_pending, card.repair_failed, card.slowed_by) == (True, False, ("hw slowdown",))


def test_a_card_from_before_ampere() -> None:
    (card,) = parse_smi(OLD).cards
    assert (card.uncorrected_errors, card.repair_pending, card.slowed_by) == (3, True, ("hw thermal slowdown",))
    assert (card.memory_bytes, card.memory_used_bytes) == (None, None)


def test_a_card_without_ecc_says_nothing() -> None:
    (card,) = parse_smi(smi("<ecc_mode><current_ecc>N/A</current_ecc></ecc_mode>")).cards
    assert (card.ecc, card.uncorrected_errors, card.repair_pending) == (None, None, False)


@pytest.mark.parametrize("text", ["", "NVIDIA-SMI has failed", MODERN[:300]])
def test_damaged_output(text: str) -> None:
    assert "damaged" in (parse_smi(text).error or "")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Unable to determine the device handle' >&2; exit 15", "Unable to determine the device handle"),
        ("exit 9", "exit code 9"),
        ("echo '<nvidia_smi_log><driver_version>1.2</driver_version></nvidia_smi_log>'", None),
    ],
)
def test_the_command_is_run(tmp_path: Path, script: str, said: str | None) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    assert gather_gpus(str(command)).error == said
    assert gather_gpus(str(tmp_path / "absent")).error is None


def test_no_gpu_is_fine_unless_one_is_wanted() -> None:
    node = healthy(gpus=Gpus())
    assert check_gpus(node, EIGHT)[0].severity == "ok"
    only(check_gpus(node, Needs(device="cuda")))
    assert check_gpus(healthy(gpus=Gpus(error="dead")), Needs(device="cpu")) == []
    only(check_gpus(healthy(gpus=Gpus(error="dead")), EIGHT))


def test_a_torch_that_cannot_use_the_card() -> None:
    cpu_build = {name: version for name, version in VERSIONS.items() if name != "CUDA"}
    assert "without CUDA" in only(check_gpus(healthy(versions=cpu_build), EIGHT)).what
    newer = healthy(versions=VERSIONS | {"CUDA": "13.0"})
    assert "serves up to 12.8" in only(check_gpus(newer, EIGHT)).what
    assert check_gpus(healthy(), EIGHT)[0].severity == "ok"
    assert "use --nproc 8" in only(check_gpus(healthy(), Needs(nproc=9))).remedy


@pytest.mark.parametrize(
    ("change", "severity", "said"),
    [
        ({"uncorrected_errors": 2}, "breaks", "2 uncorrected memory errors"),
        ({"repair_failed": True}, "breaks", "could not be remapped"),
        ({"repair_pending": True}, "warning", "waits for a reset"),
        ({"slowed_by": ("hw slowdown",)}, "warning", "held down (hw slowdown)"),
        ({"memory_used_bytes": 3 << 30}, "warning", "3.22 GB of 85.9 GB are in use"),
    ],
)
def test_a_card_in_trouble(change: dict[str, object], severity: str, said: str) -> None:
    cards = (*(CARD,) * 7, CARD.model_copy(update=change))
    found = only(check_gpus(healthy(gpus=Gpus(cards=cards)), EIGHT), severity)
    assert said in found.what
    assert found.what.startswith("GPU 7 ")


def test_infiniband_devices(tmp_path: Path) -> None:
    assert infiniband(tmp_path) == ()
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert infiniband(tmp_path) == ("mlx5_0",)

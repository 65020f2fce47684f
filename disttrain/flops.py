"""How many floating-point operations a transformer's step needs, and devices offer: pure arithmetic, no torch."""

from __future__ import annotations

PEAK_FLOPS = {
    # Dense tensor-core rates in bf16 and fp16, and fp32 without TF32, from the makers' data sheets.
    "NVIDIA A100": (312e12, 19.5e12),
    "NVIDIA H100 PCIe": (756e12, 51e12),
    "NVIDIA H100 NVL": (835e12, 60e12),
    "NVIDIA H100": (989e12, 67e12),
    "NVIDIA H200 NVL": (835e12, 60e12),
    "NVIDIA H200": (989e12, 67e12),
    "NVIDIA B200": (2250e12, 75e12),
    "NVIDIA L40S": (362e12, 91.6e12),
    "NVIDIA L4": (121e12, 30.3e12),
    "Tesla V100-SXM2": (125e12, 15.7e12),
    "Tesla T4": (65e12, 8.1e12),
}
"""FLOP/s by the beginning of a device's name; longer names come before what they begin with."""


def training_flops_per_token(matmul_parameters: int, n_layers: int, d_attention: int, sequence_length: int) -> int:
    """Forward and backward FLOPs for one token of a causal transformer.

    `matmul_parameters` counts the weights that multiply every token (the head included, embedding look-ups not):
    two FLOPs each forward, four backward. Causal attention adds `6 * n_layers * d_attention * sequence_length`,
    half of the `12 * L * d * T` of PaLM appendix B (arXiv 2204.02311), because half of the scores are masked.
    Recomputation is not counted.
    """
    return 6 * matmul_parameters + 6 * n_layers * d_attention * sequence_length


def peak_flops(device_name: str, dtype: str) -> float | None:
    """What one device offers in FLOP/s for matrices of `dtype` (bf16, fp16, fp32); None for a device that is not in the
    table, and for a part of one (MIG). Bf16 on cards older than A100 has no tensor cores: None too."""
    column = {"bf16": 0, "fp16": 0, "fp32": 1}.get(dtype)
    if column is None or "MIG" in device_name or (dtype == "bf16" and device_name.startswith("Tesla")):
        return None
    for name, peaks in PEAK_FLOPS.items():
        rest = device_name.removeprefix(name)
        # An L40 is no L4.
        if rest != device_name and not rest[:1].isalnum():
            return peaks[column]
    return None


def model_flops_utilisation(model_flops_per_second: float, devices: int, peak_flops_per_device: float) -> float:
    """MFU of PaLM appendix B: the share of all devices' peak that goes into the FLOPs that the model needs."""
    return model_flops_per_second / (devices * peak_flops_per_device)

"""How many floating-point operations a transformer's training step needs: pure arithmetic, no torch."""

from __future__ import annotations


def training_flops_per_token(matmul_parameters: int, n_layers: int, d_attention: int, sequence_length: int) -> int:
    """Forward and backward FLOPs for one token of a causal transformer.

    `matmul_parameters` counts the weights that multiply every token (the head included, embedding look-ups not):
    two FLOPs each forward, four backward. Causal attention adds `6 * n_layers * d_attention * sequence_length`,
    half of the `12 * L * d * T` of PaLM appendix B (arXiv 2204.02311), because half of the scores are masked.
    Recomputation is not counted.
    """
    return 6 * matmul_parameters + 6 * n_layers * d_attention * sequence_length

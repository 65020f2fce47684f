"""The FLOP count against a count by hand of every matrix product."""

from disttrain.flops import PEAK_FLOPS, model_flops_utilisation, peak_flops, training_flops_per_token


def test_counts_every_product_of_forward_and_backward() -> None:
    n_layers, d_model, d_ff, vocab, length = 3, 8, 32, 50, 16
    matrices = n_layers * (4 * d_model * d_model + 2 * d_model * d_ff) + d_model * vocab
    forward_matrices = 2 * matrices
    # Scores and their product with the values: 2 x 2 x d_model each for every earlier position, half of all on average.
    forward_attention = n_layers * 2 * 2 * d_model * length // 2
    expected = 3 * (forward_matrices + forward_attention)
    assert training_flops_per_token(matrices, n_layers, d_model, length) == expected


def test_gpt2_small_at_1024() -> None:
    matrices = 12 * 12 * 768**2 + 768 * 50257
    assert training_flops_per_token(matrices, 12, 768, 1024) == 6 * matrices + 6 * 12 * 768 * 1024 == 797_815_296


def test_peaks_of_known_devices_only() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    for unknown in (
        "NVIDIA GeForce RTX 9090",
        "NVIDIA L40",
        "Tesla T40",
        "Tesla V100-PCIE-16GB",
        "NVIDIA H100 MIG 1g.10gb",
    ):
        assert peak_flops(unknown, "fp16") is None, unknown
    assert peak_flops("NVIDIA L4", "fp16") == 121e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp64") is None


def test_longer_names_come_first() -> None:
    names = list(PEAK_FLOPS)
    for index, name in enumerate(names):
        assert not any(name.startswith(earlier) for earlier in names[:index]), name


def test_utilisation_is_of_all_devices() -> None:
    assert model_flops_utilisation(4e14, devices=8, peak_flops_per_device=1e14) == 0.5

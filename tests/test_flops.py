"""The FLOP count against a count by hand of every matrix product."""

from disttrain.flops import training_flops_per_token


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

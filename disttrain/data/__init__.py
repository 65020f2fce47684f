"""Text or token files in, microbatches of token ids out: numpy only, a pure function of (seed, position)."""

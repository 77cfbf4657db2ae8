"""How fast: correctness first, then medians of one interleaved run, ours beside the
peers'."""

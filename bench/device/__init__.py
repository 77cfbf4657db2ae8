"""A GPU's own checks and rates: `python -m minidiff.bench.device`."""

"""Benchmarks: contract backends against what users write today. Import name minidiff.bench."""

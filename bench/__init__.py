"""Benchmarks: contract backends against what users write today.

Import name minidiff.bench.
"""

import os

# OpenMP's threads wait for work by spinning, for ~5 ms by default, and take the cores from
# the next library's: .5 ms is longer than any gap between the operations of one form and
# shorter than clock's pause. Read when torch is loaded; a value of the user's own stands.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

"""The whole bench: what `python -m minidiff bench` runs when nothing is asked for in particular."""

from itertools import chain

from tqdm import tqdm

from ...kernels import FLOATS
from .rows import MAIN_OP
from .run import bench, is_cuda, kernels_of, show
from .samplers import bench_samplers, show_samplers
from .sums import SUMS

EVERY = 1 << 7, 1 << 22  # sizes of every kernel: launch-bound, and out of the caches
SPREAD = *(1 << k for k in (7, 10, 14, 17, 20, 22, 24, 26)),  # of x' = a x + b s + c z
WIDTHS = 2, 3072


def updates(device, seed=0):
    """Lists of rows: every kernel at two sizes, the main form at all, in each dtype and width."""
    spread = SPREAD + (1 << 28,) * is_cuda(device)
    for name in kernels_of():
        for n in spread if name == MAIN_OP.name else EVERY:
            yield bench([name], None, [n], device=device, seed=seed)
    for dtype in FLOATS[1:]:
        yield bench([MAIN_OP.name], None, EVERY[1:], dtype, device, seed)
    for width in WIDTHS:
        yield bench([MAIN_OP.name], None, EVERY[1:], device=device, seed=seed, width=width)
    yield bench(SUMS, None, EVERY[1:], device=device, seed=seed)


def suite(device="cpu", seed=0):
    """Rows of updates and whole samplers."""
    rows = list(chain.from_iterable(tqdm(updates(device, seed), "updates", unit="size")))
    return rows + list(tqdm(bench_samplers(device), "samplers", unit="row"))


def show_all(rows):
    """Each kind of rows as its table."""
    parts = {kind: [r for r in rows if r["kind"] == kind] for kind in ("update", "sampler")}
    return "\n\n".join(f(parts[kind]) for kind, f in zip(parts, (show, show_samplers))
                       if parts[kind])

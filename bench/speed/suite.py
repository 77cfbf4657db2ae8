"""The whole bench: what `python -m minidiff bench` runs when nothing is asked for in
particular."""

from functools import partial
from itertools import chain

from tqdm import tqdm

from ...kernels import FLOATS
from .clock import is_cuda
from .rows import MAIN_OP
from .run import bench, kernels_of, show
from .samplers import bench_samplers, show_samplers
from .sums import SUMS

EVERY = 1 << 7, 1 << 22  # sizes of every kernel: launch-bound, and out of the caches
SPREAD = tuple(1 << k for k in (7, 10, 14, 17, 20, 22, 24, 26))  # of x' = a x + b s + c z
WIDTHS = 2, 3072


def updates(device, seed):
    """Lists of rows: every kernel at two sizes, the main form at all, in each dtype and
    width."""
    timed = partial(bench, device=device, seed=seed)
    for name in kernels_of():
        sizes = EVERY
        if name == MAIN_OP.name:
            sizes = SPREAD + (1 << 28,) * is_cuda(device)
        for n in sizes:
            yield timed([name], elements=[n])
    for dtype in FLOATS[1:]:
        yield timed([MAIN_OP.name], elements=EVERY[1:], dtype=dtype)
    for width in WIDTHS:
        yield timed([MAIN_OP.name], elements=EVERY[1:], width=width)
    yield timed(SUMS, elements=EVERY[1:])


def suite(device="cpu", seed=0):
    """Rows of updates and whole samplers."""
    rows = list(chain.from_iterable(tqdm(updates(device, seed), "updates", unit="size")))
    return rows + list(tqdm(bench_samplers(device), "samplers", unit="row"))


def show_all(rows):
    """Each kind of rows as its table."""
    tables = []
    for kind, show_kind in (("update", show), ("sampler", show_samplers)):
        found = [r for r in rows if r["kind"] == kind]
        if found:
            tables.append(show_kind(found))
    return "\n\n".join(tables)

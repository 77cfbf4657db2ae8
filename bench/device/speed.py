"""How fast: parts of the device check that measure a GPU."""

import time
from contextlib import contextmanager
from copy import copy
from functools import partial
from itertools import product
from statistics import median

import torch

from ...chunks import EVALUATIONS, NetScore, chunk_size
from ...families import FAMILIES
from ...kernels import Fused, bind, normal, on_cupy, on_triton, why_not
from ...kernels.check.compare import oracle
from ...kernels.check.words import raw
from ...net import ScoreNet
from ..speed.clock import once, waiter
from ..speed.rows import MAIN_OP
from ..speed.run import bench, call, case, kernels_of, race_of, show
from ..speed.run import why_not as lacks
from ..speed.samplers import bench_samplers, show_samplers
from ..speed.sums import SUMS
from .here import DEVICE, NAMES, SEED, captured, same, seconds, verdict
from .predicted import card_here, kept

PEERS = "torch_eager", "torch_inplace", "torch_compile"
ROUNDS = 5  # of a form and its other, in turn
SECONDS = .1  # of timing for each function: a GPU lent to one is quiet

COUNTED = """
extern "C" __global__ void products(u64 *out, int n) {
    u32 a = threadIdx.x, b = blockIdx.x, c = a ^ 7, d = b + 3;
    for (int i = 0; i < n; i++) {
        u64 p = (u64)a * 0xD2511F53u, q = (u64)c * 0xCD9E8D57u;
        a = (u32)(q >> 32) ^ b; b = (u32)q; c = (u32)(p >> 32) ^ d; d = (u32)p;
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = a ^ b ^ c ^ d;
}
extern "C" __global__ void specials(float *out, int n) {
    float a = threadIdx.x + 1.f, b = a + .5f, c = a + .25f, d = a + .125f;
    for (int i = 0; i < n; i++) { a = __sinf(a); b = __sinf(b); c = __sinf(c); d = __sinf(d); }
    out[blockIdx.x * blockDim.x + threadIdx.x] = a + b + c + d;
}
"""


def rates(elements=2**29):
    """Copy and fill, bytes a second; 64-bit products and special functions a second."""
    a = torch.randn(elements, device=DEVICE)
    b = torch.empty_like(a)
    found = {"copy_gb_per_s": 2 * a.nbytes / seconds(lambda: b.copy_(a)) / 1e9,
             "fill_gb_per_s": a.nbytes / seconds(lambda: b.fill_(1.)) / 1e9}
    if why_not("cupy"):
        return {"passed": None, "reason": f"cupy: {why_not('cupy')}", **found}
    blocks, n = 132 * 16, 4096
    out = torch.empty(blocks * on_cupy.THREADS, dtype=torch.int64, device="cuda")
    for name, each in (("products", 2), ("specials", 4)):
        time_ = seconds(lambda name=name: raw(COUNTED, name, blocks, out, n))
        found[f"{name}_per_s"] = each * n * len(out) / time_
    return {"passed": True, **found}


def timing(limit=180):
    """Kinds of update and sums against the peers, gate first; what is not begun within
    `limit` seconds is named. The largest arrays come last: NumPy takes seconds for each."""
    main, found, left = ["normal", MAIN_OP.name], [], []
    rest = [name for name in kernels_of() if name not in main]
    sizes_of = ((main, [1 << 20, 1 << 26]), (SUMS, [1 << 26]), (rest, [1 << 26]),
                ((*main, *SUMS), [1 << 28]))
    work = [(op, dtype, elements) for ops, sizes in sizes_of
            for dtype in ("float32", "bfloat16") for op in ops for elements in sizes]
    end = time.perf_counter() + limit
    for op, dtype, elements in work:
        if time.perf_counter() > end:
            left.append([op, dtype, elements])
            continue
        names = [*NAMES, *(peer for peer in (*PEERS, "torch_random", "cupy_expr", "curand")
                           if not lacks(peer, op, dtype, "cuda"))]
        rows = bench([op], names, [elements], dtype, "cuda", seconds=SECONDS)
        print(show(rows), flush=True)
        found += rows
    return {"passed": True, "left": left, "rows": found}


def keys(elements=1 << 26):
    """Nanoseconds an element of normal and langevin with one seed, and with one a row:
    rows of 1024 and of 64, some of them held to NumPy's."""
    good, times = {}, {}
    for name, dtype, width in product(NAMES, ("float32", "bfloat16"), (1024, 64)):
        shape = elements // width, width
        u = [torch.randn(shape, device=DEVICE).to(getattr(torch, dtype)) for _ in "xs"]
        seeds = torch.randint(-2**63, 2**63 - 1, shape[:1], device=DEVICE)
        for op, operands, coef in (("normal", [], [1.]), ("langevin", u, [1., .05, .3])):
            out = torch.empty_like(u[0])
            one, each = (partial(bind(operands, coef, seed=seed, out=out, backend=name), 0)
                         for seed in (SEED, seeds))
            took = [(seconds(one), seconds(each)) for _ in range(ROUNDS)]
            one, each = (median(column) / elements * 1e9 for column in zip(*took))
            case = f"{name} {op} {dtype} {width}"
            times[case] = {"ns": one, "keys_ns": each, "ratio": each / one}
            print(f"{case:<32}{one:>8.4f} ns{each:>8.4f} with a seed a row{each / one:>7.3f}")
            end = slice(-100, None)
            want = oracle([v[end].cpu() for v in operands], coef, out[end].cpu(),
                          seed=seeds[end].cpu())
            good[case] = same(out[end], want)
    return verdict(good, times=times)


def launches(calls=20):
    """A small update, 2^20 elements: microseconds of the host to launch it, and of the
    device in a graph of many. All take turns: who is first, while the processor wakes up,
    would seem the slowest."""
    functions = {}
    for name in (*NAMES, *PEERS):
        work, coef, _ = case(MAIN_OP, 1 << 20, "float32", DEVICE)
        functions[name] = call(name, work, coef)
    host = {name: [] for name in functions}
    for _ in range(ROUNDS + 1):  # of the first nothing is kept
        for name, f in functions.items():
            host[name].append(once(f, lambda: None, 200) * 1e6)
            waiter(DEVICE)()
    found = {name: {"host_us": median(times[1:]),
                    "device_us": seconds(captured(functions[name], calls)) / calls * 1e6}
             for name, times in host.items()}
    for name, took in found.items():
        print(f"{name:<16}{took['host_us']:>8.1f} us of the host"
              f"{took['device_us']:>8.1f} us of the device")
    return {"passed": True, **found}


def in_graph(op, dtype, backend, elements, width=1024):
    """A row of an update or sum in a CUDA graph, where the host does not count: seconds,
    those predicted or None, and the share of a copy's rate; or why it failed."""
    row = {"op": op, "dtype": dtype, "backend": backend, "elements": elements, "width": width}
    try:
        race = race_of(op, [backend], elements, dtype=dtype, device=DEVICE, width=width)
        entrant, = race.entrants.values()
        calls = max(1, (1 << 28) // elements)  # the start of a graph takes as long as some
        source = race.out.clone()
        took = seconds(captured(entrant.call, calls)) / calls
        copied = seconds(captured(lambda: race.out.copy_(source), calls)) / calls
    except Exception as e:  # one that fails must not lose the others
        row["reason"] = f"{type(e).__name__}: {e}".splitlines()[0]
        print(*row.values(), flush=True)
        return row
    each = kept(card_here()).get((op, dtype, backend))
    rate = 2 * race.out.nbytes / copied
    row |= {"seconds": took, "predicted": each and each * elements,
            "of_copy": entrant.bytes / took / rate}
    before = f"{row['predicted'] * 1e6:.1f}" if each else "-"
    print(f"{op:<20}{dtype:<10}{backend:<8}{elements:>10}{width:>6}{took * 1e6:>10.1f} us"
          f"{before:>10} predicted{row['of_copy']:>7.2f} of copy", flush=True)
    return row


def until(end, work, f):
    """A part's result: rows of f(*one) for each of the work that begins before `end`, on
    time's own clock; what is left of it is named."""
    rows, left = [], []
    for one in work:
        if time.perf_counter() > end:
            left.append(one)
        else:
            rows.append(f(*one))
    return {"passed": not any("reason" in row for row in rows), "left": left, "rows": rows}


def in_graphs(limit=100, sizes=(1 << 28, 1 << 20)):
    """Each kind of update and sum in CUDA graphs, as `in_graph` says; the largest first."""
    work = [(op, dtype, backend, elements) for elements in sizes
            for op in (*SUMS, *kernels_of()) for dtype in ("float32", "bfloat16")
            for backend in NAMES]
    return until(time.perf_counter() + limit, work, in_graph)


# quads of a program and its warps; packs a thread and threads of a block
TILES = (1024, 4), (512, 4), (512, 2), (2048, 8), (1024, 8)
BLOCKS = (8, 256), (4, 256), (2, 256), (8, 128), (8, 512)
VARIANTS = [("triton", {"QUADS": quads, "WARPS": warps}) for quads, warps in TILES]
VARIANTS += [("cupy", {"PACKS": packs, "THREADS": threads}) for packs, threads in BLOCKS]


def variants(limit=90, elements=1 << 28, ops=("normal", "langevin", "norms", "dsm_loss")):
    """Other sizes of a program than those in use, which come first, as `in_graph` says."""
    modules = {"triton": on_triton, "cupy": on_cupy}

    def variant(backend, sizes, op, dtype):
        with set_to(modules[backend], sizes):  # of rows for which all of them differ
            return in_graph(op, dtype, backend, elements, width=2048) | sizes
    work = [(*of, op, dtype) for op in ops for dtype in ("float32", "bfloat16")
            for of in VARIANTS]
    return until(time.perf_counter() + limit, work, variant)


@contextmanager
def set_to(module, values):
    """Meanwhile a backend's constants are these; what was compiled with others is
    forgotten."""
    before = {name: getattr(module, name) for name in values}

    def put(given):
        vars(module).update(given)
        on_cupy.compiled.cache_clear()
    put(values)
    try:
        yield
    finally:
        put(before)


def loops():
    """Whole samplers a step, in a graph and not, beside diffusers."""
    grid = [("lean", (2,), 1), ("lean", (1, 8, 8), 64), ("lean", (3, 32, 32), 64)]
    rows = [*bench_samplers(DEVICE, grid)]
    print(show_samplers(rows))
    return {"passed": True, "rows": rows}


def whole_samplers(shape=(1, 8, 8)):
    """Every family, network and updates, in one CUDA graph: the bits of its loop
    uncaptured; and milliseconds of either. The network has weights that nobody trained, and
    it is the demo's chunk."""
    torch.manual_seed(0)
    net = ScoreNet(shape).to(DEVICE).eval().requires_grad_(False)
    torch.nn.init.normal_(net.F_x.out.weight, std=.02)
    z = normal((chunk_size(shape), *shape), device=DEVICE, seed=SEED)
    good, times = {}, {}
    for name, family in FAMILIES.items():
        if name == "pf_ode_adaptive":  # SciPy's loop: its steps depend on what they find
            continue
        score, states = NetScore(net), []
        n = EVALUATIONS.get(name, 80)
        engine = Fused(SEED)
        *_, want = family(score, z, n, engine)

        def run(family=family, score=score, n=n, engine=engine):
            *_, x = family(score, z, n, copy(engine))  # uploads nothing: a graph may capture it
            return x
        graph = captured(lambda run=run, states=states: states.append(run()))
        graph()
        good[name] = same(states[-1], want)
        times[name] = {"evaluations": score.evaluations // 3, "ms": seconds(run, 5) * 1e3,
                       "graph_ms": seconds(graph, 5) * 1e3}
    return verdict(good, times=times)

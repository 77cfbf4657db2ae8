"""Gate, then clock: medians of one interleaved run, contract backends beside peers."""

import statistics
import time
from functools import partial

import numpy as np

from ..kernels import BACKENDS, OPS, Fused, dsm_loss, missing, update
from ..langevin import langevin_step
from ..solvers import snr_step_size
from .check import CLIP, check_op, check_sums
from .machine import machine
from .peers import PEERS, composed_loss, eager_corrector

ELEMENTS = 1 << 20, 1 << 22, 1 << 24
SECONDS = 1.5  # of timing for each row, about


def shape_of(elements):
    """(n / 1024, 1024), one row below 1024."""
    return (elements // 1024, 1024) if elements >= 1024 else (1, elements)


def candidates(names, device):
    """Contract backends and peers by name; by default those that start at once."""
    known = [*BACKENDS, *PEERS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--backend {name}: none of {', '.join(known)}")
        if name in BACKENDS and missing(name):
            raise RuntimeError(f"backend {name!r}: {missing(name)}")
    cuda = str(device).startswith("cuda")
    here = [n for n in (("torch", "triton", "cupy") if cuda else ("host", "torch"))
            if not missing(n)]
    return list(names or [*here, "torch_eager", "torch_inplace"])


def case(op, elements, dtype, device, seed=0):
    """(coefficients, operands, out, parameters) of an op at a size, as torch tensors."""
    import torch
    rng, shape = np.random.default_rng(seed), shape_of(elements)
    u = [torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in op.operands]
    out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    p = op.parameters(rng)
    return op.coefficients(CLIP if op.denoise else None, **p), u, out, p


def call(name, coef, u, out):
    """A function of no arguments that does one update into out."""
    if name in BACKENDS:
        return partial(update, u, coef, out=out, backend=name)
    return PEERS[name](*split(coef, u), u, out)


def split(coef, u):
    """(the sum's coefficients, the clip stage's p0, p1, lo, hi or None) as lists."""
    coef = coef.tolist()
    return (coef[:-4], coef[-4:]) if len(coef) - len(u) > 3 else (coef, None)


def gate(op, name, dtype):
    """None for a peer that draws its own noise, else whether the bits or values are right."""
    import torch
    if name in BACKENDS:
        return all(row["passed"] for row in check_op(op, name, (dtype,), [(37, 1024), (5, 33)]))
    coef, u, out, _ = case(op, 1 << 12, dtype, "cpu")
    z = torch.randn_like(out)
    coef, clip = split(coef, u)
    got = PEERS[name](coef, clip, u, out, z)().double()
    v = [t.double() for t in (*u, z)]
    if clip is not None:
        v[1] = (clip[0] * v[0] + clip[1] * v[1]).clamp(*clip[2:])
    terms = [c_k * v_k for c_k, v_k in zip(coef, v)]
    # each of at most 2n roundings, to the storage dtype, moves the sum by eps of its terms
    bound = 2 * len(terms) * torch.finfo(out.dtype).eps * sum(t.abs() for t in terms)
    if not ((got - sum(terms)).abs() <= bound).all():
        raise RuntimeError(f"peer {name} computes another {op.name} than the reference")
    return None if op.noise else True


def clock(functions, device, seconds=SECONDS):
    """{name: times}: every function in turn, again and again, each synchronised; a round
    starts one further on, so that none always follows the same neighbour."""
    import torch
    wait = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    times, order = {name: [] for name in functions}, list(functions)
    for f in functions.values():
        f()
        f()
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 7:
        for name in order:
            wait()
            start = time.perf_counter()
            functions[name]()
            wait()
            times[name].append(time.perf_counter() - start)
        order.append(order.pop(0))
    return times


def sums_case(op, elements, dtype, device):
    """(a function that makes a backend's call, eager call, bytes, s, coef of dsm_loss)."""
    import torch
    shape = shape_of(elements)
    x, s = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in "xs")
    coef = torch.rand((shape[0], 3), device=device)
    if op == "dsm_loss":
        return lambda name: partial(dsm_loss, s, coef, backend=name), \
            partial(composed_loss, s, coef), 2 * s.nbytes, s, coef
    return lambda name: partial(Fused(backend=name).correct, langevin_step, snr_step_size, x, s, 0,
                                0), partial(eager_corrector, x, s), 4 * s.nbytes, s, coef


def bench_sums(op, backends=None, elements=None, dtype="float32", device="cpu", own=None):
    """As bench, for `dsm_loss` (value and gradient) and `corrector` (norms, then the step)."""
    rows = []
    names = [n for n in candidates(backends, device) if n in BACKENDS]
    for name in names:
        if not all(row["passed"] for row in check_sums(name, dtypes=(dtype,), shapes=[(37, 1024)])):
            raise RuntimeError(f"{op}: {name} does not return the reference's sums; nothing was "
                               "timed")
    for n in elements or ELEMENTS:
        make, eager, size, s, coef = sums_case(op, n, dtype, device)
        functions = {name: make(name) for name in names} | {"torch_eager": eager}
        if own and op in own.functions:
            functions[own.file] = own.bind(op, [s], coef, {})
        times = clock(functions, device)
        median = {name: statistics.median(t) for name, t in times.items()}
        for name, seconds in median.items():
            contract = name != "torch_eager"
            rows.append({"op": op, "backend": name, "dtype": dtype, "elements": n,
                         "seconds": seconds, "bytes": size, "gb_per_s": size / seconds / 1e9,
                         "fraction_of_copy": None, "matches_reference": contract or None,
                         "machine": machine(), "speedup":
                         {"torch_eager": median["torch_eager"] / seconds} if contract else {}})
    return rows


def bench(ops, backends=None, elements=None, dtype="float32", device="cpu", seed=0, own=None):
    """Rows: op, backend, dtype, elements, seconds (median), quartiles, bytes, gb_per_s,
    fraction_of_copy, matches_reference, speedup over each peer. own: a user's kernels (own.Own),
    timed beside the rest. RuntimeError on a red gate."""
    rows, here = [], machine()
    wrong = [row for row in own.check((dtype,), seed) if not row["passed"]] if own else ()
    if wrong:
        raise RuntimeError(f"{own.file}: {wrong[0]['op']} does not return the reference's bits, "
                           "nothing was timed; see check --kernel")
    for name in (name for name in ops if name not in OPS):
        rows += bench_sums(name, backends, elements, dtype, device, own)
    for op in (OPS[name] for name in ops if name in OPS):
        names = candidates(backends, device)
        matches = {name: gate(op, name, dtype) for name in names}
        red = [name for name, ok in matches.items() if ok is False]
        if red:
            raise RuntimeError(f"{op.name}: {', '.join(red)} does not return the reference's "
                               "bits; nothing was timed")
        for n in elements or ELEMENTS:
            c, u, out, p = case(op, n, dtype, device, seed)
            size = out.numel() * out.element_size()
            functions = {name: call(name, c, u, out) for name in names}
            if own and op.name in own.functions:
                functions[own.file] = own.bind(op.name, u or [out], c, p)
            copied = out.clone()
            times = clock(functions | {"copy": lambda a=copied, b=out: a.copy_(b)}, device)
            copy_rate = 2 * size / statistics.median(times.pop("copy"))
            median = {name: statistics.median(t) for name, t in times.items()}
            for name in times:
                low, _, high = statistics.quantiles(times[name], n=4)
                rate = size * (len(u) + 1) / median[name]
                rows.append({
                    "op": op.name, "backend": name, "dtype": dtype, "elements": out.numel(),
                    "seconds": median[name], "quartiles": [low, high],
                    "bytes": size * (len(u) + 1), "gb_per_s": rate / 1e9,
                    "fraction_of_copy": rate / copy_rate,
                    "matches_reference": matches.get(name, True),
                    "machine": here, "speedup": {p: median[p] / median[name] for p in names
                                if p in PEERS and name not in PEERS}})
    return rows


def show(rows):
    """The rows as a table; a speedup is over a peer, never over another backend."""
    lines = [f"{'op':<18}{'backend':<15}{'dtype':<10}{'elements':>10}{'ns/element':>11}"
             f"{'GB/s':>7}{'of copy':>8}  bits   speedup over"]
    for r in rows:
        bits = {True: "same", None: "-"}[r["matches_reference"]]
        over = ", ".join(f"{p} {v:.1f}x" for p, v in r["speedup"].items())
        lines.append(f"{r['op']:<18}{r['backend']:<15}{r['dtype']:<10}{r['elements']:>10}"
                     f"{r['seconds'] / r['elements'] * 1e9:>11.2f}{r['gb_per_s']:>7.1f}"
                     f"{r['fraction_of_copy'] or float('nan'):>8.2f}  {bits:<6} {over}")
    return "\n".join(lines)

"""Gate, then clock: medians of one interleaved run, contract backends beside peers."""

import statistics
import time
from functools import partial

import numpy as np

from ..kernels import BACKENDS, OPS, coefficients, missing, update
from .check import check_op
from .machine import machine
from .peers import PEERS

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
    """(coefficients, operands, out) of an op at a size, as torch tensors."""
    import torch
    rng, shape = np.random.default_rng(seed), shape_of(elements)
    u = [torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in op.operands]
    out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    return coefficients(op.step, **op.parameters(rng)), u, out


def call(name, c, u, out):
    """A function of no arguments that does one update into out."""
    if name in BACKENDS:
        return partial(update, u, c, out=out, backend=name)
    return PEERS[name](c.tolist(), u, out)


def gate(op, name, dtype):
    """None for a peer that draws its own noise, else whether the bits or values are right."""
    import torch
    if name in BACKENDS:
        return all(row["passed"] for row in check_op(op, name, (dtype,), [(37, 1024), (5, 33)]))
    c, u, out = case(op, 1 << 12, dtype, "cpu")
    z = torch.randn_like(out)
    got = PEERS[name](c.tolist(), u, out, z)().double()
    terms = [c_k * v.double() for c_k, v in zip(c, [*u, z])]
    # each of at most 2n roundings, to the storage dtype, moves the sum by eps of its terms
    bound = 2 * len(terms) * torch.finfo(out.dtype).eps * sum(t.abs() for t in terms)
    if not ((got - sum(terms)).abs() <= bound).all():
        raise RuntimeError(f"peer {name} computes another {op.name} than the reference")
    return None if op.noise else True


def clock(functions, device, seconds=SECONDS):
    """{name: times}: every function in turn, again and again, each synchronised."""
    import torch
    wait = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    times = {name: [] for name in functions}
    for f in functions.values():
        f()
        f()
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 7:
        for name, f in functions.items():
            wait()
            start = time.perf_counter()
            f()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def bench(ops, backends=None, elements=None, dtype="float32", device="cpu", seed=0):
    """Rows: op, backend, dtype, elements, seconds (median), quartiles, bytes, gb_per_s,
    fraction_of_copy, matches_reference, speedup over each peer. RuntimeError on a red gate."""
    rows, here = [], machine()
    for op in (OPS[name] for name in ops):
        names = candidates(backends, device)
        matches = {name: gate(op, name, dtype) for name in names}
        red = [name for name, ok in matches.items() if ok is False]
        if red:
            raise RuntimeError(f"{op.name}: {', '.join(red)} does not return the reference's "
                               "bits; nothing was timed")
        for n in elements or ELEMENTS:
            c, u, out = case(op, n, dtype, device, seed)
            size = out.numel() * out.element_size()
            functions = {name: call(name, c, u, out) for name in names}
            copied = out.clone()
            times = clock(functions | {"copy": lambda a=copied, b=out: a.copy_(b)}, device)
            copy_rate = 2 * size / statistics.median(times.pop("copy"))
            median = {name: statistics.median(t) for name, t in times.items()}
            for name in names:
                low, _, high = statistics.quantiles(times[name], n=4)
                rate = size * (len(u) + 1) / median[name]
                rows.append({
                    "op": op.name, "backend": name, "dtype": dtype, "elements": out.numel(),
                    "seconds": median[name], "quartiles": [low, high],
                    "bytes": size * (len(u) + 1), "gb_per_s": rate / 1e9,
                    "fraction_of_copy": rate / copy_rate, "matches_reference": matches[name],
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
                     f"{r['fraction_of_copy']:>8.2f}  {bits:<6} {over}")
    return "\n".join(lines)

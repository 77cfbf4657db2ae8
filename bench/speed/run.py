"""Gate, then clock: medians of one interleaved run, contract backends beside peers."""

from dataclasses import replace
from functools import partial

import numpy as np

from ...kernels import BACKENDS, OPS, bind, missing
from ...kernels.check import CLIP, COUNTER, check_op
from ...kernels.check.compare import CHUNK, expected_update, require_same
from ..peers import PEERS
from ..peers.schedulers import SCHEDULERS
from ..peers.schedulers import check as check_scheduler
from .clock import SECONDS
from .rows import ELEMENTS, add_speedups, label, row_of, shape_of
from .sums import bench_sums
from .timed import (
    AFTER,
    refresh,
    require_possible,
    times_of,
    yardsticks,
)
from .work import Work


def kernels_of():
    """An op for each machine code, the others differ in coefficients, and each op that a
    scheduler of diffusers computes."""
    first, ops = {}, OPS.values()
    for op in ops:
        first.setdefault((len(op.operands), op.noise, op.denoise is None), op.name)
    return [op.name for op in ops if op.name in first.values() or op.step in SCHEDULERS]


def is_cuda(device):
    """Whether a device's name is a GPU's."""
    return str(device).startswith("cuda")


def candidates(names, device):
    """Contract backends and peers by name; by default the compiled ones and every peer."""
    known = [*BACKENDS, *PEERS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--backend {name}: none of {', '.join(known)}")
        if name in BACKENDS and missing(name):
            raise RuntimeError(f"backend {name!r}: {missing(name)}")
    fast = ("triton", "cupy") if is_cuda(device) else ("host",)
    here = [n for n in fast if not missing(n)] or ["torch"]
    return list(names or [*here, *PEERS])


def lacks(name, op, dtype, device):
    """Why a peer is not measured here, or None."""
    return PEERS[name].lacks(op, dtype, is_cuda(device)) if name in PEERS else None


def case(op, elements, dtype, device, seed=0, width=1024):
    """(a peer's Work, coefficients, parameters) of an op at a size, as torch tensors."""
    import torch
    rng, shape = np.random.default_rng(seed), shape_of(elements, width)
    random = torch.Generator(device).manual_seed(seed)
    u = [torch.randn(shape, device=device, generator=random).to(getattr(torch, dtype))
         for _ in op.operands]
    out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    p = op.parameters(rng)
    coef = op.coefficients(CLIP if op.denoise else None, **p)
    n = len(u) + op.noise
    c, clip = coef[:n].astype(np.float32).tolist(), coef[n:].astype(np.float32).tolist()
    return Work(op, c, clip or None, u, out), coef, p


def call(name, work, coef):
    """A function that does one update into work.out, made once: a backend's, or a peer's."""
    if name in BACKENDS:
        return partial(bind(work.u, coef, out=work.out, backend=name), 0)
    return PEERS[name].make(work)


def gate(op, name, dtype):
    """Whether a contract backend returns the reference's bits."""
    return all(row["passed"] for row in check_op(op, name, (dtype,), [(37, 1024), (5, 33)]))


def check_peer(name, f, work):
    """RuntimeError unless a peer computes the reference's update of an explicit z; None where it
    then draws its own, else True."""
    import torch
    if PEERS[name].make.__name__ == "diffusers":
        check_scheduler(work.op.step, [t[:4] for t in work.u])
        return None if work.noise else True
    z = torch.randn_like(work.out) if work.noise else None
    result = f(z)
    eps = torch.finfo(result.dtype).eps
    at_once = max(1, (CHUNK << 8 * result.is_cuda) // max(1, result[:1].numel()))
    for start in range(0, len(result), at_once):
        rows = slice(start, start + at_once)
        v = [t[rows].double() for t in work.u]
        if work.clip is not None:
            v[1] = (work.clip[0] * v[0] + work.clip[1] * v[1]).clamp(*work.clip[2:])
        v += [] if z is None else [z[rows].double()]
        terms = [c_k * v_k for c_k, v_k in zip(work.c, v)]
        # each of at most 2n roundings, to the storage dtype, moves the sum by eps of its terms
        bound = 2 * len(terms) * eps * sum(t.abs() for t in terms)
        if not ((result[rows].double() - sum(terms)).abs() <= bound).all():
            raise RuntimeError(f"peer {name} computes another {work.op.name} than the reference")
    return None if work.noise else True


def moved(name, work):
    """Bytes that a form reads and writes, its random numbers' own writing included."""
    size = work.out.numel() * work.out.element_size()
    if name in PEERS:
        return size * (PEERS[name].passes(work) + work.noise * (name != "torch_compile"
                                                                   or not work.out.is_cuda))
    return size * (len(work.u) + 1)


def mine(own, op, work, coef, parameters):
    """A user's function on operands of its own, which it may overwrite, checked whole."""
    if op.name == "normal" and own.takes_z("normal"):
        raise ValueError(f"{own.file}: a normal that is given z has nothing to do; draw it from "
                         "seed, sample, step and tag")
    call = own.bind(op.name, [u.clone() for u in work.u] or [work.out.clone()], coef, parameters)
    own.require(op.name, call, [expected_update(op, work.u, coef, work.out, **COUNTER)])
    return call


def peers_given_z(names, op, work, dtype, device):
    """The work with z as one more operand, {(name, True): call} of the peers that take it. It has
    the operands' dtype, where a user's kernel needs float32 for its bits, and reads more."""
    import torch
    z = torch.randn_like(work.out)
    given = replace(work, u=[*work.u, z])
    here = [n for n in names if n in PEERS and n != "diffusers" and not lacks(n, op, dtype, device)]
    calls = {n: PEERS[n].make(given) for n in here}
    for name, f in calls.items():
        check_peer(name, f, given)
    return given, {(name, True): f for name, f in calls.items()}


def check_after(op, work, coef, ours, own, user, seed):
    """RuntimeError unless all that was timed still computes, of fresh data in its own memory."""
    refresh(work.u, seed + 1)
    want = expected_update(op, work.u, coef, work.out, step=1)
    for name, f in ours.items():
        work.out.fill_(float("nan"))
        require_same(op.name, name, [f(1)], [want], AFTER)
    if user:
        own.renew(user, op.name, work.u or [work.out], 1)
        want = expected_update(op, work.u, coef, work.out, **COUNTER | {"step": 1})
        own.require(op.name, user, [want], AFTER)


def bench_one(op, names, matches, elements, dtype, device, seed=0, own=None, width=1024,
              seconds=SECONDS):
    """Rows of an op at one size: all are checked on the very tensors that are then timed."""
    work, coef, p = case(op, elements, dtype, device, seed, width)
    ours, functions, found, refused, user = {}, {}, dict(matches), {}, None
    want = expected_update(op, work.u, coef, work.out) if matches else None
    for name in names:
        if reason := lacks(name, op, dtype, device):
            refused[name] = reason
        elif name in PEERS:
            functions[name, False] = PEERS[name].make(work)
            found[name] = check_peer(name, functions[name, False], work)
        else:
            ours[name] = bind(work.u, coef, out=work.out, backend=name)
            functions[name, False] = partial(ours[name], 0)
            work.out.fill_(float("nan"))
            require_same(op.name, name, [ours[name](0)], [want])
    copied, fills = work.out.clone(), set()
    works = {False: work}
    extra = {"copy": lambda: work.out.copy_(copied)}
    if own and op.name in own.functions:
        user, given = mine(own, op, work, coef, p), own.takes_z(op.name)
        functions[own.file, given] = own.timed(user)
        arrays = len(work.u) + 1 + given
        extra |= yardsticks(work.out, arrays)
        if given:
            works[True], calls = peers_given_z(names, op, work, dtype, device)
            functions |= calls
    if op.noise:
        fills = {PEERS[n].fill for n, _ in functions if n in PEERS}
        extra |= {f: f(work.out) for f in fills}
    times = times_of(functions | extra, device, seconds)
    check_after(op, work, coef, ours, own, user, seed)
    rows = [row_of(op.name, n, dtype, work.out.shape, reason=r) for n, r in refused.items()]
    for name, given in functions:
        row = update_row(name, works[given], times, dtype, given)
        row["matches_reference"] = True if given else found.get(name, True)
        if user and name == own.file:
            writes = not works[given].u
            size = work.out.numel() * work.out.element_size()
            require_possible(op.name, name, times[name, given], row["bytes"], writes, size, arrays,
                             times)
        rows.append(row)
    return add_speedups(rows)


def update_row(name, work, times, dtype, given):
    """A row of one form: what it moved, how fast, beside the copy; a peer's predicted time."""
    t, size = times[name, given], work.out.numel() * work.out.element_size()
    copy_rate = 2 * size / times["copy"]["seconds"]
    bytes_ = moved(name, work)
    if given and name not in PEERS:
        bytes_ += 4 * work.out.numel() - size  # its z is float32
    row = row_of(work.op.name, name, dtype, work.out.shape, **t, bytes=bytes_, given_z=given,
                 gb_per_s=bytes_ / t["seconds"] / 1e9,
                 fraction_of_copy=bytes_ / t["seconds"] / copy_rate,
                 copy_gb_per_s=copy_rate / 1e9)
    if name in PEERS:
        drawn = times[PEERS[name].fill]["seconds"] if work.noise else 0.
        row["predicted_seconds"] = PEERS[name].passes(work) * size / copy_rate + drawn
    return row


def bench(ops, backends=None, elements=None, dtype="float32", device="cpu", seed=0, own=None,
          width=1024, seconds=SECONDS):
    """Rows: op, backend, dtype, elements, seconds (median), quartiles, bytes, gb_per_s,
    fraction_of_copy, matches_reference, speedup over each peer; of a peer also its predicted
    seconds. own: a user's kernels (own.Own), timed beside the rest. RuntimeError on a red gate."""
    wrong = [row for row in own.check((dtype,), seed) if not row["passed"]] if own else ()
    if wrong:
        raise RuntimeError(f"{own.file}: {wrong[0]['op']} does not return the reference's bits, "
                           "nothing was timed; see check --kernel")
    names, rows = candidates(backends, device), []
    for name in (name for name in ops if name not in OPS):
        rows += bench_sums(name, names, elements, dtype, device, own, seed, seconds)
    for op in (OPS[name] for name in ops if name in OPS):
        for name in backends or ():
            if reason := lacks(name, op, dtype, device):
                raise RuntimeError(f"peer {name!r}: {reason}")
        matches = {name: gate(op, name, dtype) for name in names if name in BACKENDS}
        if red := [name for name, good in matches.items() if not good]:
            raise RuntimeError(f"{op.name}: {', '.join(red)} does not return the reference's "
                               "bits; nothing was timed")
        for n in elements or ELEMENTS:
            rows += bench_one(op, names, matches, n, dtype, device, seed, own, width,
                              seconds)
    return rows


def show(rows):
    """Rows of updates as a table; what was not measured, and why, below it."""
    wide = max([15, *(len(label(r)) + 1 for r in rows)])
    lines = [f"{'op':<16}{'backend':<{wide}}{'dtype':<9}{'elements':>10}{'width':>6}"
             f"{'ns/element':>11}{'GB/s':>7}{'of copy':>8}{'predicted':>10}  bits  speedup over"]
    number = lambda v, form: format(v, form) if v is not None else "-"
    for r in (r for r in rows if r["seconds"]):
        n, bits = r["elements"], {True: "same", None: "-"}[r["matches_reference"]]
        over = ", ".join(f"{p} {v:.1f}x" for p, v in r["speedup"].items())
        predicted = r["predicted_seconds"] and r["predicted_seconds"] / n * 1e9
        lines.append(f"{r['op']:<16}{label(r):<{wide}}{r['dtype']:<9}{n:>10}"
                     f"{r['shape'][-1]:>6}{r['seconds'] / n * 1e9:>11.2f}"
                     f"{number(r['gb_per_s'], '.1f'):>7}"
                     f"{number(r['fraction_of_copy'], '.2f'):>8}{number(predicted, '.2f'):>10}"
                     f"  {bits:<5} {over}".rstrip())
    not_here = dict.fromkeys(f"not measured: {r['backend']}, {r['op']}: {r['reason']}"
                             for r in rows if not r["seconds"])
    return "\n".join([*lines, *not_here])

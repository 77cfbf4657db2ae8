"""Gate, then clock: medians of one interleaved run, contract backends beside peers."""

import secrets
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ... import kernels
from ...kernels import BACKENDS, OPS, bind
from ...kernels.check import check_op, check_sums
from ...kernels.check.cases import CLIP, COUNTER
from ...kernels.check.compare import expected_update
from ...kernels.check.yours import apart
from ..peers import PEERS
from ..peers.schedulers import SCHEDULERS
from .clock import SECONDS, is_cuda
from .rows import ELEMENTS, label, measured, not_measured, over, row_of, shape_of
from .state import state, warning
from .sums import FORMS, sums_race
from .timed import ALWAYS, Entrant, Race
from .work import Work, is_sum


def kernels_of():
    """An op for each machine code, the others differ in coefficients, and each op that a
    scheduler of diffusers computes."""
    found, seen = [], set()
    for op in OPS.values():
        code = len(op.operands), op.noise, op.denoise is None
        if code not in seen or op.step in SCHEDULERS:
            found.append(op.name)
        seen.add(code)
    return found


def candidates(names, device):
    """Contract backends and peers by name; by default the compiled ones and every peer."""
    if not names:
        fast = ("triton", "cupy") if is_cuda(device) else ("host",)
        here = [name for name in fast if not kernels.why_not(name)]
        return [*(here or ["torch"]), *PEERS]
    known = [*BACKENDS, *PEERS]
    for name in names:
        if name not in known:
            raise ValueError(f"--backend {name}: none of {', '.join(known)}")
        if name in BACKENDS and kernels.why_not(name):
            raise RuntimeError(f"backend {name!r}: {kernels.why_not(name)}")
    return list(names)


def why_not(name, op, dtype, device):
    """Why a peer does not compute an op here, or None."""
    if name not in PEERS:
        return None
    if op in FORMS and (name, False) not in FORMS[op]:
        return f"it has no form of {op}"
    return PEERS[name].why_not(OPS.get(op), dtype, is_cuda(device))


def case(op, elements, dtype, device, seed=0, width=1024):
    """(a peer's Work, coefficients, parameters) of an op at a size, as torch tensors."""
    shape, kind = shape_of(elements, width), getattr(torch, dtype)
    random = torch.Generator(device).manual_seed(seed)
    u = [torch.randn(shape, device=device, generator=random).to(kind) for _ in op.operands]
    out = torch.empty(shape, dtype=kind, device=device)
    parameters = op.parameters(np.random.default_rng(seed))
    coef = op.coefficients(CLIP if op.denoise else None, **parameters)
    numbers = coef.astype(np.float32).tolist()
    n = len(u) + op.noise
    return Work(op, numbers[:n], numbers[n:] or None, u, out), coef, parameters


def call(name, work, coef):
    """A function that does one update into work.out, made once: a backend's, or a
    peer's."""
    if name in BACKENDS:
        return partial(bind(work.u, coef, out=work.out, backend=name), 0)
    return PEERS[name].make(work)


def gate(op, name, dtype):
    """Whether a contract backend returns the reference's bits, or its sums."""
    if op in OPS:
        rows = check_op(OPS[op], name, (dtype,), [(37, 1024), (5, 33)])
    else:
        rows = check_sums(name, dtypes=(dtype,), shapes=[(37, 1024)])
    return all(row["passed"] for row in rows)


def user_gate(user_kernels, dtype):
    """RuntimeError unless a user's kernels pass check, of cases that nobody knows, and can
    be timed here."""
    for row in apart.check(user_kernels.files, user_kernels.ops, (dtype,),
                           secrets.randbits(32), near=user_kernels.near):
        if row["passed"] is False:
            raise RuntimeError(f"{row['backend']}: {row['op']} does not return the reference's "
                               f"bits, nothing was timed; see check --kernel ({row['reason']})")
    if user_kernels.interpreted:
        raise RuntimeError(f"{', '.join(user_kernels.files)}: right in Triton's interpreter, "
                           "whose time says nothing; nothing was timed without a GPU")


def check_peer(name, f, work):
    """RuntimeError unless a peer computes the reference's update of an explicit z; None
    where it then draws its own, else True."""
    known = None if work.noise else True
    if PEERS[name].check:
        PEERS[name].check(replace(work, u=[t[:4] for t in work.u]))
        return known
    z = [torch.randn_like(work.out)] * work.noise
    result = f(*z)
    if not isinstance(result, torch.Tensor):  # JAX's
        result = torch.from_dlpack(result)
    # each of at most 2n roundings, to the storage dtype, moves the sum by eps of its terms
    error = 2 * len(work.c) * torch.finfo(result.dtype).eps
    if not is_sum(result, [*work.u, *z], [*work.c, *(work.clip or ())], error):
        raise RuntimeError(f"peer {name} computes another {work.op.name} than the reference")
    return known


def peer_entrant(name, work):
    """A peer, held to the reference."""
    peer = PEERS[name]
    f = peer.make(work)
    return Entrant(f, peer.moved(work), check_peer(name, f, work), passes=peer.passes(work),
                   fill=peer.fill if work.noise else None)


def update_race(op, names, elements, *, user_kernels, **options):
    """An update at a size. A user's kernel that is given z races peers that are given z
    too, in the operands' dtype."""
    op = OPS[op]
    work, coef, parameters = case(op, elements, **options)

    def expected(u, **counter):
        return expected_update(op, u[:len(op.operands)], coef, work.out, **counter)

    race = Race(op.name, work.u, work.out, work.bytes, expected)
    for name in names:
        if name in PEERS:
            race.entrants[name, False] = peer_entrant(name, work)
        else:
            race.enter(name, bind(work.u, coef, out=work.out, backend=name, **COUNTER))
    if race.enter_user(user_kernels, coef, parameters):
        given = replace(work, u=[*work.u, torch.randn_like(work.out)])
        for name in names:
            if name in PEERS and not PEERS[name].check:
                race.entrants[name, True] = peer_entrant(name, given)
    return race


def race_of(op, names, elements, *, dtype, device, seed=0, width=1024, user_kernels=None):
    """The race of an op at a size, of these backends and peers, and of a user's kernels."""
    make = update_race if op in OPS else sums_race
    return make(op, names, elements, dtype=dtype, device=device, seed=seed, width=width,
                user_kernels=user_kernels)


def bench(ops, backends=None, elements=None, dtype="float32", device="cpu", *, seed=0,
          user_kernels=None, width=1024, seconds=SECONDS):
    """Rows: op, backend, dtype, elements, seconds (median), quartiles, bytes, gb_per_s,
    fraction_of_copy, matches_reference, speedup over each peer; of a peer also its
    predicted seconds.

    user_kernels: a user's (kernels.check.yours.UserKernels), timed beside the rest. A peer
    that does not compute an op is a row with the reason. RuntimeError on a red gate, and
    where a peer that was named computes none of the ops.
    """
    if user_kernels:
        user_gate(user_kernels, dtype)
    state()
    names = candidates(backends, device)
    if user_kernels:
        names = [*dict.fromkeys((*names, *ALWAYS))]
    reasons = {op: {name: why_not(name, op, dtype, device) for name in names} for op in ops}
    for name in backends or ():
        if all(reasons[op][name] for op in ops):
            raise RuntimeError(f"peer {name!r}: {reasons[ops[0]][name]}")
    options = {"dtype": dtype, "device": device, "seed": seed, "width": width}
    rows = []
    for op in sorted(ops, key=OPS.__contains__):  # sums first
        red = [name for name in names if name in BACKENDS and not gate(op, name, dtype)]
        if red:
            raise RuntimeError(f"{op}: {', '.join(red)} does not return the reference's "
                               f"{'bits' if op in OPS else 'sums'}; nothing was timed")
        able = [name for name in names if not reasons[op][name]]
        for n in elements or ELEMENTS:
            race = race_of(op, able, n, user_kernels=user_kernels, **options)
            if op in OPS or backends:  # few peers have a form of a sum
                rows += [row_of(op, name, dtype, race.out.shape, reason=reason)
                         for name, reason in reasons[op].items() if reason]
            rows += race.rows(dtype, seconds)
    return rows


def show(rows):
    """Rows of updates as a table; what was not measured, and why, below it."""
    wide = max([15, *(len(label(r)) + 1 for r in rows)])
    lines = [f"{'op':<16}{'backend':<{wide}}{'dtype':<9}{'elements':>10}{'width':>6}"
             f"{'ns/element':>11}{'p95':>9}{'GB/s':>7}{'of copy':>8}{'predicted':>10}  bits  "
             "speedup over (95 % interval)"]
    number = lambda v, form: format(v, form) if v is not None else "-"
    for r in measured(rows):
        n = r["elements"]
        bits = "same" if r["matches_reference"] else r.get("within") or "-"
        predicted = r["predicted_seconds"] and r["predicted_seconds"] / n * 1e9
        lines.append(f"{r['op']:<16}{label(r):<{wide}}{r['dtype']:<9}{n:>10}"
                     f"{r['shape'][-1]:>6}{r['seconds'] / n * 1e9:>11.3g}"
                     f" {r['p95'] / n * 1e9:>8.3g}{number(r['gb_per_s'], '.1f'):>7}"
                     f"{number(r['fraction_of_copy'], '.2f'):>8}{number(predicted, '.2f'):>10}"
                     f"  {bits:<5} {over(r)}".rstrip())
    return "\n".join([*lines, *not_measured(rows, "backend", "op"), *shown(rows)])


def shown(rows):
    """What was compared of a user's functions, and whether the machine was busy."""
    for r in rows:
        if r["compared"] and not r["again"]:
            some, every = r["compared"]
            yield (f"{r['op']}, {label(r)}, {r['elements']}: of {every} calls timed, {some} were "
                   "compared whole, chosen by chance when the clock had stopped")
    yield from warning(rows[0]["state"])

"""What is timed is what was compared.

Whole results on the timed tensors, before the clock and, with fresh data, after it. And nothing
that did its work is faster than its bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ...kernels.check import COUNTER
from ...kernels.check.compare import require_same
from ...kernels.check.yours import UserKernels
from .clock import clock, summary
from .rows import add_speedups, row_of

CALLS = 3  # what takes less than so many calls' time is bound by calls, not by bytes
MARGIN = 1.1  # of the fastest rate seen
AFTER = "what was timed is not what was checked before"


def refresh(tensors, seed):
    """Other random numbers in the same memory."""
    for k, t in enumerate(tensors):
        random = torch.Generator(t.device).manual_seed(seed + k)
        t.copy_(torch.randn(t.shape, device=t.device, generator=random))


def yardsticks(t, arrays):
    """Calls whose times say how fast bytes move.

    They have as many arrays like t as a kernel, so that caches hold them as well or as badly. They
    read and write to another place, or in place, where a CPU need not fetch what it overwrites, or
    only write one. "call" moves nothing.
    """
    held = [torch.zeros_like(t) for _ in range(max(2, arrays))]
    pairs = list(zip(held, held[1:] + held[:1]))  # no copy onto itself, which would be none
    one, end = torch.zeros(2, dtype=t.dtype, device=t.device).split(1)

    def copied():
        for a, b in pairs:
            a.copy_(b)

    def negated():
        for a in held[:arrays]:
            a.neg_()

    def added():
        for a, b in pairs:
            a.add_(b)
    return {"copied": copied, "negated": negated, "added": added,
            "filled": lambda: held[0].fill_(1.), "zeroed": held[0].zero_,
            "call": lambda: end.copy_(one)}


def require_possible(op, name, time, moved, only_writes, *, size, arrays, times):
    """RuntimeError for what moves its bytes faster than anything moves that many.

    MARGIN over the fastest yardstick, quartile against quartile, apart from the time that the calls
    take; nothing is said of sizes where they take most of it.
    """
    pairs = max(2, arrays)
    sticks = {"copied": (pairs, 2), "negated": (arrays, 2), "added": (pairs, 3)}
    if only_writes:
        sticks = {"filled": (1, 1), "zeroed": (1, 1)}
    call, rates = times["call"], []
    for stick, (calls, passes) in sticks.items():  # calls, and arrays that each reads and writes
        took = times[stick]["quartiles"][0] - calls * call["quartiles"][1]
        if took < CALLS * calls * call["seconds"]:
            return
        rates.append(calls * passes * size / took)
    ratio = moved / time["quartiles"][1] / max(rates)
    if ratio > MARGIN:
        raise RuntimeError(f"{op}: {name} moves its bytes at {ratio:.1f} times the rate of "
                           f"{'writing' if only_writes else 'copying'} as many, and so has not "
                           "moved them; its time is not reported")


@dataclass(frozen=True)
class Conditions:
    """What all races of a bench have in common. seconds: of timing for each function, about."""

    dtype: str
    device: str
    seed: int
    width: int
    seconds: float
    user_kernels: UserKernels | None


@dataclass(frozen=True)
class Entrant:
    """One that is timed: a call without arguments.

    bytes: what it reads and writes. matches: whether it returns the reference's bits. Both are
    None where that is not known. passes, fill: of a peer (peers.Peer), to predict its time.
    """

    call: Callable
    bytes: int | None = None
    matches: bool | None = None
    passes: int | None = None
    fill: Callable | None = None


@dataclass
class Race:
    """One op at one size. What is timed is checked whole, before the clock and after it.

    op: its name. u: its operands. out: a buffer of their shape. bytes: what a kernel of ours
    reads and writes. expected(**counter): NumPy's results, a tuple.
    checked: {name: call(step=...)}. entrants: {(name, whether z is given): Entrant}.
    user: the user's entry, if there is one, and how many arrays like out it reads and writes.
    """

    op: str
    u: list
    out: torch.Tensor
    bytes: int
    expected: Callable
    checked: dict = field(default_factory=dict)
    entrants: dict = field(default_factory=dict)
    user: tuple | None = None
    arrays: int = 0

    def enter(self, name, call):
        """A backend's call(step=...)."""
        self.checked[name] = call
        self.entrants[name, False] = Entrant(partial(call, step=0), self.bytes, True)

    def enter_user(self, user_kernels, coef, parameters):
        """The user's function, if there is one; returns whether it is given z."""
        if not user_kernels or self.op not in user_kernels.functions:
            return False
        given = user_kernels.takes_z(self.op)
        if given and self.op == "normal":
            raise ValueError(f"{user_kernels.file}: a normal that is given z has nothing to do; "
                             "draw it from seed, sample, step and tag")
        u = self.u or [self.out]
        copies = [t.clone() for t in u]  # which it may overwrite
        call = user_kernels.bind(self.op, copies, coef, parameters)
        bytes_ = self.bytes + given * 4 * self.out.numel()  # z is float32
        self.user = user_kernels.file, given
        self.arrays = max(1, self.bytes // self.out.nbytes + given)
        self.checked[user_kernels.file] = partial(user_kernels.renewed, call, self.op, u)
        self.entrants[self.user] = Entrant(user_kernels.timed(call), bytes_, True)
        return given

    def check(self, when, step):
        """RuntimeError unless ours and the user's return NumPy's results, whole."""
        want = self.expected(**COUNTER | {"step": step})
        for name, call in self.checked.items():
            self.out.fill_(float("nan"))
            got = call(step=step)
            require_same(self.op, name, (got,) if isinstance(got, torch.Tensor) else got, want,
                         when)

    def functions(self):
        """{name: call} of the entrants and of what they are held to."""
        copied = self.out.clone()
        found = {key: e.call for key, e in self.entrants.items()}
        found |= {e.fill: e.fill(self.out) for e in self.entrants.values() if e.fill}
        found["copy"] = lambda: self.out.copy_(copied)
        return found | yardsticks(self.out, self.arrays) if self.user else found

    def rows(self, conditions):
        """A row for each entrant, after a check, the clock, and a check with fresh data."""
        self.check("nothing was timed", COUNTER["step"])
        found = clock(self.functions(), conditions.device, conditions.seconds)
        times = {key: summary(seconds) for key, seconds in found.items()}
        refresh(self.u, conditions.seed + 1)
        self.check(AFTER, 1)
        size, rows = self.out.nbytes, []
        if self.user:
            require_possible(self.op, self.user[0], times[self.user],
                             self.entrants[self.user].bytes, not self.u, size=size,
                             arrays=self.arrays, times=times)
        copy_rate = 2 * size / times["copy"]["seconds"]
        for (name, given), e in self.entrants.items():
            time = times[name, given]
            row = row_of(self.op, name, conditions.dtype, self.out.shape, **time, bytes=e.bytes,
                         given_z=given, matches_reference=e.matches,
                         copy_gb_per_s=copy_rate / 1e9)
            if e.bytes is not None:
                rate = e.bytes / time["seconds"]
                row |= {"gb_per_s": rate / 1e9, "fraction_of_copy": rate / copy_rate}
            if e.passes is not None:
                drawn = times[e.fill]["seconds"] if e.fill else 0.
                row["predicted_seconds"] = e.passes * size / copy_rate + drawn
            rows.append(row)
        return add_speedups(rows)

"""What is timed is what was compared.

Whole results on the timed tensors, before the clock and, with fresh data, after it. And
nothing that did its work is faster than its bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ...kernels.check.cases import COUNTER
from ...kernels.check.compare import require_same
from .clock import clock, is_cuda, summary
from .rows import add_speedups, row_of
from .state import clocks
from .yours import AFTER, Runner

CALLS = 3  # what takes less than so many calls' time is bound by calls, not by bytes
MARGIN = 1.1  # of the fastest rate seen
STICKS = "copied", "negated", "added", "filled", "zeroed", "call"
BEYOND = 10  # times as fast as torch is not believed of a user's, until it is shown
ALWAYS = "torch_inplace", "torch_eager"  # run beside a user's; sums may have but the second
AGAIN = "again"  # the first entrant, once more; the first of a user's if there is one


def yardsticks(t, arrays):
    """Calls whose times say how fast bytes move.

    They have as many arrays like t as a kernel, so that caches hold them as well or as
    badly. They read and write to another place, or in place, where a CPU need not fetch
    what it overwrites, or only write one. "call" moves nothing.
    """
    held = [torch.zeros_like(t) for _ in range(max(2, arrays))]
    others = held[1:] + held[:1]  # no copy onto itself, which would be none
    one, end = t.new_zeros(2).split(1)

    def each(method, *columns):
        def run():
            for row in zip(*columns):
                method(*row)
        return run
    return {"copied": each(torch.Tensor.copy_, held, others),
            "negated": each(torch.Tensor.neg_, held[:arrays]),
            "added": each(torch.Tensor.add_, held, others),
            "filled": lambda: held[0].fill_(1.), "zeroed": held[0].zero_,
            "call": lambda: end.copy_(one)}


def require_possible(op, name, time, moved, only_writes, *, size, arrays, times):
    """RuntimeError for what moves its bytes faster than anything moves that many.

    MARGIN over the fastest yardstick, the median that is reported against its lower
    quartile, apart from the time that the calls take; nothing is said of sizes where they
    take most of it.
    """
    pairs = max(2, arrays)
    sticks = {"copied": (pairs, 2), "negated": (arrays, 2), "added": (pairs, 3)}
    if only_writes:
        sticks = {"filled": (1, 1), "zeroed": (1, 1)}
    call, rates = times["call"], []
    for stick, (calls, passes) in sticks.items():  # passes: a call's arrays, read or written
        took = times[stick]["quartiles"][0] - calls * call["quartiles"][1]
        if took < CALLS * calls * call["seconds"]:
            return
        rates.append(calls * passes * size / took)
    ratio = moved / time["seconds"] / max(rates)
    if ratio > MARGIN:
        raise RuntimeError(f"{op}: {name} moves its bytes at {ratio:.1f} times the rate of "
                           f"{'writing' if only_writes else 'copying'} as many, and so has not "
                           "moved them; its time is not reported")


@dataclass(frozen=True)
class Entrant:
    """One that is timed: a call without arguments, or a user's yours.Runner.

    bytes: what it reads and writes. matches: whether it returns the reference's bits. Both
    are None where that is not known. near: compare.Near, where it need not return them.
    results(step=...): what it returns, to be checked.
    passes, fill: of a peer (peers.Peer), to predict its time.
    """

    call: Callable
    bytes: int | None = None
    matches: bool | None = None
    near: tuple | None = None
    results: Callable | None = None
    passes: int | None = None
    fill: Callable | None = None


@dataclass
class Race:
    """One op at one size. What is timed is checked whole, before the clock and after it.

    op: its name. u: its operands. out: a buffer of their shape. bytes: what a kernel of
    ours reads and writes. expected(u, **counter): NumPy's results.
    entrants: {(name, whether z is given): Entrant}; one is timed twice.
    users: {the key of a user's: how many arrays like out it reads and writes}.
    """

    op: str
    u: list
    out: torch.Tensor
    bytes: int
    expected: Callable
    entrants: dict = field(default_factory=dict)
    users: dict = field(default_factory=dict)

    def enter(self, name, results):
        """A backend's call, results(step=...)."""
        call = partial(results, step=0)
        self.entrants[name, False] = Entrant(call, self.bytes, True, results=results)

    def enter_user(self, user_kernels, coef, parameters):
        """The user's functions of the op, if there are; returns whether one is given z."""
        for function in user_kernels.of(self.op) if user_kernels else ():
            given = function.takes_z
            if given and self.op == "normal":
                raise ValueError(f"{function.file}: a normal that is given z has nothing to do; "
                                 "draw it from seed, sample, step and tag")
            u = self.u or [self.out]
            run = Runner(function, user_kernels, u, coef, parameters, self.expected)
            moved = self.bytes + given * 4 * self.out.numel()  # z is float32
            key = function.label, given
            self.users[key] = max(1, self.bytes // self.out.nbytes + given)
            self.entrants[key] = Entrant(run, moved, not run.near, run.near)
        return any(given for _, given in self.users)

    def check(self, when, step):
        """RuntimeError unless ours and the user's return NumPy's results, whole."""
        want = self.expected(self.u, **COUNTER | {"step": step})
        for (name, _), entrant in self.entrants.items():
            if entrant.results:
                self.out.fill_(float("nan"))
                require_same(self.op, name, entrant.results(step=step), want, when)
        for key in self.users:
            self.entrants[key].call.check(when)

    def renew(self):
        """Other numbers in the operands."""
        random = torch.Generator(self.out.device)
        random.seed()  # the default one may have been seeded as the first data were
        for t in self.u:
            t.normal_(generator=random)

    @property
    def twice(self):
        """The key of what is timed twice, to say what noise is."""
        return next(iter(self.users or self.entrants))

    def functions(self):
        """{name: call} of the entrants, of one once more, and of what they are held to."""
        copied = self.out.clone()
        found = {key: e.call for key, e in self.entrants.items()}
        found[AGAIN] = found[self.twice]
        found |= {e.fill: e.fill(self.out) for e in self.entrants.values() if e.fill}
        found["copy"] = lambda: self.out.copy_(copied)
        for arrays in {*self.users.values()}:
            sticks = yardsticks(self.out, arrays)
            found |= {(arrays, stick): f for stick, f in sticks.items()}
        return found

    def rows(self, dtype, seconds):
        """A row for each entrant, after a check, the clock, and a check with fresh data in
        the same memory. seconds: of timing for each function, about."""
        if not self.entrants:
            return []
        self.check("nothing was timed", COUNTER["step"])
        rounds = self.believed(clock(self.functions(), self.out.device, seconds), seconds)
        times = {key: summary(found) for key, found in rounds.items()}
        self.renew()
        self.check(AFTER, 1)
        size, rows, now = self.out.nbytes, [], clocks()
        for key, arrays in self.users.items():
            sticks = {stick: times[arrays, stick] for stick in STICKS}
            require_possible(self.op, key[0], times[key], self.entrants[key].bytes,
                             not self.u, size=size, arrays=arrays, times=sticks)
        copy_rate = 2 * size / times["copy"]["seconds"]
        for timed in (*self.entrants, AGAIN):
            again = timed == AGAIN
            key = self.twice if again else timed
            (name, given), e = key, self.entrants[key]
            time = times[timed]
            row = row_of(self.op, name, dtype, self.out.shape, **time, times=rounds[timed],
                         bytes=e.bytes, given_z=given, again=again, clocks=now,
                         matches_reference=e.matches, copy_gb_per_s=copy_rate / 1e9,
                         within=e.near and str(e.near).removeprefix("within "))
            if key in self.users:
                row["compared"] = [e.call.compared, e.call.made]
            if e.bytes is not None:
                rate = e.bytes / time["seconds"]
                row |= {"gb_per_s": rate / 1e9, "fraction_of_copy": rate / copy_rate}
            if e.passes is not None:
                drawn = times[e.fill]["seconds"] if e.fill else 0.
                row["predicted_seconds"] = e.passes * size / copy_rate + drawn
            rows.append(row)
        return add_speedups(rows)

    def believed(self, rounds, seconds):
        """The rounds, or where a user's function is more than BEYOND times as fast as
        torch's new ones, each of its calls compared whole.

        RuntimeError on a GPU, whose end of work is told by the process that did it, and for
        what takes no longer than the way there and back.
        """
        for key in self.users:
            name, _ = key
            least, _ = summary(rounds[key])["quartiles"]
            if least <= 0:
                raise RuntimeError(f"{self.op}: {name} takes too short to be told from the way to "
                                   "its process and back; take more --elements")
            peer, ratio = self.beyond(rounds, key)
            if ratio <= BEYOND:
                continue
            said = f"{self.op}: {name} is {ratio:.1f} times as fast as {peer}"
            if is_cuda(self.out.device):
                raise RuntimeError(f"{said}; that is refused until it is shown, its time is "
                                   "not reported")
            print(f"{said}: timed again, and every call compared", flush=True)
            run = self.entrants[key].call
            run.share, run.made, run.compared = 1., 0, 0
            rounds = clock(self.functions(), self.out.device, seconds)
        return rounds

    def beyond(self, rounds, key):
        """(the first of ALWAYS that races a user's function, how many times as fast it
        is)."""
        name, given = key
        peer = next(peer for peer in ALWAYS if (peer, given) in rounds)
        theirs, its = (summary(rounds[k])["seconds"] for k in ((peer, given), key))
        return peer, theirs / its

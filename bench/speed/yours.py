"""A user's functions on the clock: each in the process of its file, the clock outside.

A process, and all that it began, is stopped but for its own turns: it neither works on after
a turn nor slows another's. Its data appear in shared memory while it is stopped, right
before the clock starts, other numbers each time. What it has written there when the clock
stops is its result, and of a random tenth of the calls all of it is compared. What the way
there and back takes is told by a process of ours that does nothing else, and taken off. (On
a GPU the data, and the results, are copied outside the clock.)
"""

import secrets
import time
from contextlib import ExitStack

import numpy as np
import torch

from ... import noise
from ...kernels.check.cases import COUNTER
from ...kernels.check.compare import as_tuple, normals, require_same
from ...kernels.check.yours import available, device_of, only, operands, require_known
from ...kernels.check.yours.call import as_cpu, raw, up_to_line
from ...kernels.check.yours.host import LIMIT, Host
from ...kernels.launch import dtype_name

AFTER = "what was timed is not what was checked before"
SAMPLE = 1e-2  # seconds of a turn: the way there and back, some 50 us, is a small part
MOST_CALLS, MOST_BYTES = 1000, 1 << 28  # of a turn, each call with arrays of its own
AWAKE = 5e-2  # seconds of calls before: so long threads that rested may share a core
SHARE = .1  # of the calls that are compared
ROOM = 1 << 12  # fresh operands begin at any of so many elements of a pool
RANDOM = secrets.SystemRandom()


class UserKernels:
    """The functions of some files; `with` ends the processes that they run in.

    near: compare.Near, for what is not meant to be equal. ValueError in one line where a
    file cannot be used, and where no function is one of ops.
    """

    def __init__(self, *files, ops=None, near=None):
        self.files = [*dict.fromkeys(map(str, files))]
        self.near = near
        found = []
        self.interpreted = False
        for file in self.files:
            with Host(file) as host:
                found += host.functions
                self.interpreted |= host.interpreted
        self.functions = only(found, ops, self.files)
        self.open = ExitStack()
        self.pairs = {}

    @property
    def ops(self):
        """The names of their ops, each once."""
        return [*dict.fromkeys(f.op for f in self.functions)]

    def of(self, op):
        """The functions of an op."""
        return [f for f in self.functions if f.op == op]

    def pair(self, function):
        """(a process for a function, one that does nothing), both at rest; no two functions
        of an op share one."""
        if function.label not in self.pairs:
            pair = [self.open.enter_context(Host(file)) for file in (function.file, None)]
            for host in pair:
                host.stop()
            self.pairs[function.label] = pair
        return self.pairs[function.label]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End their processes."""
        self.open.close()


class Runner:
    """One function with the arguments of one race, for the clock.

    u: the operands, or a tensor of the result's shape. expected(u, **counter): NumPy's
    results. share: of the calls that are compared; of a turn of few calls it is more, one a
    turn. made, compared: how many were.
    """

    def __init__(self, function, user, u, coef, parameters, expected):
        self.function, self.near = function, user.near
        self.host, self.idle = user.pair(function)
        self.u = [as_cpu(t) for t in u]
        self.expected = expected
        self.share, self.made, self.compared = SHARE, 0, 0
        self.seed = COUNTER["seed"]
        self.sort(available(function.op, self.u, as_cpu(coef).numpy(), parameters, COUNTER))
        self.likes = as_tuple(expected(self.u, **COUNTER))
        self.calls = 0

    # ---- where everything lies ----

    def sort(self, have):
        """What all calls share, what each has of its own, and what is sent."""
        function = self.function
        try:
            require_known(function, have)
        except ValueError as e:
            raise ValueError(f"{function.file}: {e}") from e
        have["z"] = torch.empty(self.u[0].shape)
        wanted = {name: have[name] for name in function.wanted if name in have}
        self.shared = {name: as_cpu(value) for name, value in wanted.items()
                       if isinstance(value, (np.ndarray, torch.Tensor))}
        self.values = {name: value for name, value in wanted.items()
                       if name not in self.shared}
        first = "z" if function.op == "noise_norms" else operands(function.op)[:1]
        self.own = {name: self.shared.pop(name) for name in (*first, "out")
                    if name in self.shared}

    def bind(self, calls):
        """Give everything its place, and have the calls made ready."""
        self.calls, self.end, self.there_and_back = calls, 0, np.inf
        self.common = {name: self.place(t) for name, t in self.shared.items()}
        self.places = []
        for k in range(calls):
            own = {name: self.place(t) for name, t in self.own.items()}
            results = [self.place(t) for t in self.likes]
            if "out" in own:
                results[-1] = own["out"]
            values = {"step": COUNTER["step"] + k} if "step" in self.values else {}
            self.places.append({"arrays": self.common | own, "values": values,
                                "results": results})
        request = {"function": (self.function.label, self.function.op),
                   "kind": self.function.arrays, "size": self.end, "calls": self.places,
                   "values": self.values}
        for host in (self.idle, self.host):
            host.room(self.end)
            host.go_on()
            self.ask(host, request if host is self.host else request | {"function": None})
            host.stop()
        self.renew()

    def place(self, t):
        """The next free place, for an array like t: (first byte, dtype, shape)."""
        start = self.end
        self.end += up_to_line(t.nbytes)
        return start, dtype_name(t.dtype), tuple(t.shape)

    def memory(self, place):
        """The bytes of a place, as the function's process sees them."""
        start, dtype, shape = place
        size = getattr(torch, dtype).itemsize * int(np.prod(shape))
        return self.host.room(self.end)[start:start + size]

    # ---- a turn ----

    def most(self, took):
        """How many calls a turn has, of what takes so many seconds."""
        one = sum(up_to_line(t.nbytes) for t in (*self.own.values(), *self.likes))
        return max(1, min(int(SAMPLE / took), MOST_CALLS, MOST_BYTES // one))

    def seconds(self, calls=1):
        """Seconds of a call, over so many, the way there and back taken off.

        That is the shortest so far: what slows it now and then is not the function's gain.
        """
        if calls != self.calls:
            self.bind(calls)
            self.there_and_back = min(self.turn(self.idle) for _ in range(5))
        self.there_and_back = min(self.there_and_back, self.turn(self.idle))
        took = self.turn(self.host)
        self.made += calls
        self.compared += self.compare(AFTER, max(self.share, 1 / calls))
        return (took - self.there_and_back) / calls

    def turn(self, host):
        """Seconds that a process takes for the calls, awake, with fresh data."""
        host.go_on()
        end = time.perf_counter() + AWAKE * (host is self.host)
        self.run(host)
        while time.perf_counter() < end:
            self.run(host)
        host.stop()
        if host is self.host:
            self.renew()
        self.copy(host, "refresh")
        start = time.perf_counter()
        host.go_on()
        self.run(host)
        took = time.perf_counter() - start
        host.stop()
        self.copy(host, "give_back")
        return took

    def run(self, host):
        """Have the calls made."""
        values = {"seed": self.seed} if "seed" in self.values else {}
        self.ask(host, {"run": {"count": self.calls, "values": values}})

    def copy(self, host, direction):
        """Have a GPU's arrays copied from or to shared memory."""
        if device_of(self.function.arrays) != "cpu":
            host.go_on()
            self.ask(host, {direction: True})
            host.stop()

    def ask(self, host, request):
        """RuntimeError unless a process does what it is asked to."""
        try:
            answer = host.ask(request, LIMIT)
        except (EOFError, TimeoutError) as e:
            raise RuntimeError(f"{self.function.file}: {e}") from e
        if "error" in answer:
            raise RuntimeError(f"{self.function.file}: {answer['error']}")

    # ---- its data ----

    def renew(self):
        """Other numbers in all operands, and another seed."""
        self.seed = RANDOM.randrange(2**63)
        self.pool = torch.randn(self.u[0].numel() + ROOM).to(self.u[0].dtype)
        self.starts = [[RANDOM.randrange(ROOM) for _ in self.u] for _ in range(self.calls)]
        for k, call in enumerate(self.places):
            names = self.own if k else call["arrays"]
            for name in names:
                if name != "out":
                    self.memory(call["arrays"][name])[:] = self.sent(name, k)

    def sent(self, name, k):
        """The bytes of an argument of the k-th call."""
        names = operands(self.function.op)
        if name in names:
            return raw(self.operand(names.index(name), k))
        if name == "z":
            return raw(normals(tuple(self.u[0].shape), **self.counter(k)))
        if name == "keys":
            return raw(as_cpu(noise.keys(self.seed, COUNTER["sample"], len(self.u[0]))))
        return raw(self.shared[name])

    def operand(self, i, k):
        """The i-th operand of the k-th call, its own or one that all share."""
        own = operands(self.function.op)[i] in self.own
        start = self.starts[k if own else 0][i]
        return self.pool[start:start + self.u[i].numel()].view(self.u[i].shape)

    def counter(self, k):
        """Of a call's noise; a z that is handed over is one for all, unless it is all that
        there is."""
        own = "z" in self.own or not self.function.takes_z
        return COUNTER | {"seed": self.seed, "step": COUNTER["step"] + own * k}

    # ---- what came of it ----

    def compare(self, when, share=1.):
        """RuntimeError unless the results of a random share of the last turn's calls are
        NumPy's, whole, and their arguments as they were; returns how many those are."""
        chosen = [k for k in range(self.calls) if RANDOM.random() < share]
        for k in chosen:
            call = self.places[k]
            for name, place in call["arrays"].items():
                same = name == "out" or np.array_equal(self.memory(place), self.sent(name, k))
                if not same:
                    raise RuntimeError(f"{self.function.file}: {self.function.op} changed "
                                       f"{name}, which is only to be read; {when}")
            u = [self.operand(i, k) for i in range(len(operands(self.function.op)))]
            u = u or self.u
            got = tuple(map(self.tensor, call["results"]))
            want = self.expected(u, **self.counter(k))
            require_same(self.function.op, self.function.label, got, want, when, self.near)
        return len(chosen)

    def tensor(self, place):
        """What lies in a place of the function's memory, copied."""
        _, dtype, shape = place
        bits = torch.from_numpy(self.memory(place).copy())
        return bits.view(getattr(torch, dtype)).view(shape)

    def check(self, when):
        """One call more, compared whole."""
        self.bind(1)
        self.turn(self.host)
        self.compare(when)

"""One call of a user's function: its arguments between guards, and what it left of them."""

import os

import numpy as np
import torch

from ...launch import dtype_name
from ..compare import kind_of
from . import available, drawn, operands

GUARD = 1 << 18  # bytes either side of an array: more than any kernel's block
LINE = 256  # bytes: every array begins at a multiple
RANDOM = np.frombuffer(os.urandom(2 * GUARD + LINE), np.uint8)


class Call:
    """A function's arguments for a case, and where they lie in memory.

    given: the arguments' names. arrays, values: what is shared, and what is sent. alias:
    the operand that out is, in place.
    """

    def __init__(self, function, case, in_place):
        have = handed(function, case)
        self.function = function.label, function.op
        self.kind = function.arrays
        self.given = [name for name in function.wanted if name in have]
        self.alias = operands(case.op)[0] if in_place else None
        self.arrays, self.values = {}, {}
        for name in self.given:
            value = have[name]
            if not isinstance(value, (np.ndarray, torch.Tensor)):
                self.values[name] = value
            elif name != "out" or not in_place:
                self.arrays[name] = as_cpu(value)
        if in_place:
            self.arrays[self.alias] = as_cpu(have[self.alias])
        self.expected = case.expected
        self.lay_out()

    def lay_out(self):
        """Give every array its place, between guards, and the results theirs after them."""
        end = GUARD
        self.places, self.room = {}, []
        for name, t in self.arrays.items():
            self.places[name] = slice(end, end + t.nbytes)
            end += up_to_line(t.nbytes) + GUARD
        self.end = end
        for t in self.expected:
            self.room.append(slice(end, end + t.nbytes))
            end += up_to_line(t.nbytes)
        self.size = end

    def zones(self):
        """Where the guards are: before the first array, and after each."""
        places = self.places.values()
        starts = [0, *(place.stop for place in places)]
        stops = [*(place.start for place in places), self.end]
        return [slice(*ends) for ends in zip(starts, stops)]

    def results(self, host, limit):
        """What the function returns, CPU tensors. RuntimeError for what it raised, overran,
        changed or returned amiss; EOFError or TimeoutError where there is no answer."""
        memory = host.room(self.size)
        self.guards = fresh_guards()
        for zone in self.zones():
            memory[zone] = self.guards[:zone.stop - zone.start]
        for name, t in self.arrays.items():
            memory[self.places[name]] = raw(t)
        answer = host.ask(self.request(), limit)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        if damage := self.damage(host):
            raise RuntimeError(damage.removeprefix(", after it "))
        self.require_unchanged(memory)
        self.require_kind(answer["results"])
        got = [torch.empty_like(t) for t in self.expected]
        for t, part in zip(got, self.room):
            raw(t)[:] = memory[part]
        return got

    def request(self):
        """What the process is told."""
        places = {}
        for name, t in self.arrays.items():
            start = self.places[name].start
            places[name] = start, dtype_name(t.dtype), tuple(t.shape)
        if self.alias:
            places["out"] = places[self.alias]
        arrays = {name: places[name] for name in self.given if name in places}
        return {"function": self.function, "kind": self.kind, "size": self.size,
                "arrays": arrays, "values": self.values,
                "results": [(part.start, part.stop - part.start) for part in self.room]}

    def damage(self, host):
        """", after it wrote ..." where a guard is not whole: beyond the end, or before the
        start, of which array; else nothing."""
        memory = host.room(self.size)
        names = [*self.places]
        for k, zone in enumerate(self.zones()):
            size = zone.stop - zone.start
            off = np.flatnonzero(memory[zone] != self.guards[:size])
            if not len(off):
                continue
            low = off[off < size // 2] if k < len(names) else off
            if k and len(low):
                return (f", after it wrote up to {low[-1] + 1} bytes beyond the end of "
                        f"{names[k - 1]}")
            return (f", after it wrote from {size - off[0]} bytes before the start of "
                    f"{names[k]}")
        return ""

    def require_unchanged(self, memory):
        """RuntimeError where an argument but out is not what was handed over."""
        for name, t in self.arrays.items():
            changed = (memory[self.places[name]] != raw(t)).any()
            if changed and name not in ("out", self.alias):
                raise RuntimeError(f"changed {name}, which is only to be read: write to "
                                   "out, or to a new array")

    def require_kind(self, returned):
        """RuntimeError unless what was returned, (dtype, shape) each, is of the kind."""
        for (dtype, shape), t in zip(returned, self.expected, strict=True):
            kind = f"{dtype} {tuple(shape)}"
            if kind != kind_of(t):
                raise RuntimeError(f"returned {kind}, not {kind_of(t)}")


def fresh_guards():
    """Bytes for guards, others each time, and enough for any of a call's."""
    start = int.from_bytes(os.urandom(4)) % GUARD
    return RANDOM[start:start + GUARD + LINE]


def handed(function, case):
    """{name: value} of all that a function may ask for in a case."""
    like = case.u or [torch.empty(case.shape, dtype=getattr(torch, case.dtype))]
    parameters = case.parameters or {}
    have = available(case.op, like, case.coef, parameters, case.counter)
    have["z"] = case.z
    if case.z is None and "z" in function.wanted:
        have["z"] = drawn(case.shape, case.counter)
    out = have["out"]
    have["out"] = torch.randn(out.shape).to(out.dtype)  # stale numbers, never right
    return have


def up_to_line(size):
    """A size up to the next multiple of LINE bytes, which arrays begin at."""
    return -(-size // LINE) * LINE


def as_cpu(value):
    """An array as a dense CPU tensor."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    return value.cpu().contiguous()


def raw(t):
    """A dense CPU tensor's bytes, in its own memory."""
    if not t.numel():
        return np.empty(0, np.uint8)
    return t.flatten().view(torch.uint8).numpy()

"""A file of kernels under check, in a process of its own that cannot say it is right.

`check` makes the rows. A call's arguments lie in memory that both processes see, each
between guards. Here, where no kernel runs, the results are compared with NumPy's, the
guards and every argument but out with what was written there. What the process is asked and
does not answer is a failed row: it crashed, it ended, it took too long.
"""

import json
import mmap
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from itertools import chain
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import torch

from .. import FLOATS, OPS
from .cases import BEYOND, cases_of
from .compare import row_of, same_bits
from .explain import compared
from .yours import available, drawn, only, operands, require_known

LIMIT = 60.  # seconds that a call, or a file's import, may take
PATIENCE = 3.  # the same for a large case in Triton's interpreter
PRINTED = 4000  # characters of a file's output that are shown
GUARD = 1 << 18  # bytes either side of an array: more than any kernel's block
CALLS, SECONDS = 500, 1.  # small calls at the end, at most so many, for about so long
COUNTER = {"seed", "sample", "step", "tag", "keys"}


def check(files, ops=None, dtypes=("float32",), seed=0, shapes=None, near=None):
    """Rows as check.check's, one by one: each function of the files on every case of its op.

    shapes: these alone. near: compare.Near, for what is not meant to be equal. ValueError
    in one line where a file cannot be used.
    """
    hosts = [Host(file) for file in files]
    try:
        functions = only([f for host in hosts for f in host.functions], ops, files)
        for function in functions:
            host = next(h for h in hosts if function in h.functions)
            if function.arrays == "numpy" and "bfloat16" in dtypes:
                raise ValueError(f"{host.file}: NumPy has no bfloat16; put ARRAYS = 'torch' "
                                 "into it")
            yield from check_function(host, function, dtypes, seed, shapes, near)
    finally:
        for host in hosts:
            host.close()


def check_function(host, function, dtypes, seed, shapes, near):
    """Rows of one function. The first case that its process does not answer is its last."""
    cases = cases_of(function.op, dtypes, shapes, seed)
    if not shapes:
        beyond = cases_of(function.op, dtypes, BEYOND, seed + 1)
        cases = chain(cases, beyond)
    slow = set()
    try:
        for case in cases:
            if not fits(function, case):
                continue
            large = host.interpreted and case.shape in BEYOND
            if large and case.shape in slow:
                yield not_run(function, case)
                continue
            try:
                for where in places(function):
                    yield from rows_of(host, function, case, where, near,
                                       PATIENCE if large else LIMIT)
            except TimeoutError:
                slow.add(case.shape)
                yield not_run(function, case)
        for dtype in dtypes if not shapes else ():
            yield many_calls(host, function, dtype, seed, near)
    except Gone as e:
        yield e.row


def not_run(function, case):
    """A row of what Triton's interpreter would take too long for."""
    shape = ",".join(map(str, case.shape))
    return row_of(function.op, function.label, case.dtype, case.shape, None,
                  f"takes more than {PATIENCE:g} s in Triton's interpreter; check it on a GPU, "
                  f"or --shape {shape}")


def many_calls(host, function, dtype, seed, near):
    """A row of many small calls, each another case: some go wrong after a while."""
    shape = 7, 13
    end = time.monotonic() + SECONDS
    count = 0
    for case in cases_of(function.op, [dtype], [shape] * CALLS, seed + 2):
        if time.monotonic() > end or count == CALLS:
            break
        if not fits(function, case):
            continue
        count += 1
        for row in rows_of(host, function, case, "", near, LIMIT, once=True):
            if not row["passed"]:
                row["reason"] = f"call {count} of many small ones: {row['reason']}"
                return row
    return row_of(function.op, function.label, dtype, shape, True, f"{count} calls more",
                  within=near and str(near), max_ulp=None)


def fits(function, case):
    """Whether a case is one for a function: by what it asks for."""
    wanted = function.wanted
    has = set(wanted)
    if case.keyed and "keys" not in has:
        return False
    if case.z is not None and ("z" not in has or has & COUNTER):
        return False
    needs = {name for name, optional in wanted.items() if not optional}
    own = set(OPS[case.op].tried) if case.op in OPS else set()
    return case.parameters is not None or "coef" in has and not needs & own


def places(function):
    """Where out is: a buffer of its own, and, where there is an operand, that very array."""
    if "out" not in function.wanted:
        return [""]
    return [", out of place", ", in place"] if operands(function.op) else [", out of place"]


# ---- one call ----

def rows_of(host, function, case, where, near, limit, once=False):
    """Rows of a case: called twice, with other guards, it returns the same and harms
    nothing. Gone where it is not answered."""
    def failed(reason):
        return row_of(function.op, function.label, case.dtype, case.shape, False,
                      f"{case.parts[0]}{where}: {reason}")
    call = None
    try:
        call = Call(function, case, "in place" in where)
        got = call.answered(host, limit)
        again = got if once else Call(function, case, "in place" in where).answered(
            host, limit)
    except TimeoutError as e:
        if limit < LIMIT:
            raise
        raise Gone(failed(f"{e}{call.damage(host)}")) from e
    except EOFError as e:
        raise Gone(failed(f"{e}, called with {', '.join(call.given)}"
                          f"{call.damage(host)}")) from e
    except (ValueError, RuntimeError) as e:
        yield failed(str(e))
        return
    draws = "z" not in function.wanted
    for row in compared(case, function.label, got, where=where, near=near, draws=draws):
        noise = case.op not in OPS or OPS[case.op].noise
        if not row["passed"] and draws and noise and case.op != "norms":
            if not COUNTER & set(function.wanted):
                row["explained"] = ("its noise cannot be the counter's: it asks for none of "
                                    "seed, sample, step, tag")
        yield row
    if not all(map(same_bits, got, again)):
        yield failed("called again with the same arguments, it returns something else")


class Gone(Exception):
    """A function's process did not answer. row: the failed row that says so."""

    def __init__(self, row):
        super().__init__(row["reason"])
        self.row = row


class Call:
    """A function's arguments for a case, as they are laid into memory between guards."""

    def __init__(self, function, case, in_place):
        like = case.u or [torch.empty(case.shape, dtype=getattr(torch, case.dtype))]
        have = available(case.op, like, case.coef, case.parameters or {}, case.counter)
        require_known(function, have)
        if "z" in function.wanted:
            have["z"] = case.z if case.z is not None else drawn(case.shape, case.counter)
        have["out"] = torch.randn(case.shape).to(like[0].dtype)  # stale numbers, never right
        self.function = function.label, function.op
        self.given = [name for name in function.wanted if name in have]
        arrays = {name: as_cpu(have[name]) for name in self.given
                  if isinstance(have[name], (np.ndarray, torch.Tensor))}
        self.values = {name: have[name] for name in self.given if name not in arrays}
        self.alias = operands(case.op)[0] if in_place else None
        if self.alias:
            out = arrays.pop("out")
            arrays.setdefault(self.alias, have[self.alias])
        self.arrays = arrays
        self.results = case.expected
        self.places = {}
        end = GUARD
        for name, t in arrays.items():
            self.places[name] = end
            end += t.nbytes + GUARD + -t.nbytes % 256
        self.end = end
        self.put = []
        for t in case.expected:
            self.put.append((end, t.nbytes))
            end += t.nbytes + -t.nbytes % 256
        self.size = end

    def answered(self, host, limit):
        """The results, CPU tensors. RuntimeError for what it raised, returned, overran or
        changed; EOFError or TimeoutError where there is no answer."""
        memory = host.room(self.size)
        self.guards = host.noise()
        for start in self.guarded():
            memory[start] = self.guards[:start.stop - start.start]
        for name, t in self.arrays.items():
            memory[self.part(name)] = raw(t)
        arrays = {name: (self.places[name], str(t.dtype).removeprefix("torch."),
                         tuple(t.shape)) for name, t in self.arrays.items()}
        if self.alias:
            arrays["out"] = arrays[self.alias]
            arrays = {name: arrays[name] for name in self.given}
        answer = host.ask({"function": self.function, "size": self.size, "arrays": arrays,
                           "values": self.values, "results": self.put}, limit)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        if damage := self.damage(host):
            raise RuntimeError(damage.removeprefix(", after it "))
        for name, t in self.arrays.items():
            if name not in ("out", self.alias) and (memory[self.part(name)] != raw(t)).any():
                raise RuntimeError(f"changed {name}, which is only to be read: write to out, "
                                   "or to a new array")
        kinds = [(str(t.dtype), list(t.shape)) for t in self.results]
        for (dtype, shape), (kind, size) in zip(answer["results"], kinds, strict=True):
            if (dtype, shape) != (kind, size):
                raise RuntimeError(
                    f"returned {dtype.removeprefix('torch.')} {tuple(shape)}, not "
                    f"{kind.removeprefix('torch.')} {tuple(size)}")
        got = [torch.empty_like(t) for t in self.results]
        for t, (start, size) in zip(got, self.put):
            raw(t)[:] = memory[start:start + size]
        return got

    def part(self, name):
        """Where an array's bytes are."""
        start = self.places[name]
        return slice(start, start + self.arrays[name].nbytes)

    def guarded(self):
        """Where the guards are."""
        begin = 0
        for name in self.places:
            part = self.part(name)
            yield slice(begin, part.start)
            begin = part.stop
        yield slice(begin, self.end)

    def damage(self, host):
        """", after it wrote ..." where a guard is not whole: beyond the end, or before the
        start, of which array; else nothing."""
        memory = host.room(self.size)
        names = [*self.places]
        for k, zone in enumerate(self.guarded()):
            size = zone.stop - zone.start
            off = np.flatnonzero(memory[zone] != self.guards[:size])
            if not len(off):
                continue
            low = off[off < size // 2] if k < len(names) else off
            if k and len(low):
                return (f", after it wrote up to {low[-1] + 1} bytes beyond the end of "
                        f"{names[k - 1]}")
            return f", after it wrote from {size - off[0]} bytes before the start of {names[k]}"
        return ""


def as_cpu(value):
    """An array as a dense CPU tensor."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    return value.contiguous()


def raw(t):
    """A dense CPU tensor's bytes, in its own memory."""
    if not t.numel():
        return np.empty(0, np.uint8)
    return t.flatten().view(torch.uint8).numpy()


# ---- the process ----

class Host:
    """The process that a file of kernels runs in, begun anew where it is gone."""

    def __init__(self, file):
        self.file = str(file)
        self.memory = tempfile.TemporaryFile()
        self.faults = tempfile.TemporaryFile()
        self.shared = np.empty(0, np.uint8)
        self.random = np.frombuffer(os.urandom(2 * GUARD), np.uint8)
        self.process = None
        self.start()

    def start(self):
        """Begin, and learn what the file holds. ValueError where it cannot be used."""
        here, there = socket.socketpair()
        descriptors = there.fileno(), self.memory.fileno(), self.faults.fileno()
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            environment.setdefault("TRITON_INTERPRET", "1")
        self.faults.truncate(0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.inside", *map(str, descriptors), self.file],
            pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        there.close()
        self.connection = Connection(here.detach())
        threading.Thread(target=show, args=(self.process.stdout, self.file),
                         daemon=True).start()
        try:
            found = self.hear(LIMIT)
        except (EOFError, TimeoutError) as e:
            raise ValueError(f"{self.file}: its import {e}") from e
        if "error" in found:
            self.close()
            raise ValueError(found["error"])
        self.interpreted = found["interpreted"]
        self.functions = [SimpleNamespace(label=label, op=op, wanted=wanted, arrays=arrays)
                          for label, op, wanted, arrays in found["functions"]]

    def ask(self, request, limit):
        """The answer to a request."""
        if self.process is None:
            self.start()
        try:
            self.connection.send_bytes(pickle.dumps(request))
        except OSError:  # it went after its last answer
            raise EOFError(self.how_it_ended()) from None
        return self.hear(limit)

    def hear(self, limit):
        """What the process says. EOFError where it ends, TimeoutError where it is silent."""
        try:
            if self.connection.poll(limit):
                return json.loads(self.connection.recv_bytes(1 << 20))
        except (OSError, EOFError, ValueError):
            raise EOFError(self.how_it_ended()) from None
        self.close()
        raise TimeoutError(f"takes more than {limit:g} s")

    def how_it_ended(self):
        """Why a process does not answer any more, in words."""
        process = self.process
        try:
            code = process.wait(1.)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        line = self.last_line()
        if code is None:
            return "answered no more"
        if code >= 0:
            return f"ended its process with exit status {code}"
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return "was killed (SIGKILL), as where memory runs out"
        return f"crashed{line} ({name})"

    def last_line(self):
        """The line of the file in which the process crashed, where Python knows it."""
        self.faults.seek(0)
        for line in self.faults.read(1 << 16).decode(errors="replace").splitlines():
            if match := re.match(f' *File "{re.escape(os.path.abspath(self.file))}", (line \\d+)', line):
                return f" in {self.file}, {match[1]}"
        return ""

    def room(self, size):
        """Shared memory of at least so many bytes."""
        if len(self.shared) < size:
            self.memory.truncate(size)
            self.shared = np.frombuffer(mmap.mmap(self.memory.fileno(), size), np.uint8)
        return self.shared

    def noise(self):
        """Bytes for guards, others each time."""
        start = int.from_bytes(os.urandom(4)) % (GUARD - 256)
        return self.random[start:start + GUARD + 256]

    def close(self):
        """End the process and all that it began."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.connection.close()
        self.process = None


def show(stream, file):
    """Pass on what a file prints, the first of it."""
    left = PRINTED
    for text in iter(lambda: stream.read1(1 << 16), b""):
        if left > 0:
            sys.stderr.write(text[:left].decode(errors="replace"))
            left -= len(text)
            if left <= 0:
                sys.stderr.write(f"\n{file} prints more, which is not shown\n")
    stream.close()

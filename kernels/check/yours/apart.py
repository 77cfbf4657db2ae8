"""A file of kernels under check, in a process of its own that cannot say it is right.

`check` makes the rows. A call's arguments lie in memory that both processes see, each
between guards. Here, where no kernel runs, the results are compared with NumPy's, the
guards and every argument but out with what was written there. What the process is asked and
does not answer is a failed row: it crashed, it ended, it took too long.
"""

import fcntl
import json
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial

import numpy as np
import torch

from ... import OPS
from ...launch import dtype_name
from ..cases import BEYOND, cases_of
from ..compare import kind_of, row_of, same_bits
from ..explain import compared
from . import Function, absolute, available, drawn, only, operands, require_known

LIMIT = 60.  # seconds that a call may take
START = 60.  # the same for a file's import
PATIENCE = 3.  # the same for a large case in Triton's interpreter
MOST = 1 << 20  # bytes of an answer
PRINTED = 4000  # characters of a file's output that are shown
GUARD = 1 << 18  # bytes either side of an array: more than any kernel's block
CALLS, SECONDS = 300, .6  # small calls at the end, at most so many, for about so long
COUNTER = {"seed", "sample", "step", "tag", "keys"}


def check(files, ops=None, dtypes=("float32",), seed=0, shapes=None, near=None):
    """Rows as check.check's, one by one: each function of the files, on every case of its
    op.

    shapes: these alone. near: compare.Near, for what is not meant to be equal. ValueError
    in one line where a file cannot be used.
    """
    hosts = {}
    try:
        for file in dict.fromkeys(files):
            hosts[str(file)] = Host(file)
        found = [f for host in hosts.values() for f in host.functions]
        functions = only(found, ops, [*hosts])
        for function in functions:
            if function.arrays == "numpy" and "bfloat16" in dtypes:
                raise ValueError(f"{function.file}: NumPy has no bfloat16; put "
                                 "ARRAYS = 'torch' into it")
        for function in functions:
            host = hosts[function.file]
            yield from check_function(host, function, dtypes, seed, shapes, near)
    finally:
        for host in hosts.values():
            host.close()
            host.memory.close()
            host.faults.close()


def check_function(host, function, dtypes, seed, shapes, near):
    """Rows of one function. The first case that its process does not answer is its last."""
    first = next(cases_of(function.op, dtypes, [(1, 1)]))
    try:
        require_known(function, handed(function, first))
    except ValueError as e:
        yield failure(function, first, "", str(e))
        return
    cases = cases_of(function.op, dtypes, shapes, seed, hard=shapes or ())
    if near:  # what overflows, or is NaN, by the order of its terms has no one answer
        cases = (case for case in cases if "special" not in case.note)
    beyond = [] if shapes else cases_of(function.op, dtypes, BEYOND, seed + 1)
    try:
        yield from rows_of_cases(host, function, cases, near)
        yield from rows_of_cases(host, function, beyond, near, large=True)
        for dtype in dtypes if not shapes else ():
            yield many_calls(host, function, dtype, seed, near)
    except Gone as e:
        yield e.row


def rows_of_cases(host, function, cases, near, large=False):
    """Rows of those cases that are a function's. Large ones are called once, and left where
    Triton's interpreter takes too long."""
    limit = PATIENCE if large and host.interpreted else LIMIT
    slow = set()
    for case in cases:
        if not fits(function, case):
            continue
        if case.shape in slow:
            yield not_run(function, case)
            continue
        try:
            for where in places(function):
                yield from rows_of(host, function, case, where, near, limit, once=large)
        except TimeoutError:
            slow.add(case.shape)
            yield not_run(function, case)


def not_run(function, case):
    """A row of what Triton's interpreter would take too long for."""
    shape = ",".join(map(str, case.shape))
    return row_of(function.op, function.label, case.dtype, case.shape, None,
                  f"takes more than {PATIENCE:g} s in Triton's interpreter; check it on a "
                  f"GPU, or --shape {shape}")


def many_calls(host, function, dtype, seed, near):
    """A row of many small calls, each another case: some go wrong after a while."""
    shape = 7, 13
    end = time.monotonic() + SECONDS
    count = 0
    cases = cases_of(function.op, [dtype], [shape] * CALLS, seed + 2)
    for case in filter(partial(fits, function), cases):
        if time.monotonic() > end or count == CALLS:
            break
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
    if case.parameters is not None:
        return True
    return "coef" in has and not needs & set(OPS[case.op].tried)


def places(function):
    """Where out is: a buffer of its own, and, where an op has an operand, that array."""
    if "out" not in function.wanted:
        return [""]
    if function.op not in OPS or not operands(function.op):
        return [", out of place"]
    return [", out of place", ", in place"]


# ---- one call ----

def rows_of(host, function, case, where, near, limit, once=False):
    """Rows of a case: called twice, with other guards, it returns the same and harms
    nothing. Gone where it is not answered, TimeoutError where it need not be."""
    failed = partial(failure, function, case, where)
    found = []
    for _ in range(1 if once else 2):
        call = Call(function, case, "in place" in where)
        try:
            found.append(call.results(host, limit))
        except TimeoutError as e:
            if limit < LIMIT:
                raise
            raise Gone(failed(f"{e}{call.damage(host)}")) from e
        except EOFError as e:
            given = ", ".join(call.given)
            raise Gone(failed(f"{e}, called with {given}{call.damage(host)}")) from e
        except RuntimeError as e:
            yield failed(str(e))
            return
    got, more = found[0], found[-1]
    draws = draws_itself(function)
    for row in compared(case, function.label, got, where=where, near=near, draws=draws):
        if draws and not row["passed"] and not COUNTER & set(function.wanted):
            row["explained"] = ("its noise cannot be the counter's: it asks for none of "
                                "seed, sample, step, tag")
        yield row
    if not all(map(same_bits, got, more)):
        yield failed("called again with the same arguments, it returns something else")


def failure(function, case, where, reason):
    """A failed row of a case that has no result to compare."""
    return row_of(function.op, function.label, case.dtype, case.shape, False,
                  f"{case.parts[0]}{where}: {reason}")


def draws_itself(function):
    """Whether a function has noise in it that it is not handed."""
    draws = OPS[function.op].noise if function.op in OPS else function.op != "norms"
    return draws and "z" not in function.wanted


class Gone(Exception):
    """A function's process did not answer. row: the failed row that says so."""

    def __init__(self, row):
        super().__init__(row["reason"])
        self.row = row


class Call:
    """A function's arguments for a case, and where they lie in memory.

    given: the arguments' names. arrays, values: what is shared, and what is sent. alias:
    the operand that out is, in place.
    """

    def __init__(self, function, case, in_place):
        have = handed(function, case)
        self.function = function.label, function.op
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
        self.guards = host.noise()
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
        return {"function": self.function, "size": self.size, "arrays": arrays,
                "values": self.values,
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
    """A size up to the next multiple of 256 bytes, which arrays begin at."""
    return -(-size // 256) * 256


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
        self.memory = shared_file()
        self.faults = tempfile.TemporaryFile()  # noqa: SIM115
        self.shared = np.empty(0, np.uint8)
        self.random = np.frombuffer(os.urandom(2 * GUARD), np.uint8)
        self.process = None
        self.asked = 0
        self.start()

    def start(self):
        """Begin, and learn what the file holds. ValueError where it cannot be used."""
        here, there = socket.socketpair()
        descriptors = there.fileno(), self.memory.fileno(), self.faults.fileno()
        names = map(str, descriptors)
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            environment.setdefault("TRITON_INTERPRET", "1")
        self.faults.truncate(0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.inside", *names, self.file],
            pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        there.close()
        self.connection = here
        here.settimeout(LIMIT)
        self.asked = 0
        self.printed = threading.Thread(target=show, daemon=True,
                                        args=(self.process.stdout, self.file))
        self.printed.start()
        try:
            found = self.hear(START)
        except (EOFError, TimeoutError) as e:
            raise ValueError(f"{self.file}: its import {e}") from e
        if "functions" not in found:
            self.close()
            raise ValueError(found["error"])
        self.interpreted = found["interpreted"]
        self.functions = [Function(*fields) for fields in found["functions"]]

    def ask(self, request, limit):
        """The answer to a request."""
        if self.process is None:
            self.start()
        self.asked += 1
        text = pickle.dumps(request | {"number": self.asked})
        try:
            self.connection.sendall(len(text).to_bytes(8, "little") + text)
        except OSError:  # it went after its last answer
            raise EOFError(self.how_it_ended()) from None
        return self.hear(limit)

    def hear(self, limit):
        """What the process says. EOFError where it ends, TimeoutError where it does not."""
        end = time.monotonic() + limit
        said = b""
        while time.monotonic() < end:
            ready, *_ = select.select([self.connection], [], [], .1)
            if not ready and self.process.poll() is not None:
                raise EOFError(self.how_it_ended())
            if not ready:
                continue
            part = self.heard()
            said += part
            if not part:
                raise EOFError(self.how_it_ended())
            if said.endswith(b"\n") or len(said) > MOST:
                return self.answer_of(said)
        self.close()
        raise TimeoutError(f"takes more than {limit:g} s")

    def heard(self):
        """The next bytes that the process says; none where there are no more."""
        try:
            return self.connection.recv(1 << 16)
        except OSError:
            return b""

    def answer_of(self, said):
        """The answer that was asked for. EOFError for anything else that was said."""
        with suppress(ValueError, TypeError, AttributeError, KeyError):
            answer = json.loads(said)
            results = [(str(dtype), tuple(map(int, shape)))
                       for dtype, shape in answer.get("results", ())]
            known = {"results", "functions"} & {*answer} or isinstance(answer["error"], str)
            if answer["number"] == self.asked and known:
                return answer | {"results": results} if results else answer
        self.close()
        raise EOFError("said what is no answer")

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
        text = self.faults.read(1 << 16).decode(errors="replace")
        for line in text.splitlines():
            if f'File "{absolute(self.file)}", line ' in line:
                number = line.rpartition(", line ")[2].split()[0]
                return f" in {self.file}, line {number}"
        return ""

    def room(self, size):
        """Shared memory of at least so many bytes."""
        if len(self.shared) < size:
            self.memory.truncate(size)
            view = mmap.mmap(self.memory.fileno(), size)
            self.shared = np.frombuffer(view, np.uint8)
        return self.shared

    def noise(self):
        """Bytes for guards, others each time."""
        start = int.from_bytes(os.urandom(4)) % (GUARD - 256)
        return self.random[start:start + GUARD + 256]

    def close(self):
        """End the process and what it began in its session."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self.printed.join(1.)
        self.process = None


def shared_file():
    """A file for two processes' memory; on Linux neither can make it smaller."""
    if not hasattr(os, "memfd_create"):
        return tempfile.TemporaryFile()
    file = os.fdopen(os.memfd_create("kernels", os.MFD_ALLOW_SEALING), "r+b")
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


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

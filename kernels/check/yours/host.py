"""The process that a file of kernels runs in, from outside: begun, asked, ended.

It shares memory with this one and answers requests, a line of JSON each. Whatever else it
says or does, a request ends: in its answer, EOFError or TimeoutError.
"""

import fcntl
import glob
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

import numpy as np
import torch

from . import Function, absolute

LIMIT = 60.  # seconds that a call may take
START = 60.  # the same for a file's import
MOST = 1 << 20  # bytes of an answer
PRINTED = 4000  # characters of a file's output that are shown


class Host:
    """The process that a file of kernels runs in, begun anew where it is gone. Without a
    file it has one function, None, that does nothing."""

    def __init__(self, file=None):
        self.file = None if file is None else str(file)
        self.memory = shared_file()
        self.faults = tempfile.TemporaryFile()  # noqa: SIM115
        self.shared = np.empty(0, np.uint8)
        self.process = None
        self.asked = 0
        self.start()

    def start(self):
        """Begin, and learn what the file holds. ValueError where it cannot be used."""
        here, there = socket.socketpair()
        descriptors = there.fileno(), self.memory.fileno(), self.faults.fileno()
        names = map(str, descriptors)
        files = [] if self.file is None else [self.file]
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            environment.setdefault("TRITON_INTERPRET", "1")
        self.faults.truncate(0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.inside", *names, *files],
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

    def stop(self):
        """Let the process and all that it began rest, as they are, until `go_on`."""
        known = []
        while found := [pid for pid in family(self.process.pid) if pid not in known]:
            signal_all(found, signal.SIGSTOP)
            known += found
        self.stopped = known
        with suppress(ChildProcessError):  # it has ended
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self):
        """Let what was stopped go on."""
        signal_all(self.stopped, signal.SIGCONT)

    def room(self, size):
        """Shared memory of at least so many bytes."""
        if len(self.shared) < size:
            self.memory.truncate(size)
            view = mmap.mmap(self.memory.fileno(), size)
            self.shared = np.frombuffer(view, np.uint8)
        return self.shared

    def close(self):
        """End the process and what it began."""
        if self.process is None:
            return
        began = family(self.process.pid)[1:]
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        signal_all(began, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self.printed.join(1.)
        self.process = None

    def __exit__(self, *_):
        """End it for good."""
        self.close()
        self.memory.close()
        self.faults.close()

    def __enter__(self):
        return self


def family(pid):
    """A process and all that descend from it, whatever their sessions: an orphan becomes
    the process's own child (inside.end_with_parent). Linux tells; elsewhere the process."""
    found = [pid]
    for one in found:
        for task in glob.glob(f"/proc/{one}/task/*/children"):
            with suppress(OSError), open(task) as children:
                found += map(int, children.read().split())
    return found


def signal_all(pids, number):
    """Send a signal to those that still are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


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

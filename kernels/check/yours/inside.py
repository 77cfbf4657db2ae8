"""The process that a file of kernels runs in: it loads the file and answers calls.

It is told where in shared memory the arguments lie, calls a function, puts the results
where it is told and says what they are. It has no expected result, and decides nothing.
For the clock, which is not here either, calls are made ready first and then run (bound.py).

    python -m minidiff.kernels.check.yours.inside CONNECTION MEMORY FAULTS [FILE]
"""

import ctypes
import faulthandler
import json
import mmap
import os
import pickle
import signal
import socket
import sys

import numpy as np
import torch

from ...launch import dtype_name
from . import device_of, load, short, tensors
from .bound import Bound

BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def main(connection, memory, faults, file=None):
    """Answer until the other end closes. Without a file there is a function that does
    nothing, None, to be bound and run."""
    end_with_parent()
    faulthandler.enable(int(faults))
    connection = socket.socket(fileno=int(connection))
    requests = connection.makefile("rb")
    sys.argv = [file]
    np.seterr(all="ignore")  # special values are among the operands

    def answer(number, **what):
        connection.sendall(json.dumps({"number": number, **what}).encode() + b"\n")

    try:
        found, interpreted = ([], False) if file is None else load(file)
    except ValueError as e:
        return answer(0, error=str(e))
    except BaseException as e:
        return answer(0, error=short(e, file))
    told = [(f.label, f.file, f.op, None, f.arrays, f.wanted) for f in found]
    answer(0, functions=told, interpreted=interpreted)
    functions = {(f.label, f.op): f.call for f in found} | {None: None}
    memory = Memory(int(memory))
    bound = None
    while True:
        size = int.from_bytes(requests.read(8), "little")
        if not size:
            return None
        request = pickle.loads(requests.read(size))
        number = request["number"]
        try:
            got = []
            if "calls" in request:
                bound = Bound(functions[request["function"]], memory, request)
            elif "run" in request:
                bound.run(**request["run"])
            elif "refresh" in request:
                memory.refresh()
            elif "give_back" in request:
                memory.give_back()
            else:
                got = called(functions[request["function"]], memory, request)
        except BaseException as e:
            answer(number, error=short(e, file))
        else:
            answer(number, results=got)


def end_with_parent():
    """Let Linux end this process where its parent has ended, however, and make it the
    parent of what its own children leave behind."""
    if sys.platform == "linux":
        set_death_signal, set_child_subreaper = 1, 36
        prctl = ctypes.CDLL(None).prctl
        prctl(set_death_signal, signal.SIGKILL)
        prctl(set_child_subreaper, 1)


def called(function, memory, request):
    """Call a function, its results put in their places. Returns their dtypes and shapes."""
    memory.take(request["size"], device_of(request["kind"]))
    arrays = memory.arrays(request["arrays"], request["kind"])
    got = function(**arrays, **request["values"])
    if got is None:
        got = arrays.get("out")
    got = tensors(got, len(request["results"]))
    memory.give_back()
    for tensor, place in zip(got, request["results"]):
        memory.put(tensor, *place)
    return [(dtype_name(t.dtype), tuple(t.shape)) for t in got]


class Memory:
    """What both processes see; where the arrays are a GPU's, a copy of it there."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        self.shared = b""
        self.there = None

    def take(self, size, device):
        """See so many bytes."""
        if len(self.shared) < size:
            self.shared = mmap.mmap(self.descriptor, size)
        self.there = None
        if device != "cpu":
            self.there = torch.empty(size, dtype=torch.uint8, device=device)
            self.refresh()

    def refresh(self):
        """Make a GPU's copy what the shared memory is."""
        if self.there is not None:
            whole = torch.frombuffer(self.shared, dtype=torch.uint8)
            self.there.copy_(whole[:len(self.there)])

    def array(self, start, dtype, shape, kind):
        """The array that begins at a byte, NumPy's or torch's."""
        size = getattr(torch, dtype).itemsize
        bits = np.ndarray(shape, BITS[size], self.shared, start)
        if kind == "numpy":
            return bits.view(dtype)
        if self.there is None:
            return torch.from_numpy(bits).view(getattr(torch, dtype))
        part = self.there[start:start + bits.nbytes]
        return part.view(getattr(torch, dtype)).view(shape)

    def arrays(self, places, kind):
        """{name: array}, one for each place: in place, out is x itself."""
        made = {place: self.array(*place, kind) for place in places.values()}
        return {name: made[place] for name, place in places.items()}

    def give_back(self):
        """What a GPU's copy holds, and what lies around it, once the GPU is done."""
        if self.there is not None:
            torch.cuda.synchronize()
            self.shared[:len(self.there)] = self.there.cpu().numpy().tobytes()

    def put(self, tensor, start, size):
        """A result's bytes, where it has as many as were expected."""
        if size and tensor.nbytes == size:
            words = tensor.contiguous().flatten().view(torch.uint8)
            self.shared[start:start + size] = words.numpy().tobytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # whatever threads a kernel has left

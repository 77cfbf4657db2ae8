"""CUDA's driver: a compiled kernel is launched with arguments that were looked at once.

Triton's and CuPy's own launchers look at every argument in Python at every call, which
takes the host 30 microseconds. Here a call packs only the arguments that change.
"""

import ctypes
import sys
from functools import cache, partial
from typing import NamedTuple


class Kernel(NamedTuple):
    """A function that the driver has loaded, and what a launch of it needs.

    function: the driver's handle; threads: of a block; shared: bytes of shared memory.
    """

    function: int
    threads: int
    shared: int = 0


@cache
def _library():
    """The driver. Its functions are given C's own numbers; each returns an error."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _call(name, *arguments):
    """A function of the driver."""
    _check(name, getattr(_library(), name)(*arguments))


def _check(name, error):
    """RuntimeError in the driver's own words, where a function of it failed."""
    if error:
        words = ctypes.c_char_p()
        _library().cuGetErrorString(error, ctypes.byref(words))
        raise RuntimeError(f"{name}: {(words.value or str(error).encode()).decode()}")


@cache
def _context(index):
    """The device's primary context, which torch and CuPy use too."""
    device = ctypes.c_int()
    context = ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def load(device, cubin, name, threads, shared):
    """The Kernel of that name in machine code; it stays loaded."""
    module = ctypes.c_void_p()
    function = ctypes.c_void_p()
    _call("cuCtxPushCurrent_v2", _context(device.index))
    try:
        _call("cuModuleLoadData", ctypes.byref(module), cubin)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    return Kernel(function.value, threads, shared)


def packed(argument):
    """An argument as a number of 64 bits, of which the driver reads as many as the
    parameter has: a tensor's address, 0 for None, an int."""
    if argument is None:
        return 0
    if hasattr(argument, "data_ptr"):
        return argument.data_ptr()
    return argument


def prepare(device, kernel, blocks, arguments, first_step=0):
    """launch(step=0): the kernel on `blocks` blocks, on the device's current stream.

    arguments: tensors, None and integers, in the kernel's order, up to its last two: a step
    counter and what is added to it, first_step; null and the step where that is a number.
    launch holds what it launches; one thread at a time may call it.
    """
    import torch
    library = _library()
    index = device.index
    context = _context(index)
    counter = len(arguments)
    number = counter + 1
    values = [*map(packed, arguments), 0, 0, 0, 0]  # the last are Triton's own two, null
    held = (ctypes.c_uint64 * len(values))(*values)
    first = ctypes.addressof(held)
    end = first + ctypes.sizeof(held)
    pointers = (ctypes.c_void_p * len(values))(*range(first, end, 8))
    shape = blocks, 1, 1, kernel.threads, 1, 1, kernel.shared
    stream = ctypes.c_void_p()
    start = partial(  # C's numbers, made once: a call that makes them takes twice as long
        library.cuLaunchKernel, ctypes.c_void_p(kernel.function),
        *map(ctypes.c_uint, shape), stream, pointers, None)
    before = ctypes.byref(ctypes.c_void_p())
    current_stream = torch._C._cuda_getCurrentRawStream  # as Triton asks; no object is made

    def launch(step=0):
        counted = not isinstance(step, int)
        held[counter] = step.data_ptr() if counted else 0
        held[number] = first_step if counted else step
        stream.value = current_stream(index)
        _check("cuCtxPushCurrent", library.cuCtxPushCurrent_v2(context))
        error = start()
        library.cuCtxPopCurrent_v2(before)
        if error:
            _check("cuLaunchKernel", error)
    launch.holds = held, arguments
    return launch

"""CUDA's driver: a compiled kernel is launched with arguments that were looked at once.

Triton's and CuPy's own launchers look at every argument in Python at every call, which takes
the host 30 microseconds. Here a call packs only the arguments that change.
"""

import ctypes
import sys
from functools import cache
from typing import NamedTuple

import numpy as np


class Kernel(NamedTuple):
    """A function that the driver has loaded, and what a launch of it needs.

    function: the driver's handle; threads: of a block; shared: bytes of shared memory;
    owner: what unloads the function when nothing holds it any more.
    """

    function: int
    threads: int
    shared: int = 0
    owner: object = None


@cache
def _library():
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _call(name, *arguments):
    """A function of the driver. RuntimeError in the driver's own words where it fails."""
    error = getattr(_library(), name)(*arguments)
    if error:
        words = ctypes.c_char_p()
        _library().cuGetErrorString(error, ctypes.byref(words))
        raise RuntimeError(f"{name}: {(words.value or str(error).encode()).decode()}")


@cache
def _context(index):
    """The device's primary context, which torch and CuPy use too."""
    device = ctypes.c_int()
    context = ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def load(device, cubin, name, threads, shared):
    """The Kernel of that name in machine code; it stays loaded."""
    module = ctypes.c_void_p()
    function = ctypes.c_void_p()
    _call("cuCtxPushCurrent_v2", _context(device.index))
    try:
        _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin))
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    return Kernel(function.value, threads, shared)


def _packed(argument):
    """A tensor's address, a null pointer for None, a NumPy number as C's own."""
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, np.generic):
        return np.ctypeslib.as_ctypes_type(argument.dtype)(argument)
    return ctypes.c_void_p(argument.data_ptr())


def prepare(device, kernel, blocks, arguments):
    """launch(*last): the kernel on `blocks` blocks, on the device's current stream.

    arguments: tensors, None and NumPy numbers, in the kernel's order; `last` are those after
    them, which may change from call to call. What is launched is held by launch.
    """
    import torch
    context = _context(device.index)
    fixed = [_packed(a) for a in arguments]
    addresses = [ctypes.addressof(value) for value in fixed]
    function = ctypes.c_void_p(kernel.function)
    shape = [ctypes.c_uint(n) for n in (blocks, 1, 1, kernel.threads, 1, 1, kernel.shared)]

    def launch(*last):
        changing = [_packed(a) for a in last]
        every = [*addresses, *map(ctypes.addressof, changing)]
        pointers = (ctypes.c_void_p * len(every))(*every)
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        _call("cuCtxPushCurrent_v2", context)
        try:
            _call("cuLaunchKernel", function, *shape, stream, pointers, None)
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    launch.holds = fixed, arguments, kernel
    return launch

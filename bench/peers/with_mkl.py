"""Normal numbers of Intel's vector generators, from the package mkl's own library."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, files

import torch

SEQUENTIAL = 1  # of MKL's threading layers: a generator is one thread's anyway
BY_INVERSE = 2  # VSL_RNG_METHOD_GAUSSIAN_ICDF, the fastest of its methods
GENERATORS = {name: number << 20 for name, number in {  # VSL_BRNG_...
    "MCG59": 4, "MT2203": 9, "SFMT19937": 13, "ARS5": 15, "Philox": 16}.items()}


@cache
def library():
    """MKL's library, or None where the package is not installed."""
    try:
        found = files("mkl") or ()
    except PackageNotFoundError:
        return None
    names = [f for f in found if f.name.startswith(("libmkl_rt.", "mkl_rt."))]
    names = [f for f in names if f.suffix != ".lib"]
    if not names:
        return None
    mkl = ctypes.CDLL(str(names[0].locate()))
    mkl.MKL_Set_Threading_Layer(SEQUENTIAL)
    mkl.vsRngGaussian.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
                                  ctypes.c_void_p, ctypes.c_float, ctypes.c_float)
    return mkl


@cache
def pool(threads):
    """Threads that wait for work."""
    return ThreadPoolExecutor(threads)


def stream(generator, k):
    """The k-th of several independent streams of a generator, or None on a CPU without."""
    made = ctypes.c_void_p()
    member = k if generator == "MT2203" else 0  # of its family; the others differ in seed
    failed = library().vslNewStream(ctypes.byref(made), GENERATORS[generator] + member, 7 + k)
    return None if failed else made


def filler(out, generator, threads):
    """fill(std=1.) of out with a generator's normal numbers; None on a CPU without it."""
    count = out.numel()
    streams = [stream(generator, k) for k in range(threads)]
    if None in streams:
        return None
    bounds = [count * k // threads for k in range(threads + 1)]
    draw, start = library().vsRngGaussian, out.data_ptr()

    def part(k, std):
        first, last = bounds[k:k + 2]
        draw(BY_INVERSE, streams[k], last - first, start + 4 * first, 0., std)

    def fill(std=1.):
        if threads == 1:
            part(0, std)
        else:
            list(pool(threads).map(partial(part, std=std), range(threads)))
        return out
    return fill


def fillers(out, generators):
    """`filler` of each generator that this CPU has, on one thread and on all of torch's."""
    threads = {1, torch.get_num_threads()}
    return [*filter(None, (filler(out, g, n) for g in generators for n in threads))]

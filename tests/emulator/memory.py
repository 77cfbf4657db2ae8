"""A device's memory: the launch's own arrays, and who touched what of them since a barrier."""

import ctypes

import numpy as np


def check_races(loads, stores, equal=False):
    """RuntimeError if anything is stored by one and touched by another; lists of (addresses,
    bytes each, who, and of stores the bytes). equal: several may store the same."""
    unit = min((size for _, size, *_ in loads + stores), default=1)

    def units(log):
        at = [(a[:, None] + np.arange(0, size, unit)).ravel() for a, size, *_ in log]
        who = [w.repeat(size // unit) for _, size, w, *_ in log]
        return np.concatenate(at), np.concatenate(who)
    if stores:
        at, who = units(stores)
        value = np.concatenate([bytes_.reshape(-1, unit) for *_, bytes_ in stores])
        order = at.argsort(kind="stable")
        at, who, value = at[order], who[order], value[order]
        touched, by = units(stores + loads)
        first = np.minimum(at.searchsorted(touched), len(at) - 1)
        race = (at[first] == touched) & (who[first] != by)
        n = len(order)
        race[:n] &= not equal or (value[first[:n]] != value[order.argsort()]).any(1)
        if race.any():
            raise RuntimeError("a race: one stores what another touches")


class Memory:
    """Arrays at their own addresses, (start, bytes) each, and nothing between them.

    What is stored may be touched by one `who` alone until a barrier, by one block ever. In
    memory that is `shared` others may store the same, as Triton's sums across warps do.
    """

    def __init__(self, arrays, threads=1, shared=False):
        self.arrays = [(start, np.frombuffer((ctypes.c_uint8 * n).from_address(start), np.uint8))
                       for start, n in {*arrays} if n]
        self.loads, self.stores, self.before, self.threads = [], [], ([], []), threads
        self.shared = shared

    def parts(self, address, size, who, log, *more):
        """(which of the addresses, an array, its bytes there) for each array they lie in."""
        if (address % size).any():
            raise MemoryError(f"an access of {size} bytes is not aligned")
        left = np.ones(len(address), bool)
        for start, data in self.arrays:
            offset = address - start
            here = left & (offset >= 0) & (offset + size <= len(data))
            left &= ~here
            yield here, data, offset[here, None] + np.arange(size)
        if left.any():
            raise MemoryError(f"{left.sum()} accesses lie outside of every array")
        log.append((address, size, who, *more))

    def load(self, address, size, who):
        out = np.empty((len(address), size), np.uint8)
        for here, data, at in self.parts(address, size, who, self.loads):
            out[here] = data[at]
        return out

    def store(self, address, value, who):
        for here, data, at in self.parts(address, value.shape[1], who, self.stores, value):
            data[at] = value[here]

    def barrier(self, last=False):
        """RuntimeError for races since the last one; at the end also for those of blocks."""
        check_races(self.loads, self.stores, self.shared)
        for before, log in zip(self.before, (self.loads, self.stores)):
            before += [(at, size, who // self.threads, *more) for at, size, who, *more in log]
            log.clear()
        if last:
            check_races(*self.before, self.shared)

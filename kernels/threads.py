"""What a process or a thread has set, and the CPU's kernels must know or undo.

How many threads they may use, in a forked child too.

A fork copies no thread but its own. OpenMP would wait for ever for those that it had woken
before it, for torch or for us: they are the same. So a forked child works alone. Where it
was we who woke them, torch works alone in it too, as it does in the workers of a
DataLoader.

torch.set_flush_denormal turns subnormal results into 0 on the thread that calls it, and on
those that it wakes later. The contract keeps them.
"""

import os
from contextlib import contextmanager

import numpy as np

SMALLEST = np.float32(2.**-149)
ONE = np.float32(1)

woken = forked = False


def count():
    """Threads for an update of many elements."""
    global woken
    import torch
    woken = True
    return 1 if forked else torch.get_num_threads()


def in_child():
    """What a forked child does first."""
    global forked
    forked = True
    if woken:
        import torch
        torch.set_num_threads(1)


def flushes():
    """Whether this thread turns subnormals into 0."""
    return not SMALLEST * ONE


@contextmanager
def exact():
    """Within it this thread keeps subnormals. Where it flushed them torch works alone: its
    other threads flush on."""
    if not flushes():
        yield
        return
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
        torch.set_num_threads(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=in_child)

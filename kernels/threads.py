"""How many threads the CPU's kernels may use, in a forked child too.

A fork copies no thread but its own. OpenMP would wait for ever for those that it had woken
before it, for torch or for us: they are the same. So a forked child works alone. Where it
was we who woke them, torch works alone in it too, as it does in the workers of a
DataLoader.
"""

import os

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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=in_child)

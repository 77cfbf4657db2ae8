"""What is timed is what was compared.

Whole results on the timed tensors, before the clock and, with fresh data, after it. And nothing
that did its work is faster than its bytes.
"""

import torch

from .clock import clock, summary

CALLS = 3  # what takes less than so many calls' time is bound by calls, not by bytes
MARGIN = 1.1  # of the fastest rate seen
AFTER = "what was timed is not what was checked before"


def refresh(tensors, seed):
    """Other random numbers in the same memory."""
    for k, t in enumerate(tensors):
        random = torch.Generator(t.device).manual_seed(seed + k)
        t.copy_(torch.randn(t.shape, device=t.device, generator=random))


def yardsticks(t, arrays):
    """Calls whose times say how fast bytes move.

    They have as many arrays like t as a kernel, so that caches hold them as well or as badly. They
    read and write to another place, or in place, where a CPU need not fetch what it overwrites, or
    only write one. "call" moves nothing.
    """
    held = [torch.zeros_like(t) for _ in range(max(2, arrays))]
    pairs = list(zip(held, held[1:] + held[:1]))  # no copy onto itself, which would be none
    one, end = torch.zeros(2, dtype=t.dtype, device=t.device).split(1)

    def copied():
        for a, b in pairs:
            a.copy_(b)

    def negated():
        for a in held[:arrays]:
            a.neg_()

    def added():
        for a, b in pairs:
            a.add_(b)
    return {"copied": copied, "negated": negated, "added": added,
            "filled": lambda: held[0].fill_(1.), "zeroed": held[0].zero_,
            "call": lambda: end.copy_(one)}


def times_of(functions, device, seconds):
    """{name: median and quartiles} of one interleaved run."""
    return {name: summary(t) for name, t in clock(functions, device, seconds).items()}


def require_possible(op, name, time, moved, only_writes, size, arrays, times):
    """RuntimeError for what moves its bytes faster than anything moves that many.

    MARGIN over the fastest yardstick, quartile against quartile, apart from the time that the calls
    take; nothing is said of sizes where they take most of it.
    """
    pairs = max(2, arrays)
    passes = {"filled": 1, "zeroed": 1} if only_writes else {
        "copied": 2 * pairs, "negated": 2 * arrays, "added": 3 * pairs}
    calls = {"negated": arrays, "copied": pairs, "added": pairs, "filled": 1, "zeroed": 1}
    took = {n: times[n]["quartiles"][0] - calls[n] * times["call"]["quartiles"][1] for n in passes}
    if any(took[n] < CALLS * calls[n] * times["call"]["seconds"] for n in passes):
        return
    fastest = max(passes[n] * size / took[n] for n in passes)
    ratio = moved / time["quartiles"][1] / fastest
    if ratio > MARGIN:
        raise RuntimeError(f"{op}: {name} moves its bytes at {ratio:.1f} times the rate of "
                           f"{'writing' if only_writes else 'copying'} as many, and so has not "
                           "moved them; its time is not reported")

"""Medians and quartiles of functions timed in turn, each call synchronised."""

import random
import statistics
import time
from functools import partial

import numpy as np
import torch
from scipy.stats import quantile_test

SECONDS = .3  # of timing for each function, about
SAMPLE = 2e-3  # seconds that a sample lasts at least: short calls are timed many at once, and
# waking a second core, .5 ms here at times, is a small part
ROUNDS = 7  # at least
PAUSE = 2e-3  # seconds before a sample, for the threads of the function before to fall asleep
WARM = 2e-2  # seconds: what is shorter is called once more after the pause, untimed


def is_cuda(device):
    """Whether a device is a GPU."""
    return str(device).startswith("cuda")


def waiter(device):
    """What waits for a device to finish: nothing on a CPU."""
    if not is_cuda(device):
        return lambda: None
    return torch.cuda.synchronize


def once(f, wait, calls=1):
    """Seconds of one call, over `calls` of them."""
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        f()
    wait()
    return (time.perf_counter() - start) / calls


def clock(functions, device, seconds=SECONDS):
    """{name: seconds of a call, one a round}: every function in turn, again and again, in
    another order each round, so that none always follows the same neighbour: what that one
    leaves in the caches is a few per cent.

    A function in a process of its own (yours.Runner) times itself, and is awake when it
    does.
    """
    wait, order = waiter(device), list(functions)
    timed = {name: getattr(f, "seconds", partial(once, f, wait))
             for name, f in functions.items()}
    calls, short = {}, set()
    for name, f in functions.items():
        apart = hasattr(f, "seconds")
        timed[name]()
        took = timed[name]()
        if took < WARM:
            took = min(timed[name]() for _ in range(5))
            if not apart:
                short.add(name)
        took = max(took, 1e-7)
        calls[name] = f.most(took) if apart else max(1, min(1000, int(SAMPLE / took)))
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(times[order[0]]) < ROUNDS:
        random.shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            if name in short:
                functions[name]()
            times[name].append(timed[name](calls=calls[name]))
    return times


def summary(times):
    """The row's part: seconds (the median), quartiles, 95th percentile, how many rounds."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"seconds": middle, "quartiles": [low, high],
            "p95": float(np.quantile(times, .95)), "rounds": len(times)}


def interval(peer, ours):
    """(ratio, its 95 % interval) of two functions' times, round by round.

    The median of the rounds' ratios, between the order statistics that hold it with that
    probability whatever its distribution (binomial); None of fewer than six rounds.
    """
    ratios = np.divide(peer, ours)
    bounds = None
    if len(ratios) > 5:
        bounds = [*map(float, quantile_test(ratios, p=.5).confidence_interval(.95))]
    return float(np.median(ratios)), bounds

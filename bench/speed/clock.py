"""Medians and quartiles of functions timed in turn, each call synchronised."""

import statistics
import time

import torch

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
    """{name: seconds of a call, one a round}: every function in turn, again and again; a
    round starts one further on, so that none always follows the same neighbour."""
    wait, order = waiter(device), list(functions)
    for f in functions.values():
        f()
    calls, short = {}, set()
    for name, f in functions.items():
        took = once(f, wait)
        if took < WARM:
            short.add(name)
            took = min(once(f, wait) for _ in range(5))
        calls[name] = max(1, min(1000, int(SAMPLE / max(took, 1e-7))))
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(times[order[0]]) < ROUNDS:
        for name in order:
            time.sleep(PAUSE)
            if name in short:
                functions[name]()
            times[name].append(once(functions[name], wait, calls[name]))
        order.append(order.pop(0))
    return times


def summary(times):
    """The row's part: seconds (the median), quartiles and how many rounds."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"seconds": middle, "quartiles": [low, high], "rounds": len(times)}

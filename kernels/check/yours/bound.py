"""Calls of a function made ready, and run for a clock that is in another process.

Each has a place of its own for what it returns, so that a result says that its call was
made. What the function does not write there itself is put there before the run ends, and so
is what a library computes only when it is asked for.
"""

import numpy as np
import torch

from . import as_results, as_tensor, device_of


class Bound:
    """A function with the arguments of several calls.

    function: None does nothing. request: `kind` of arrays, `size` of memory, `values` that
    all calls share, and `calls`: places of arrays, values, and places of results.
    """

    def __init__(self, function, memory, request):
        self.memory = memory
        self.device = device_of(request["kind"])
        memory.take(request["size"], self.device)
        self.calls = []
        for call in request["calls"]:
            arrays = memory.arrays(call["arrays"], request["kind"])
            views = [memory.array(*place, request["kind"]) for place in call["results"]]
            arguments = arrays | request["values"] | call["values"]
            self.calls.append((arguments, views if function else []))
        self.function = function or nothing

    def run(self, count, values):
        """Make the first calls, with these values too, and wait for a GPU."""
        for arguments, views in self.calls[:count]:
            arguments.update(values)
            got = self.function(**arguments)
            if got is None:
                got = arguments.get("out")
            leave(got, arguments.get("out"), views)
        if self.device != "cpu":
            torch.cuda.synchronize()


def nothing(**_):
    """What is called for the way there and back alone: it has no result."""
    return ()


def leave(got, out, views):
    """Put results in their places, but out, which is there."""
    for value, view in zip(as_results(got, len(views)), views):
        if value is out and out is not None:
            continue
        if type(value) is np.ndarray and isinstance(view, np.ndarray):
            np.copyto(view, value, casting="no")
        elif isinstance(view, np.ndarray):
            np.copyto(view, as_tensor(value).numpy(), casting="no")
        else:
            view.copy_(value if isinstance(value, torch.Tensor) else as_tensor(value))

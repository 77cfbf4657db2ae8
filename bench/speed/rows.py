"""What a row of results is."""

import time

import numpy as np

from ...kernels import BACKENDS, OPS
from ...machine import machine
from ..peers import PEERS
from .clock import interval
from .state import state

MAIN_OP = next(op for op in OPS.values() if op.noise and len(op.operands) == 2 and not op.denoise)
UNKNOWN = ("seconds", "quartiles", "p95", "rounds", "bytes", "gb_per_s",
           "fraction_of_copy", "matches_reference", "within", "predicted_seconds",
           "compared", "clocks", "reason")
ELEMENTS = 1 << 20, 1 << 22, 1 << 24


def shape_of(elements, width=1024):
    """(n / width, width), one row below that."""
    return (elements // width, width) if elements >= width else (1, elements)


def row_of(op, backend, dtype, shape, **more):
    """A row with DESIGN's keys, what is not known as None."""
    return {"kind": "update", "op": op, "backend": backend, "dtype": dtype,
            "elements": int(np.prod(shape)), "shape": list(shape), **dict.fromkeys(UNKNOWN),
            "speedup": {}, "interval": {}, "given_z": False, "again": False,
            "machine": machine(), "state": state(),
            "date": time.strftime("%Y-%m-%d")} | more


def add_speedups(rows):
    """Each row's speedup, with its 95 % interval, from the rounds in `times`, which go.

    Contract backends and a user's functions race the peers, never another backend. What is
    given z has less to do: it races the peers that are given z too. A user's function
    races the first of them as well, and what is timed again races itself.
    """
    timed = [r for r in rows if r["seconds"]]
    times = [r.pop("times") for r in timed]
    first = next((r for r in timed if is_users(r)), None)
    for row, ours in zip(timed, times):
        for other, theirs in zip(timed, times):
            if other is row or other["given_z"] != row["given_z"] or other["again"]:
                continue
            peer = other["backend"] in PEERS and row["backend"] not in PEERS
            user = other is first and is_users(row)
            itself = other["backend"] == row["backend"]
            if itself if row["again"] else peer or user:
                ratio, bounds = interval(theirs, ours)
                row["speedup"][other["backend"]] = ratio
                row["interval"][other["backend"]] = bounds
    return rows


def is_ours(row):
    """Whether a row is of a contract backend, in a CUDA graph or not."""
    return row["backend"].removesuffix("_graph") in BACKENDS


def is_users(row):
    """Whether a row is of a function of a user's."""
    return not is_ours(row) and row["backend"] not in PEERS


def label(row):
    """Who a row is of, whether its noise was handed to it, and whether it is there
    already."""
    return row["backend"] + ", z given" * row["given_z"] + ", again" * row["again"]


def measured(rows):
    """Those that have a time."""
    return [r for r in rows if r["seconds"]]


def size(row):
    """Its shape, to be printed."""
    return "x".join(map(str, row["shape"]))


def times(row, peer):
    """A speedup and its interval, to be printed."""
    bounds = row["interval"].get(peer)
    between = f" ({bounds[0]:.3g}-{bounds[1]:.3g})" if bounds else ""
    return f"{row['speedup'][peer]:.3g}x{between}"


def over(row):
    """Its speedups, to be printed."""
    return ", ".join(f"{peer} {times(row, peer)}" for peer in row["speedup"])


def not_measured(rows, *keys):
    """A line for each reason, once, with whom it is of and where: a row's values of two
    keys."""
    found = {}
    for r in rows:
        if not r["seconds"]:
            found.setdefault((r[keys[0]], r["reason"]), {})[r[keys[1]]] = None
    return [f"not measured: {who}, {', '.join(where)}: {reason}"
            for (who, reason), where in found.items()]


def main_rows(rows):
    """Rows of the update x' = a x + b s + c z in float32, 1024 wide or one row, by size."""
    wanted = {"kind": "update", "op": MAIN_OP.name, "dtype": "float32", "given_z": False}
    found = [r for r in rows if wanted.items() <= r.items()
             and r["shape"][-1] in (1024, r["elements"])]
    return sorted(found, key=lambda r: r["elements"])

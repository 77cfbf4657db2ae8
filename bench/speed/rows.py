"""What a row of results is."""

import time

import numpy as np

from ...kernels import OPS
from ...machine import machine
from ..peers import PEERS

MAIN_OP = next(op for op in OPS.values() if op.noise and len(op.operands) == 2 and not op.denoise)
UNKNOWN = ("seconds", "quartiles", "rounds", "bytes", "gb_per_s", "fraction_of_copy",
           "matches_reference", "within", "predicted_seconds", "reason")
ELEMENTS = 1 << 20, 1 << 22, 1 << 24


def shape_of(elements, width=1024):
    """(n / width, width), one row below that."""
    return (elements // width, width) if elements >= width else (1, elements)


def row_of(op, backend, dtype, shape, **more):
    """A row with DESIGN's keys, what is not known as None."""
    return {"kind": "update", "op": op, "backend": backend, "dtype": dtype,
            "elements": int(np.prod(shape)), "shape": list(shape), **dict.fromkeys(UNKNOWN),
            "speedup": {}, "given_z": False, "machine": machine(),
            "date": time.strftime("%Y-%m-%d")} | more


def add_speedups(rows):
    """Each contract backend's speedup over each peer of these rows, never over another
    backend. What is given z has less to do: it races the peers that are given z too."""
    timed = measured(rows)
    for row in timed:
        if row["backend"] not in PEERS:
            row["speedup"] = {r["backend"]: r["seconds"] / row["seconds"] for r in timed
                              if r["backend"] in PEERS and r["given_z"] == row["given_z"]}
    return rows


def label(row):
    """Who a row is of, and whether its noise was handed to it."""
    return row["backend"] + ", z given" * row["given_z"]


def measured(rows):
    """Those that have a time."""
    return [r for r in rows if r["seconds"]]


def size(row):
    """Its shape, to be printed."""
    return "x".join(map(str, row["shape"]))


def over(row):
    """Its speedups, to be printed."""
    return ", ".join(f"{peer} {factor:.1f}x" for peer, factor in row["speedup"].items())


def not_measured(rows, *keys):
    """A line for each reason, once, with a row's values of two keys."""
    return list(dict.fromkeys(f"not measured: {r[keys[0]]}, {r[keys[1]]}: {r['reason']}"
                              for r in rows if not r["seconds"]))


def main_rows(rows):
    """Rows of the update x' = a x + b s + c z in float32, 1024 wide or one row, by size."""
    wanted = {"kind": "update", "op": MAIN_OP.name, "dtype": "float32", "given_z": False}
    found = [r for r in rows if wanted.items() <= r.items()
             and r["shape"][-1] in (1024, r["elements"])]
    return sorted(found, key=lambda r: r["elements"])

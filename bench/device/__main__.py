"""The claim that a CPU cannot prove: Triton and CuPy on a device return NumPy's bits.

    python -m minidiff.bench.device [PART or CALL ...] [--json FILE.json]

A part prints a line: what it did, and passed, FAILED, or why it could not run. Exit 1 on a
failure. The JSON is written anew after every part. A call is what fits into six minutes of
one GPU: `bits`, what is right, `speed`, how fast, `more`, what takes long or could leave
the GPU in a bad state.
"""

import argparse
import shutil
import subprocess
import sys
import time

import torch

from ...files import check_file, write_json
from ...machine import machine
from . import correct, speed
from .here import NAMES, why_not

VERDICTS = {True: "passed", False: "FAILED", None: "not run"}


def device():
    """What the figures came from, beside the machine's line."""
    p = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.max.mem,memory.total"
    smi = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], text=True,
                         capture_output=True).stdout if shutil.which("nvidia-smi") else ""
    return {"passed": True, "gpu": p.name, "multiprocessors": p.multi_processor_count,
            "l2_mb": p.L2_cache_size / 2**20, "memory_gb": p.total_memory / 1e9,
            "cuda": torch.version.cuda, "nvidia_smi": smi.splitlines()}


# rows have processes of their own, and leave what they compiled to those that follow
CALLS = {
    "bits": (device, correct.words, correct.square_root, correct.rows, correct.two_norms,
             correct.counters, correct.side_stream, correct.threads, correct.graph_replay,
             correct.corrector_replay, correct.training, speed.launches),
    "speed": (device, speed.rates, speed.in_graphs, speed.timing),
    "more": (device, correct.large, correct.all_stages, speed.whole_samplers, speed.keys,
             speed.variants, speed.loops, correct.sanitizer)}
PARTS = {part.__name__: part for parts in CALLS.values() for part in parts}
NEEDS = {"device": (), "rates": (), "square_root": ("cupy",)}  # the others both backends


def run(name):
    """A part's result: its own, or why it could not run, or how it broke."""
    start = time.perf_counter()
    result = {"passed": None, "reason": why_not(*NEEDS.get(name, NAMES))}
    if not result["reason"]:
        try:
            result = PARTS[name]()
        except Exception as e:  # one broken part must not hide the others
            result = {"passed": False, "reason": f"{type(e).__name__}: {e}"}
    return result | {"seconds": round(time.perf_counter() - start, 2)}


def chosen(names):
    """The parts of these names, and of calls among them, once; all where none is named."""
    found = []
    for name in names or CALLS:
        found += [part.__name__ for part in CALLS[name]] if name in CALLS else [name]
    return list(dict.fromkeys(found))


def main():
    """Run every part, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m minidiff.bench.device",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--json", "--out", metavar="FILE.json", help="where to write what was "
                        "found, such as bench/results/device/DATE-GPU.json")
    calls = "; ".join(f"{call}: {', '.join(part.__name__ for part in parts)}"
                      for call, parts in CALLS.items())
    parser.add_argument("parts", nargs="*", metavar="PART or CALL",
                        help=f"some of these, or all of a call (default: all). {calls}")
    args = parser.parse_args()
    for name in args.parts:
        if name not in (*PARTS, *CALLS):
            parser.error(f"{name!r} is none of {', '.join((*PARTS, *CALLS))}")
    if args.json:
        try:
            check_file("--json", args.json)
        except ValueError as e:
            parser.error(str(e))
    parts = {}
    results = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "parts": parts}
    for key, value in results["machine"].items():
        print(f"{key:<14}{value}")
    for name in chosen(args.parts):
        result = parts[name] = run(name)
        more = {k: v for k, v in result.items() if k not in ("passed", "rows", "seconds")}
        print(f"{name:<18}{VERDICTS[result['passed']]:<9}{result['seconds']:>7.1f} s  {more}",
              flush=True)
        if args.json:
            write_json(args.json, results)
    found = [result["passed"] for result in parts.values()]
    print(*(f"{found.count(value)} {word}" for value, word in VERDICTS.items()), sep=", ")
    return int(False in found)


if __name__ == "__main__":
    sys.exit(main())

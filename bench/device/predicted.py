"""How long each kernel should take on a GPU, from its machine code and published rates.

A kernel moves bytes and issues instructions. It takes as long as the longer of the two:

    seconds = max(bytes / (COPY * bandwidth), slots / (ISSUE * slots a second))

Bytes follow from the row, slots from the machine code that is made for the card here and
now: of an update with one row of coefficients, a number for its step, and aligned arrays.
Two shares were measured, on an H100: of its bandwidth a copy reaches COPY, and of its
issue slots a kernel that moves few bytes reaches ISSUE. All else is predicted, and held to
what an H100 and an H200 took (tests/bench/test_predicted.py).

Predictions are kept, and so are there before what they are held to is measured.
"""

import json
from functools import cache
from typing import NamedTuple

import torch

from ...kernels import OPS
from ...kernels.launch import Launch, Result
from ...machine import machine
from ..report.results import RESULTS
from . import compiled

COPY = .88
ISSUE = {"triton": .70, "cupy": .58}
ELEMENTS = 1 << 28
WIDTH = 1024


class Card(NamedTuple):
    """A GPU as NVIDIA publishes it.

    device: what it calls itself. architecture: 90 is sm_90. tera: float32 operations a
    second, 1e12, two a multiply-add. giga: bytes of memory a second, 1e9. floats, integers:
    issue slots for which a multiply-add, and an operation on integers, takes its pipe.
    """

    device: str
    architecture: int
    tera: float
    giga: float
    floats: int = 1
    integers: int = 2

    @property
    def slots(self):
        """Issue slots a second, each of one lane."""
        return self.tera / 2 * 1e12 * self.floats


CARDS = {  # of the forms on a board of their own, SXM, where there are several
    "A100": Card("NVIDIA A100-SXM4-80GB", 80, 19.5, 2039, floats=2),
    "H100": Card("NVIDIA H100 80GB HBM3", 90, 67., 3350),
    "H200": Card("NVIDIA H200", 90, 67., 4800),
    "B200": Card("NVIDIA B200", 100, 75., 8000),  # integers as Hopper's: not published
    "RTX5090": Card("NVIDIA GeForce RTX 5090", 120, 104.8, 1792, integers=1),
}


class Kernel(NamedTuple):
    """What a kernel is compiled for, beside its dtype."""

    operands: int
    draws: bool
    clips: bool = False
    result: int = Result.STATE
    rows: str = "all"

    @property
    def arrays(self):
        """How many arrays it reads and writes."""
        return self.operands + (self.result not in (Result.SQUARES, Result.TERMS))

    def launch(self, dtype):
        """A `Launch` of it, small."""
        x = torch.zeros(2, WIDTH, dtype=getattr(torch, dtype))
        weighted = self.result == Result.GRADIENT
        numbers = self.operands + self.draws + 4 * self.clips + weighted
        coef = torch.zeros(2 if self.rows == "sample" else 1, numbers)
        return Launch(x, [x] * self.operands, coef, self.rows, self.draws, self.clips,
                      self.result, seed=0, sample=0, tag=0)


KERNELS = {op.name: [Kernel(len(op.operands), op.noise, bool(op.denoise))]
           for op in OPS.values()}
KERNELS |= {"norms": [Kernel(1, False, result=Result.SQUARES)],
            "noise_norms": [Kernel(0, True, result=Result.SQUARES)],
            "dsm_loss": [Kernel(1, True, result=Result.GRADIENT, rows="sample")],
            "corrector": [Kernel(1, True, result=Result.TERMS),
                          Kernel(2, True, rows="sample")]}


@cache
def machine_code(kernel, dtype, backend, architecture, floats, integers):
    """(issue slots an element, registers a thread) of a Kernel."""
    code = compiled.COMPILERS[backend](kernel.launch(dtype), architecture)
    slots = compiled.slots_an_element(code, floats=floats, integers=integers)
    return slots, compiled.resources(code.cubin, code.name)["registers"]


def predicted(card, op, dtype, backend, elements=ELEMENTS):
    """A dict: op, dtype, backend, elements; bytes and slots an element, registers; seconds
    on the device, and which limit they come from, memory or issue."""
    width = getattr(torch, dtype).itemsize
    parts, limits, seconds = [], [], 0.
    for kernel in KERNELS[op]:
        slots, registers = machine_code(kernel, dtype, backend, card.architecture,
                                        card.floats, card.integers)
        each = kernel.arrays * width, slots, registers
        memory = each[0] / (COPY * card.giga * 1e9)
        issue = slots / (ISSUE[backend] * card.slots)
        parts.append(each)
        limits.append("memory" if memory > issue else "issue")
        seconds += max(memory, issue) * elements
    moved, slots, registers = zip(*parts)
    return {"op": op, "dtype": dtype, "backend": backend, "elements": elements,
            "bytes": sum(moved), "slots": sum(slots), "registers": max(registers),
            "seconds": seconds, "limit": "+".join(dict.fromkeys(limits))}


def card_here():
    """The name in CARDS of the GPU at hand, or None."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    return next((name for name, card in CARDS.items() if card.device == device), None)


def kept(name):
    """{(op, dtype, backend): seconds an element} of a card's predictions that are kept;
    none of another."""
    file = RESULTS / "device" / f"predicted-{name}.json".lower()
    if not file.exists():
        return {}
    rows = json.loads(file.read_text())["rows"]
    return {(r["op"], r["dtype"], r["backend"]): r["seconds"] / r["elements"] for r in rows}


def card_named(asked):
    """The name in CARDS that is meant; "here" is the GPU at hand. ValueError where none
    is."""
    names = {name.lower(): name for name in CARDS}
    found = card_here() if asked == "here" else names.get(asked.lower())
    if found:
        return found
    said = f"{asked} is not known"
    if asked == "here":
        here = torch.cuda.is_available() and torch.cuda.get_device_name()
        said = f"{here}, which is here, is not known" if here else "no GPU is here"
    raise ValueError(f"--kernels: {said}: name one of {', '.join(CARDS)}")


def predictions(asked, backends=None):
    """Every row's prediction for a card, float32 and bfloat16, printed as it comes: a line
    an op and dtype. Returns a dict: machine, card, rows.

    ValueError for a card that is not known, or where no backend is one that a GPU's
    kernels are compiled by; RuntimeError where none can compile here.
    """
    name = card_named(asked)
    card = CARDS[name]
    wanted = [backend for backend in ISSUE if backend in (backends or ISSUE)]
    if not wanted:
        raise ValueError(f"--backend: kernels of a GPU are those of {' and '.join(ISSUE)}")
    reasons = {backend: compiled.why_not_read(backend) for backend in wanted}
    absent = [f"{backend}: {reason}" for backend, reason in reasons.items() if reason]
    able = [backend for backend, reason in reasons.items() if not reason]
    if not able:
        raise RuntimeError("; ".join(absent))
    shares = " and ".join(f"{ISSUE[backend]:g} ({backend})" for backend in able)
    print(f"{card.device}: sm_{card.architecture}, {card.tera:g} TFLOP/s of float32 and "
          f"{card.giga:g} GB/s, as published")
    print(f"predicted for 2^{ELEMENTS.bit_length() - 1} elements in rows of {WIDTH}, without "
          "the host: the longer of")
    print(f"the bytes at {COPY:g} of that rate, and the issue slots at {shares} of all")
    print(*(f"not compiled: {said}" for said in absent), sep="\n", end="\n" * bool(absent))
    print(f"{'op':<20}{'dtype':<10}{'bytes':>5}" + "".join(
        f"{backend:>12}{'slots':>7}{'registers':>11}  {'limit':<12}" for backend in able))
    rows = []
    for op in KERNELS:
        for dtype in ("float32", "bfloat16"):
            found = [predicted(card, op, dtype, backend) for backend in able]
            columns = "".join(f"{r['seconds'] * 1e3:>9.3f} ms{r['slots']:>7.1f}"
                              f"{r['registers']:>11}  {r['limit']:<12}" for r in found)
            moved = found[0]["bytes"]
            print(f"{op:<20}{dtype:<10}{moved:>5}{columns}".rstrip(), flush=True)
            rows += found
    return {"machine": machine(), "card": name, "rows": rows}

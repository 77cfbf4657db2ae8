"""A kernel of your own: functions named like ops in a Python file, held to the same bits.

Each function names the arguments it wants and returns the result. There are
  the operands (x, s, ...; norms: x, dsm_loss: s), z, and out, a buffer to fill, which may
  be x itself: where it is filled, nothing need be returned;
  coef, float32, (K,) or one row a sample, and clip (p0, p1, lo, hi) where the op has it;
  the step's parameters, shape, seed, sample, step, tag; and in place of seed and sample
  keys, int64 (batch, 2), a seed and an id a row.
Only out may be written to. Arrays are NumPy's, or with ARRAYS = "torch" in the file
tensors, on the GPU if there is one. What is returned may be another library's array.
dsm_loss returns (value, gradient); norms and noise_norms one number a sample. langevin_v2
is another version of langevin.

Here a file is loaded, and what its functions may ask for is made; apart.py checks them.
"""

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .... import noise
from ... import OPS
from ..cases import SUMS
from ..compare import as_tuple, normals

KNOWN = *OPS, *SUMS
NAMED = re.compile(rf"({'|'.join(KNOWN)})(_v\d+)?")
STOPS = Exception, SystemExit


# ---- the file ----

@dataclass(frozen=True)
class Function:
    """A function of a file: its op, what to call, the arrays it takes and the names of its
    arguments (`arguments_of`). Outside its process there is nothing to call."""

    label: str
    file: str
    op: str
    call: Callable | None
    arrays: str
    wanted: dict

    @property
    def takes_z(self):
        """Whether it is handed its noise, rather than drawing it."""
        return "z" in self.wanted


def device_of(arrays):
    """Where arrays of a kind are, "numpy" or "torch"."""
    return "cuda" if arrays == "torch" and torch.cuda.is_available() else "cpu"


def load(file):
    """(the Functions of a file, whether it has Triton's kernels and there is no GPU).

    A function's label is the file, and its name where that has a version. ValueError in
    one line where the file cannot be used. It may import from its own folder.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--kernel {str(file)!r}: not a file")
    folder = os.path.dirname(absolute(file))
    sys.path.insert(0, folder)
    name = f"kernels of {absolute(file)}"
    before = {*sys.modules}
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"{file}: not a Python file, NAME.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except STOPS as e:
        raise ValueError(f"{file}: {short(e, file)}") from e
    for other in {*sys.modules} - before - {name}:  # another file may have its own
        source = getattr(sys.modules[other], "__file__", None) or ""
        if source.startswith(folder + os.sep):
            del sys.modules[other]
    arrays = getattr(module, "ARRAYS", "numpy")
    if arrays not in ("numpy", "torch"):
        raise ValueError(f"{file}: ARRAYS must be 'numpy' or 'torch', got {arrays!r}")
    found = []
    for name, call in vars(module).items():
        match = NAMED.fullmatch(name)
        ours = str(getattr(call, "__module__", "")).startswith("minidiff.")
        if match and callable(call) and not ours:
            op, version = match.groups()
            label = f"{file}:{name}" if version else str(file)
            wanted = arguments_of(call, f"{file}: {name}")
            found.append(Function(label, str(file), op, call, arrays, wanted))
    if not found:
        raise ValueError(f"{file} defines no function named like an op: {', '.join(KNOWN)}")
    kinds = {type(value).__module__ for value in vars(module).values()}
    is_triton = any(kind.startswith("triton.runtime") for kind in kinds)
    return found, is_triton and not torch.cuda.is_available()


def arguments_of(call, name):
    """{argument: whether it may be left out}. ValueError where they have no names."""
    try:
        found = inspect.signature(call).parameters.values()
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} does not tell its arguments' names; put a Python "
                         "function around it") from e
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    wanted = {p.name: p.default is not p.empty for p in found if p.kind in named}
    unnamed = [p for p in found if p.kind not in named and p.kind != p.VAR_KEYWORD]
    if unnamed or not wanted:
        raise ValueError(f"{name} must name each argument that it wants, and take it by "
                         "name")
    return wanted


def only(functions, ops, files):
    """Those of some ops, or all. ValueError where there is none."""
    kept = [f for f in functions if not ops or f.op in ops]
    if not kept:
        raise ValueError(f"{', '.join(files)} defines no {', '.join(ops)}; it has "
                         f"{', '.join(f.op for f in functions)}")
    return kept


@cache
def absolute(file):
    """A file's path as code compiled from it has it, from before the file is loaded."""
    return os.path.abspath(file)


def short(e, file=None):
    """An exception in one line, with the line of the file that it came from."""
    try:
        text = f"{type(e).__name__}: {e}".splitlines()[0][:300]
    except Exception:  # its own __str__ raises
        text = type(e).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    found, here = None, e.__traceback__
    while here:
        if file and here.tb_frame.f_code.co_filename == absolute(file):
            found = here.tb_lineno
        here = here.tb_next
    return f"{text} ({file}, line {found})" if found else text


# ---- what a function may ask for ----

def available(op, u, coef, parameters, counter):
    """{name: value} of all that a function may ask for, but z. u: the operands, or where
    the op has none a tensor of the result's shape."""
    have = dict(zip(operands(op), u))
    coef = np.array(coef, np.float32)
    if op in OPS and OPS[op].denoise:
        have["clip"] = coef[..., -4:]
        coef = coef[..., :-4]
    have["coef"] = coef
    have["out"] = torch.full_like(u[0], torch.nan)
    if op in ("norms", "noise_norms"):
        have["out"] = torch.full((len(u[0]),), torch.nan)
    have["keys"] = noise.keys(counter["seed"], counter["sample"], len(u[0]))
    return have | parameters | {"shape": tuple(u[0].shape)} | counter


def operands(op):
    """The names of a function's operands."""
    if op in OPS:
        return OPS[op].operands
    return ("s",) if op == "dsm_loss" else ("x",)


def require_known(function, have):
    """ValueError where a function needs an argument that there is not."""
    for argument, optional in function.wanted.items():
        if argument not in have and argument != "z" and not optional:
            names = ", ".join(dict.fromkeys(["z", *have]))
            raise ValueError(f"unknown argument {argument!r}; there are {names}")


def drawn(shape, counter):
    """The noise that a function is handed."""
    if noise.are_numbers(counter["seed"], counter["sample"]):
        return normals(tuple(shape), **counter).clone()  # kept from call to call
    return torch.from_numpy(noise.normal(shape, **counter))


# ---- what it returns ----

def as_results(got, count):
    """What a function returned, as a tuple of `count` results. TypeError where it has
    others."""
    if isinstance(got, list) and count > 1:
        got = tuple(got)
    got = as_tuple(got)
    if len(got) != count:
        raise TypeError(f"returned {len(got)} result{'s' * (len(got) != 1)}, not {count}")
    return got


def tensors(got, count):
    """What a function returned, as `count` CPU tensors. TypeError where it is not that."""
    return tuple(map(as_tensor, as_results(got, count)))


def as_tensor(value):
    """An array of any library, or a NumPy number, as a CPU tensor without its graph."""
    if np.ma.isMaskedArray(value):
        raise TypeError("returned a MaskedArray, whose mask would be lost")
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value, order="C"))
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value).cpu().clone()
    if hasattr(value, "__array__"):
        return torch.from_numpy(np.array(value))
    raise TypeError(f"returned a {type(value).__name__}, not an array or a tensor")

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

Here a file is loaded and a function called, for the clock; apart.py checks it.
"""

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from .... import noise
from ... import OPS
from ..cases import COUNTER, SUMS
from ..compare import as_tuple, normals

KNOWN = *OPS, *SUMS
NAMED = re.compile(rf"({'|'.join(KNOWN)})(_v\d+)?")
STOPS = Exception, SystemExit


# ---- the file ----

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


def given(value, arrays, device):
    """An array in the kind that a file asks for. Other values stay as they are."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device) if arrays == "torch" else value.cpu().numpy()


# ---- what it returns ----

def tensors(got, count):
    """What a function returned, as `count` CPU tensors. TypeError where it is not that."""
    if isinstance(got, list) and count > 1:
        got = tuple(got)
    got = as_tuple(got)
    if len(got) != count:
        raise TypeError(f"returned {len(got)} result{'s' * (len(got) != 1)}, not {count}")
    return tuple(map(as_tensor, got))


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


# ---- how fast is it ----

@dataclass(frozen=True)
class Function:
    """A function of a file: its op, what to call, the arrays it takes and the names of its
    arguments (`arguments_of`).

    Bound to its arguments once, it is called with fresh data in the same memory.
    """

    label: str
    file: str
    op: str
    call: Callable
    arrays: str
    wanted: dict

    @property
    def device(self):
        """Where its arrays are."""
        cuda = self.arrays == "torch" and torch.cuda.is_available()
        return "cuda" if cuda else "cpu"

    @property
    def takes_z(self):
        """Whether it is handed its noise, rather than drawing it."""
        return "z" in self.wanted

    def bind(self, u, coef, parameters, counter=COUNTER):
        """The function with its arguments, as a call without any."""
        if isinstance(coef, torch.Tensor):
            coef = coef.cpu().numpy()
        have = available(self.op, u, coef, parameters, counter)
        require_known(self, have)
        if self.takes_z:
            have["z"] = drawn(have["shape"], counter)
        return partial(self.call, **{
            argument: given(have[argument], self.arrays, self.device)
            for argument in self.wanted if argument in have})

    def results(self, call):
        """What a call returns, as CPU tensors."""
        got = call()
        if got is None:
            got = call.keywords.get("out")
        return tensors(got, 2 if self.op == "dsm_loss" else 1)

    def timed(self, call):
        """A call for the clock. What it raises becomes a RuntimeError that names the
        file."""
        def f():
            try:
                return call()
            except STOPS as e:
                raise RuntimeError(f"{self.file}: {short(e, self.file)}") from e
        return f

    def renewed(self, call, u, step):
        """What a call returns after `renew`, as CPU tensors; it raises as `timed` does."""
        self.renew(call, u, step)
        return self.timed(partial(self.results, call))()

    def renew(self, call, u, step):
        """Other operands, and noise of another step, in the very arrays of a call."""
        bound = call.keywords
        have = dict(zip(operands(self.op), u))
        if "z" in bound:
            counter = COUNTER | {"step": step}
            have["z"] = normals(tuple(u[0].shape), **counter)
        if "out" in bound:
            have["out"] = torch.tensor(torch.nan)
        for argument, value in have.items():
            array = bound.get(argument)
            if isinstance(array, np.ndarray):
                array[...] = value.cpu().numpy()
            elif array is not None:
                array.copy_(value)
        if "step" in bound:
            bound["step"] = step


class UserKernels:
    """The functions of some files, to be timed; `apart.check` has held them to the bits, or
    to what is near.

    ValueError as `load`'s, and where no function is one of the ops.
    """

    def __init__(self, *files, ops=None, near=None):
        self.files = [*dict.fromkeys(map(str, files))]
        loaded = [load(file) for file in self.files]
        found = [f for functions, _ in loaded for f in functions]
        self.functions = only(found, ops, self.files)
        self.interpreted = any(is_so for _, is_so in loaded)
        self.near = near

    @property
    def ops(self):
        """The names of their ops, each once."""
        return [*dict.fromkeys(f.op for f in self.functions)]

    def of(self, op):
        """The functions of an op."""
        return [f for f in self.functions if f.op == op]

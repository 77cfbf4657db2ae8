"""A kernel of your own: functions named like ops in a Python file, held to the same bits.

Each function names the arguments it wants and returns the result. There are
  the operands (x, s, ...; norms: x, dsm_loss: s), z, and out, a buffer to fill if it likes;
  coef, float32, (K,) or one row a sample, and clip (p0, p1, lo, hi) where the op has it;
  the step's parameters, shape, seed, sample, step, tag; and in place of seed and sample
  keys, int64 (batch, 2), a seed and an id a row.
Arrays are NumPy's, or with ARRAYS = "torch" in the file tensors, on the GPU if there is
one. dsm_loss returns (value, gradient); norms and noise_norms one number a sample.
"""

import inspect
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ... import noise
from .. import OPS
from . import COUNTER, SHAPES, SUMS, sum_cases, update_cases
from .compare import as_tuple, normals, row_of


class UserKernels:
    """The functions of a file. ValueError in one line where the file cannot be used.

    `check` makes rows, as check.check does. The rest serves the clock: a function is bound
    to its arguments once, and called with fresh data in the same memory.
    """

    def __init__(self, file, ops=None):
        if not Path(file).is_file():
            raise ValueError(f"{file}: not a file")
        try:
            names = runpy.run_path(str(file))
        except (Exception, SystemExit) as e:
            raise ValueError(f"{file}: {short(e)}") from e
        self.file = str(file)
        self.arrays = names.get("ARRAYS", "numpy")
        known = *OPS, *SUMS
        found = {name: f for name, f in names.items() if name in known and callable(f)}
        self.functions = {name: found[name] for name in found if not ops or name in ops}
        if not found:
            raise ValueError(f"{file} defines no function named like an op: "
                             f"{', '.join(known)}")
        if not self.functions:
            raise ValueError(f"{file} defines no {', '.join(ops)}; "
                             f"it has {', '.join(found)}")
        if self.arrays not in ("numpy", "torch"):
            raise ValueError(f"{file}: ARRAYS must be 'numpy' or 'torch', "
                             f"got {self.arrays!r}")
        cuda = self.arrays == "torch" and torch.cuda.is_available()
        self.device = "cuda" if cuda else "cpu"

    # ---- is it right ----

    def check(self, dtypes=("float32",), seed=0):
        """Rows as check's: each function on every case of its op.

        What a function raises is the reason of a failed row.
        """
        if self.arrays == "numpy" and "bfloat16" in dtypes:
            raise ValueError(f"{self.file}: NumPy has no bfloat16; "
                             "put ARRAYS = 'torch' into it")
        for name in self.functions:
            for case in self._cases(name, dtypes, seed):
                try:
                    got = self._returned(case)
                except (Exception, SystemExit) as e:
                    yield row_of(name, self.file, case.dtype, case.shape, False, short(e))
                else:
                    yield from case.rows(self.file, got)

    def _cases(self, name, dtypes, seed):
        """The cases of a function's op; of a seed a row only where it wants keys."""
        cases = sum_cases([name], dtypes, SHAPES)
        if name in OPS:
            cases = update_cases(OPS[name], dtypes, SHAPES, seed)
        wants_keys = "keys" in inspect.signature(self.functions[name]).parameters
        for case in cases:
            if wants_keys or isinstance(case.counter["seed"], int):
                yield case

    def _returned(self, case):
        """What the function returns for a case, as CPU tensors."""
        like = case.u or case.expected
        u = [v.clone() for v in like]  # to overwrite, if it likes
        call = self.bind(case.op, u, case.coef, case.parameters, case.counter)
        return self.results(call, len(case.expected))

    # ---- a call and its results ----

    def bind(self, name, u, coef, parameters, counter=COUNTER):
        """The op's function with its arguments, as a call without any.

        u: the operands; where the op has none, a tensor of the result's shape. ValueError
        where the function wants an argument that there is not.
        """
        wanted = inspect.signature(self.functions[name]).parameters
        have = self._arguments(name, u, coef, parameters, counter)
        if "z" in wanted:
            have["z"] = drawn(have["shape"], counter)
        for argument, parameter in wanted.items():
            rest = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            optional = rest or parameter.default is not parameter.empty
            if argument not in have and not optional:
                raise ValueError(f"{name}: unknown argument {argument!r}; there are z, "
                                 f"{', '.join(have)}")
        given = {argument: self.give(have[argument]) for argument in wanted
                 if argument in have}
        return partial(self.functions[name], **given)

    def _arguments(self, name, u, coef, parameters, counter):
        """{name: value} of all that a function may ask for, but z."""
        have = dict(zip(self.operands(name), u))
        if isinstance(coef, torch.Tensor):
            coef = coef.cpu().numpy()
        coef = np.array(coef, np.float32)
        if name in OPS and OPS[name].denoise:
            have["clip"] = coef[..., -4:]
            coef = coef[..., :-4]
        have["coef"] = coef
        have["out"] = torch.full_like(u[0], torch.nan)
        have["keys"] = noise.keys(counter["seed"], counter["sample"], len(u[0]))
        return have | parameters | {"shape": tuple(u[0].shape)} | counter

    def operands(self, name):
        """The names of a function's operands."""
        if name in OPS:
            return OPS[name].operands
        return ("s",) if name == "dsm_loss" else ("x",)

    def give(self, value):
        """An array in the kind that the file asks for. Other values stay as they are."""
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(value, torch.Tensor):
            return value
        if self.arrays == "torch":
            return value.to(self.device)
        return value.cpu().numpy()

    def results(self, call, count):
        """What a call returns, as `count` CPU tensors. TypeError where it is not that."""
        got = as_tuple(call())
        for value in got:
            if not isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
                kind = type(value).__name__
                raise TypeError(f"returned a {kind}, not an array or a tensor")
        if len(got) != count:
            raise TypeError(f"returned {len(got)} results, not {count}")
        return tuple(to_cpu(value) for value in got)

    # ---- how fast is it ----

    def takes_z(self, name):
        """Whether a function is handed its noise, rather than drawing it."""
        return "z" in inspect.signature(self.functions[name]).parameters

    def timed(self, call):
        """A call for the clock.

        What it raises becomes a RuntimeError that names the file.
        """
        def f():
            try:
                return call()
            except (Exception, SystemExit) as e:
                raise RuntimeError(f"{self.file}: {short(e)}") from e
        return f

    def renewed(self, call, name, u, step):
        """What a call returns after `renew`, as CPU tensors; it raises as `timed` does."""
        self.renew(call, name, u, step)
        count = 2 if name == "dsm_loss" else 1
        return self.timed(partial(self.results, call, count))()

    def renew(self, call, name, u, step):
        """Other operands, and noise of another step, in the very arrays of a call."""
        given = call.keywords
        have = dict(zip(self.operands(name), u))
        if "z" in given:
            counter = COUNTER | {"step": step}
            have["z"] = normals(tuple(u[0].shape), **counter)
        if "out" in given:
            have["out"] = torch.full_like(u[0], torch.nan)
        for argument, value in have.items():
            array = given.get(argument)
            if isinstance(array, np.ndarray):
                array[...] = value.cpu().numpy()
            elif array is not None:
                array.copy_(value)
        if "step" in given:
            given["step"] = step


def drawn(shape, counter):
    """The noise that a function is handed, which it may overwrite."""
    if isinstance(counter["seed"], int):
        return normals(shape, **counter).clone()  # kept from call to call
    return torch.from_numpy(noise.normal(shape, **counter))


def to_cpu(value):
    """An array, a NumPy number or a tensor as a CPU tensor, without its graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return torch.from_numpy(np.asarray(value))


def short(e):
    """An exception in one line."""
    return f"{type(e).__name__}: {e}".splitlines()[0]

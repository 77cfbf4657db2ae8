"""A kernel of your own: functions named like ops in a Python file, held to the same bits.

Each function names the arguments it wants and returns the result. There are
  the operands (x, s, ...; norms: x, dsm_loss: s), z, and out, a buffer to fill if it likes;
  coef, float32, (K,) or one row a sample, and clip (p0, p1, lo, hi) where the op has it;
  the step's parameters, shape, seed, sample, step, tag.
Arrays are NumPy's, or with ARRAYS = "torch" in the file tensors, on the GPU if there is
one. dsm_loss returns (value, gradient); norms and noise_norms one number a sample.
"""

import inspect
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import OPS
from . import COUNTER, SHAPES, SUMS, cases, sum_cases, sum_rows, sums_of
from .compare import as_tuple, compare, normals, row_of


def short(e):
    """An exception in one line."""
    return f"{type(e).__name__}: {e}".splitlines()[0]


class UserKernels:
    """The functions of a file. ValueError in one line where the file cannot be used."""

    def __init__(self, file, ops=None):
        if not Path(file).is_file():
            raise ValueError(f"{file}: not a file")
        try:
            names = runpy.run_path(str(file))
        except (Exception, SystemExit) as e:
            raise ValueError(f"{file}: {short(e)}") from e
        self.file, self.arrays = str(file), names.get("ARRAYS", "numpy")
        found = {n: f for n, f in names.items() if n in (*OPS, *SUMS) and callable(f)}
        self.functions = {n: f for n, f in found.items() if not ops or n in ops}
        if not found:
            raise ValueError(f"{file} defines no function named like an op: "
                             f"{', '.join((*OPS, *SUMS))}")
        if not self.functions:
            raise ValueError(f"{file} defines no {', '.join(ops)}; it has {', '.join(found)}")
        if self.arrays not in ("numpy", "torch"):
            raise ValueError(f"{file}: ARRAYS must be 'numpy' or 'torch', got {self.arrays!r}")
        cuda = self.arrays == "torch" and torch.cuda.is_available()
        self.device = "cuda" if cuda else "cpu"

    def give(self, v):
        """An array in the kind that the file asks for."""
        if not isinstance(v, (np.ndarray, torch.Tensor)):
            return v
        v = v if isinstance(v, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(v))
        return v.to(self.device) if self.arrays == "torch" else v.cpu().numpy()

    def takes_z(self, name):
        """Whether a function is handed its noise, rather than drawing it."""
        return "z" in inspect.signature(self.functions[name]).parameters

    def bind(self, name, u, coef, parameters):
        """The op's function with its arguments, as a call without any."""
        op, first = OPS.get(name), u[0]
        have = dict(zip(self.operands(name), u))
        coef = coef.cpu().numpy() if isinstance(coef, torch.Tensor) else np.asarray(coef)
        coef = coef.astype(np.float32)
        if op and op.denoise:
            have["clip"], coef = coef[..., -4:], coef[..., :-4]
        have |= {"coef": coef, "out": torch.full_like(first, torch.nan), **parameters,
                 "shape": tuple(first.shape), **COUNTER}
        wanted = inspect.signature(self.functions[name]).parameters
        if "z" in wanted:
            have["z"] = normals(tuple(first.shape), **COUNTER).clone()
        unknown = [n for n, w in wanted.items() if n not in have and w.default is w.empty
                   and w.kind not in (w.VAR_POSITIONAL, w.VAR_KEYWORD)]
        if unknown:
            raise ValueError(f"{name}: unknown argument {unknown[0]!r}; there are z, "
                             f"{', '.join(have)}")
        given = {n: self.give(have[n]) for n in wanted if n in have}
        return partial(self.functions[name], **given)

    def operands(self, name):
        """The names of a function's operands."""
        if name in OPS:
            return OPS[name].operands
        return ("s",) if name == "dsm_loss" else ("x",)

    def renew(self, call, name, u, step):
        """Other operands, and noise of another step, in the very arrays of a call."""
        have, given = dict(zip(self.operands(name), u)), call.keywords
        if "z" in given:
            have["z"] = normals(tuple(u[0].shape), **COUNTER | {"step": step})
        if "out" in given:
            have["out"] = torch.full_like(u[0], torch.nan)
        for n, v in have.items():
            array = given.get(n)
            if isinstance(array, np.ndarray):
                array[...] = v.cpu().numpy()
            elif array is not None:
                array.copy_(v)
        if "step" in given:
            given["step"] = step

    def results(self, call, count):
        """What a call returns, as `count` CPU tensors."""
        got = as_tuple(call())
        for v in got:
            if not isinstance(v, (np.ndarray, np.generic, torch.Tensor)):
                raise TypeError(f"returned a {type(v).__name__}, not an array or a tensor")
        if len(got) != count:
            raise TypeError(f"returned {len(got)} results, not {count}")
        return tuple(v.detach().cpu() if isinstance(v, torch.Tensor) else
                     torch.from_numpy(np.asarray(v)) for v in got)

    def renewed(self, call, name, u, step):
        """What a call returns after `renew`, as CPU tensors; it raises as `timed` does."""
        self.renew(call, name, u, step)
        count = 2 if name == "dsm_loss" else 1
        return self.timed(partial(self.results, call, count))()

    def timed(self, call):
        """A call for the clock: what it raises becomes a RuntimeError that names the
        file."""
        def f():
            try:
                return call()
            except (Exception, SystemExit) as e:
                raise RuntimeError(f"{self.file}: {short(e)}") from e
        return f

    def check(self, dtypes=("float32",), seed=0):
        """Rows as check's: each function on every case of its op."""
        if self.arrays == "numpy" and "bfloat16" in dtypes:
            raise ValueError(f"{self.file}: NumPy has no bfloat16; put ARRAYS = 'torch' into it")
        for name in self.functions:
            for dtype, shape, u, coef, p, want, rows in self._cases(name, dtypes, seed):
                try:
                    call = self.bind(name, [v.clone() for v in u], coef, p)
                    got = self.results(call, len(want))
                except (Exception, SystemExit) as e:
                    yield row_of(name, self.file, dtype, shape, False, short(e))
                else:
                    yield from rows(got)

    def _cases(self, name, dtypes, seed):
        """dtype, shape, operands, coef, parameters, NumPy's results, what compares with
        them."""
        if name in OPS:
            for dtype, shape, how, u, p, coef, want in cases(OPS[name], dtypes, SHAPES, seed):
                yield dtype, shape, u or [want], coef, p, (want,), \
                    lambda got, a=(dtype, shape), b=(want, how): [
                        compare(name, self.file, *a, *got, *b)]
        else:
            for dtype, shape, s, coef in sum_cases(dtypes, SHAPES):
                want = sums_of(name, s, coef, "numpy", **COUNTER)
                yield dtype, shape, [s], coef, {}, want, partial(
                    sum_rows, name, self.file, dtype, shape, want)

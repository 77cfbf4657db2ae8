"""The engine of the sampling loops: the reference's steps, fused, their noise inside."""

import threading

import numpy as np

from ..engine import Engine, at, draws, usable
from .arguments import HOLDS, Rows, as_tensor, is_counter, rows_of
from .launch import keys_of
from .sums import both_norms, noise_norms, norms
from .table import lookup
from .updates import update

SCHEDULES = 64  # tables that an engine keeps on its device; a loop has up to four


class Fused(Engine):
    """The engine of minidiff.samplers' loops on a backend.

    It computes a step's coefficients once a schedule, and then does one fused update a
    step. k may be a 0-d int64 tensor on the device: nothing waits for it, and a step
    captured in a CUDA graph replays the schedule; the loop adds 1 to it after the step.
    seed, sample, normal: as in `Engine`; normal returns arrays like x.

    Example: *_, x = reverse_sde(score, x, VP(), times, Fused(seed=0))
    """

    def __init__(self, seed=0, sample=0, backend="auto", normal=None):
        super().__init__(seed, sample, normal)
        self.backend = backend

    def fresh(self):
        """As an Engine's; and what is kept on a device, and by a thread."""
        return super().fresh() | {"kept": threading.local(), "tables": {}, "keys": {}}

    def __copy__(self):
        """Another run of the same noise, which uploads nothing that this one has."""
        other = type(self).__new__(type(self))
        other.__setstate__(self.__getstate__())
        other.tables = dict(self.tables)
        other.keys = dict(self.keys)
        return other

    def _uploaded(self, given, u):
        """The Rows of a schedule where its operands u are.

        The last SCHEDULES of an engine are kept: a loop that has run before uploads
        nothing, so that a CUDA graph can capture a copy's loop whole. The graph reads them
        for as long as it is replayed: keep the engine, and use it for no more than that.
        """
        k = len(u)
        like = as_tensor("x", u[0])
        key = str(like.device), k, given.shape, given.tobytes()
        if key not in self.tables:
            while len(self.tables) >= SCHEDULES:
                self.tables.pop(next(iter(self.tables)))
            self.tables[key] = rows_of(given, k, HOLDS[k], like, "step")
        return self.tables[key]

    def _draw(self, x):
        """The seed and sample of noise like x; integers a row are uploaded once."""
        seed = self.seed
        if self.by_row:
            like = as_tensor("x", x)
            where = like.device
            if where not in self.keys:
                *_, self.keys[where] = keys_of(seed, self.sample, like)
            seed = self.keys[where]
        return {"seed": seed, "sample": self.sample, "backend": self.backend}

    def __call__(self, step, tag, steps=None, denoise=None, clip=None, **parameters):
        """move(k, *operands), step k of N; parameters are numbers or arrays (N,).

        steps: a range to claim, as in `samplers.Reference`.
        """
        op = lookup(step, denoise)
        given = op.coefficients(clip, **parameters)
        names = (*op.operands, "z")
        first = self.claim(tag, steps) if draws(op.step, given) else 0
        known = None

        def move(k, *u):
            nonlocal known
            op.require(u)
            draw = self._draw(u[0])
            if op.noise and self.normal:
                z = self.normal(tuple(u[0].shape), first + k, tag)
                u = (*u, z)
            if known is None:
                known = self._uploaded(given, u)
            rows = known
            if known.kind == "step" and not is_counter(k):
                rows = Rows(known.coef[k].unsqueeze(0), "all", known.draws, known.clips)
            return update(u, rows, step=k, first_step=first, tag=tag, names=names,
                          **draw)
        return move

    def corrector(self, step, rule, tag, steps=None, **parameters):
        """correct(k, x, s): in place, x becomes step(x, s, z, eps), a step size a sample.

        eps = rule(|z_b|, |s_b|, **parameters), kept on the device. A CPU keeps float32 z
        for the step. 16 bits would round it, and a GPU makes it sooner than it reads it:
        there z is drawn again.
        """
        first = self.claim(tag, steps)

        def correct(k, x, s):
            n = first + k if first else k  # a counter's own, where nothing is added
            draw = self._draw(x) | {"step": n, "tag": tag}
            if self.normal:
                z = self.normal(tuple(x.shape), n, tag)
                both = [norms(u, backend=self.backend) for u in (z, s)]
            else:
                z = self._buffer(x)
                both = drawn_norms(s, z, draw)
            xp, device = np, "cpu"  # its steps are short, on a CPU
            if getattr(x, "is_cuda", False):
                import torch as xp
                device = x.device
            float64 = {"dtype": xp.float64, "device": device}
            both = [xp.asarray(norm, **float64) for norm in both]
            with np.errstate(divide="ignore", over="ignore"):
                eps = xp.asarray(rule(*both, **at(k, parameters)))
            eps = usable(eps, xp)
            units = xp.eye(3, **float64).reshape(3, 3, *[1] * eps.ndim)
            rows = xp.moveaxis(step(*units, eps=eps), 0, -1)  # all three at once
            u = [x, s] if z is None else [x, s, z]
            names = "x", "s", "z"
            return update(u, rows, out=x, names=names, rows="sample", **draw)
        return correct

    def _buffer(self, x):
        """Memory for noise like x, kept by each thread; None on a GPU and for 16 bits."""
        if "float32" not in str(x.dtype) or getattr(x, "is_cuda", False):
            return None
        kind = type(x), x.dtype, x.shape
        if getattr(self.kept, "kind", None) != kind:
            import torch
            xp = np if isinstance(x, np.ndarray) else torch
            self.kept.kind = kind
            self.kept.z = xp.empty_like(x)
        return self.kept.z


def drawn_norms(s, z, draw):
    """(|z_b|, |s_b|) of noise, which stays in z where that is memory, and of a score."""
    if z is None:
        return both_norms(s, **draw)
    return noise_norms(s, out=z, **draw), norms(s, backend=draw["backend"])

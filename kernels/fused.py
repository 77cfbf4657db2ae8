"""The engine of the sampling loops: the reference's steps, fused, their noise inside."""

import threading

import numpy as np

from .arguments import HOLDS, Rows, as_tensor, is_counter, rows_of
from .sums import noise_norms, norms
from .table import lookup
from .updates import update

SCHEDULES = 64  # tables that an engine keeps on its device; a loop has up to four


class Fused:
    """The engine of minidiff.samplers' loops on a backend.

    It computes a step's coefficients once a schedule, and then does one fused update a
    step. k may be a 0-d int64 tensor on the device: nothing waits for it, and a step
    captured in a CUDA graph replays the schedule; the loop adds 1 to it after the step.
    normal(shape, k, tag), if given, is the noise's source instead: arrays like x.

    Example: *_, x = reverse_sde(score, x, VP(), times, Fused(seed=0))
    """

    def __init__(self, seed=0, sample=0, backend="auto", normal=None):
        self.draw = {"seed": seed, "sample": sample, "backend": backend}
        self.backend = backend
        self.normal = normal
        self.kept = threading.local()
        self.tables = {}

    def _uploaded(self, given, u):
        """The Rows of a schedule where its operands u are.

        The last SCHEDULES of an engine are kept: a loop that has run before uploads
        nothing, so that a CUDA graph can capture it whole. The graph reads them for as long
        as it is replayed: keep the engine, and use it for no more than that.
        """
        k = len(u)
        like = as_tensor("x", u[0])
        key = str(like.device), k, given.shape, given.tobytes()
        if key not in self.tables:
            while len(self.tables) >= SCHEDULES:
                self.tables.pop(next(iter(self.tables)))
            self.tables[key] = rows_of(given, k, HOLDS[k], like, "step")
        return self.tables[key]

    def __call__(self, step, tag, denoise=None, clip=None, **parameters):
        """move(k, *operands), step k of N; parameters are numbers or arrays (N,)."""
        op = lookup(step, denoise)
        given = op.coefficients(clip, **parameters)
        names = (*op.operands, "z")
        known = None

        def move(k, *u):
            nonlocal known
            op.require(u)
            if op.noise and self.normal:
                u = (*u, self.normal(tuple(u[0].shape), k, tag))
            if known is None:
                known = self._uploaded(given, u)
            rows = known
            if known.kind == "step" and not is_counter(k):
                rows = Rows(known.coef[k].unsqueeze(0), "all", known.draws, known.clips)
            return update(u, rows, step=k, tag=tag, names=names, **self.draw)
        return move

    def correct(self, step, rule, x, s, k, tag):
        """x becomes step(x, s, z, eps), in place, with eps = rule(|z_b|, |s_b|), one a
        sample.

        eps is kept on the device. A CPU keeps float32 z for the step. 16 bits would round
        it, and a GPU makes it sooner than it reads it: there z is drawn again.
        """
        import torch
        draw = self.draw | {"step": k, "tag": tag}
        if self.normal:
            z = self.normal(tuple(x.shape), k, tag)
            z_norm = norms(z, backend=self.backend)
        else:
            z = self._buffer(x)
            z_norm = noise_norms(x, out=z, **draw)
        s_norm = norms(s, backend=self.backend)
        if getattr(x, "is_cuda", False):
            xp = torch
            eps = xp.asarray(rule(z_norm.double(), s_norm.double()), device=x.device)
        else:
            xp = np  # its steps are short, on a CPU
            eps = xp.asarray(rule(np.float64(z_norm), np.float64(s_norm)))
        units = np.eye(3).tolist()
        rows = xp.stack([step(*unit, eps=eps) + 0 * eps for unit in units], -1)
        u = [x, s] if z is None else [x, s, z]
        return update(u, rows, out=x, names=("x", "s", "z"), rows="sample", **draw)

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

"""The engine of the sampling loops: the reference's steps, fused, their noise inside."""

import threading

import numpy as np

from .arguments import Rows, accept_update, as_tensor, noise_step, table
from .launch import launched
from .sums import noise_norms, norms
from .table import lookup
from .updates import update

SCHEDULES = 64  # tables that an engine keeps on its device; a loop has up to four


def is_counter(k):
    """Whether a step is counted on a device: a 0-d array or tensor."""
    return getattr(k, "shape", None) == () and not isinstance(k, np.generic)


class Fused:
    """The engine of minidiff.samplers' loops on a backend.

    It computes a step's coefficients once a schedule, and then does one fused update a
    step. k may be a 0-d int64 tensor on the device: nothing waits for it, and a step
    captured in a CUDA graph replays the schedule; the loop adds 1 to it after the step.
    normal(shape, k, tag), if given, is the noise's source instead: arrays like x.

    Example: *_, x = reverse_sde(score, x, VP(), times, Fused(seed=0))
    """

    def __init__(self, seed=0, sample=0, backend="auto", normal=None):
        self.draw = {"seed": seed, "sample": sample}
        self.backend = backend
        self.normal = normal
        self.kept = threading.local()
        self.tables = {}

    def _uploaded(self, given, like):
        """A schedule's coefficients where `like` is, whole and row by row.

        The last SCHEDULES of an engine are kept: a loop that has run before uploads
        nothing, so that a CUDA graph can capture it whole. The graph reads them for as long
        as it is replayed: keep the engine, and use it for no more than that.
        """
        device = str(getattr(like, "device", "cpu"))
        key = device, given.shape, given.tobytes()
        if key not in self.tables:
            while len(self.tables) >= SCHEDULES:
                self.tables.pop(next(iter(self.tables)))
            whole = table(given, as_tensor("x", like))
            self.tables[key] = whole, whole.split(1)
        return self.tables[key]

    def __call__(self, step, tag, denoise=None, clip=None, **parameters):
        """move(k, *operands), step k of N; parameters are numbers or arrays (N,)."""
        op = lookup(step, denoise)
        given = op.coefficients(clip, **parameters)
        names = (*op.operands, "z")
        draws = op.noise and not self.normal
        clips = denoise is not None
        kept = None

        def move(k, *u):
            nonlocal kept
            if kept is None:
                kept = self._uploaded(given, u[0])
            whole, rows = kept
            if op.noise and self.normal:
                z = self.normal(tuple(u[0].shape), k, tag)
                u = (*u, z)
            if given.ndim == 1:
                known = Rows(whole, "all", draws, clips)
            elif is_counter(k):
                known = Rows(whole, "step", draws, clips)
            else:
                known = Rows(rows[k], "all", draws, clips)
            return self._moved(u, names, known, k, tag)
        return move

    def _moved(self, u, names, rows, k, tag):
        """An update whose coefficients are on the device already."""
        module, inputs, target, result = accept_update(u, None, names, self.backend)
        run = launched(module, target, inputs, rows, tag=tag, **self.draw)
        run(noise_step(k, target))
        return result

    def correct(self, step, rule, x, s, k, tag):
        """x becomes step(x, s, z, eps), in place, with eps = rule(|z_b|, |s_b|), one a
        sample.

        eps is kept on the device. A CPU keeps float32 z for the step. 16 bits would round
        it, and a GPU makes it sooner than it reads it: there z is drawn again.
        """
        import torch
        on_gpu = hasattr(x, "is_cuda") and x.is_cuda
        if self.normal:
            z = self.normal(tuple(x.shape), k, tag)
            z_norm = norms(z, backend=self.backend)
        else:
            z = None if on_gpu else self._buffer(x)
            z_norm = noise_norms(x, out=z, step=k, tag=tag, backend=self.backend,
                                 **self.draw)
        s_norm = norms(s, backend=self.backend)
        xp = torch if on_gpu else np  # NumPy's steps are short, on a CPU
        where = {"device": x.device} if on_gpu else {}
        z_norm = xp.asarray(z_norm, dtype=xp.float64, **where)
        s_norm = xp.asarray(s_norm, dtype=xp.float64, **where)
        eps = xp.asarray(rule(z_norm, s_norm), **where)
        units = np.eye(3).tolist()
        rows = xp.stack([step(*unit, eps=eps) + 0 * eps for unit in units], -1)
        u = [x, s] if z is None else [x, s, z]
        return update(u, rows, out=x, names="xsz", rows="sample", step=k, tag=tag,
                      backend=self.backend, **self.draw)

    def _buffer(self, x):
        """Memory for float32 noise like x, kept by each thread; None for 16 bits."""
        if "float32" not in str(x.dtype):
            return None
        device = getattr(x, "device", "cpu")
        kind = type(x), str(x.dtype), x.shape, device
        if getattr(self.kept, "kind", None) != kind:
            import torch
            xp = torch if hasattr(x, "is_cuda") else np
            self.kept.kind = kind
            self.kept.z = xp.empty_like(x)
        return self.kept.z

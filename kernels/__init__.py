"""Fused kernels: one update with its noise drawn inside, the same bits on every backend.

    out = ((c0*u0 + c1*u1) + c2*u2 ...) + cz*z,   z = noise.normal(..., seed, sample, step,
    tag)

`update` takes coefficients, `apply` a step of the reference and its parameters, `Fused`
runs whole sampling loops; `norms`, `noise_norms` and `dsm_loss` add up squares. Backends:
numpy (the float32 oracle), torch, host (CPU, compiled), triton, cupy; `auto` picks by
device.

Example: apply("langevin", x, s, eps=1e-3, seed=0, step=7)
"""

from ..affine import coefficients
from . import threads  # noqa: F401, here before any fork
from .arguments import FLOATS
from .backends import BACKENDS, backend, why_not
from .fused import Fused
from .sums import dsm_loss, noise_norms, norms
from .table import OPS, Op
from .updates import apply, bind, normal, update

__all__ = ["BACKENDS", "FLOATS", "OPS", "Fused", "Op", "apply", "backend", "bind",
           "coefficients", "dsm_loss", "noise_norms", "normal", "norms", "update",
           "why_not"]

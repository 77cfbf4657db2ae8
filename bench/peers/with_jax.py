"""One jit of JAX: the whole sum, jax.random.normal inside, on JAX's own threads or GPU."""

import os
from importlib.util import find_spec
from itertools import count

from ..speed.work import expression

# else JAX takes three quarters of a GPU's memory when it is imported
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def why_not(cuda):
    """Why JAX computes nothing here, or None."""
    if not find_spec("jax"):
        return "JAX is not installed: pip install jax"
    if not cuda:
        return None
    import jax
    try:
        jax.devices("gpu")
    except RuntimeError:
        return "this JAX computes on the CPU alone: pip install jax[cuda13]"


def noise_of(out):
    """z(k), the k-th noise in the shape and dtype of out, to be traced."""
    import jax
    shape, dtype = out.shape, str(out.dtype).removeprefix("torch.")
    key = jax.random.key(0)
    return lambda k: jax.random.normal(jax.random.fold_in(key, k), shape, dtype)


def make(w):
    """f() of a piece of work, as any peer's; it returns JAX's own array."""
    import jax
    u = [jax.numpy.from_dlpack(t) for t in w.u]
    total, z_of, calls = expression(w), noise_of(w.out), count()
    given = jax.jit(lambda z, *u: total(*u, z))
    drawn = jax.jit(lambda k, *u: total(*u, z_of(k)))

    def f(z=None):
        if w.noise and z is None:
            return drawn(next(calls), *u).block_until_ready()
        z = None if z is None else jax.numpy.from_dlpack(z)
        return given(z, *u).block_until_ready()
    return f


def fill(out):
    """f() that draws as many normal numbers."""
    import jax
    draw, calls = jax.jit(noise_of(out)), count()
    return lambda: draw(next(calls)).block_until_ready()

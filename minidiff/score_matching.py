"""Four ways to fit s(x) to grad_x log p(x).

Each objective is a mean over a batch, weighed by `weight`, a scalar or (B,). Points, scores
and probes are (B, D), arrays or tensors; other shapes raise ValueError. An objective that
needs the model's Jacobian takes it as an argument: its trace (B,), or its product with a
probe v, (B, D).
"""

from .arguments import require_shape


def expectation(values, weight=1.):
    """E [weight value]. ValueError unless values are (B,), weight a scalar or (B,)."""
    if values.ndim != 1 or getattr(weight, "shape", ()) not in ((), values.shape):
        raise ValueError("s must be (B, D), weight a scalar or one a sample")
    return (weight * values).mean()


def half_square(e):
    """1/2 |e|^2 of each sample, (B,)."""
    return .5 * (e * e).sum(-1)


def explicit(s, score, weight=1.):
    """J = 1/2 E |s(x) - grad log p(x)|^2, a scalar. [Hyvarinen 2005, eq. 2]"""
    error = s - require_shape(s, score)
    return expectation(half_square(error), weight)


def implicit(s, trace, weight=1.):
    """J = E [tr(grad s(x)) + 1/2 |s(x)|^2] = explicit + constant. [Hyvarinen 2005, eq. 4]

    trace: of grad s(x), (B,).
    """
    square = half_square(s)
    require_shape(square, trace, "trace")
    return expectation(trace + square, weight)


def sliced(s, v, jacobian_v, weight=1.):
    """J = E [v . (grad s) v + 1/2 (v . s)^2]. [SSM: Song et al. 2019, sec. 3]

    On average over probes v with E v v' = I this is the implicit objective; a v of unit
    norm scales it by 1/D. jacobian_v: (grad s) v or v' grad s, (B, D).
    """
    require_shape(s, v, "v")
    require_shape(s, jacobian_v, "jacobian_v")
    curvature = (v * jacobian_v).sum(-1)
    return expectation(curvature + .5 * (v * s).sum(-1)**2, weight)


def sliced_vr(s, v, jacobian_v, weight=1.):
    """J = E [v . (grad s) v + 1/2 |s|^2], the form of reduced variance. [SMLD eq. 3]

    v is normal or Rademacher. A v of unit norm would move the minimiser.
    """
    require_shape(s, v, "v")
    require_shape(s, jacobian_v, "jacobian_v")
    return implicit(s, (v * jacobian_v).sum(-1), weight)


def residual(s, z, /, sigma):
    """e = s - grad log q(x~|x) = s + z / sigma, where x~ = a x + sigma z."""
    return s + z / sigma


def denoising(s, z, sigma, weight=1.):
    """J = 1/2 E w |s(x~) - grad log q(x~|x)|^2. [Vincent 2011, eq. 9; weights: SMLD eq. 6]

    s: the model's score at x~; z: the noise in x~; sigma > 0. The weight w is sigma^2 for
    SMLD's objective, g^2 for the likelihood's. The minimiser is the score of x~.
    ValueError unless sigma is a scalar or (B, 1).
    """
    if getattr(sigma, "shape", ()) not in ((), (len(s), 1)):
        raise ValueError("sigma must be a scalar or (B, 1)")
    require_shape(s, z, "z")
    return expectation(half_square(residual(s, z, sigma)), weight)

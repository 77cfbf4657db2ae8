"""Four ways to fit s(x) to grad_x log p(x).

Objectives are means over a batch, of samples weighed by `weight`, a scalar or (B,); points, scores
and probes are (B, D), arrays or tensors; ValueError for other shapes. What needs the model's
Jacobian takes it as an argument: its trace (B,), or its product with a probe v, (B, D).
"""

from .arguments import require_shape


def expectation(values, weight=1.):
    """E [weight value]; ValueError unless values are (B,), weight a scalar or (B,)."""
    if values.ndim != 1 or getattr(weight, "shape", ()) not in ((), values.shape):
        raise ValueError("s must be (B, D), weight a scalar or one a sample")
    return (weight * values).mean()


def half_square(e):
    """1/2 |e|^2 of each sample, (B,)."""
    return .5 * (e * e).sum(-1)


def explicit(s, score, weight=1.):
    """J = 1/2 E |s(x) - grad log p(x)|^2, a scalar, as the others. [Hyvarinen 2005, eq. 2]"""
    return expectation(half_square(s - require_shape(s, score)), weight)


def implicit(s, trace, weight=1.):
    """J = E [tr(grad s(x)) + 1/2 |s(x)|^2] = explicit + constant. [Hyvarinen 2005, eq. 4]"""
    square = half_square(s)
    return expectation(require_shape(square, trace, "trace") + square, weight)


def sliced(s, v, jacobian_v, weight=1.):
    """J = E [v . (grad s) v + 1/2 (v . s)^2], E v v' = I: on average over v the implicit
    objective; v of unit norm scales it by 1/D. [SSM: Song et al. 2019, sec. 3]"""
    require_shape(s, v, "v"), require_shape(s, jacobian_v, "jacobian_v")
    return expectation((v * jacobian_v).sum(-1) + .5 * (v * s).sum(-1)**2, weight)


def sliced_vr(s, v, jacobian_v, weight=1.):
    """J = E [v . (grad s) v + 1/2 |s|^2], the reduced-variance form; v normal or Rademacher,
    never of unit norm, which would move the minimiser. [SMLD eq. 3]"""
    require_shape(s, v, "v")
    require_shape(s, jacobian_v, "jacobian_v")
    return implicit(s, (v * jacobian_v).sum(-1), weight)


def residual(s, z, /, sigma):
    """e = s - grad log q(x~|x) = s + z / sigma, for x~ = a x + sigma z."""
    return s + z / sigma


def denoising(s, z, sigma, weight=1.):
    """J = 1/2 E w |s(x~) - grad log q(x~|x)|^2. [Vincent 2011, eq. 9; weights: SMLD eq. 6]

    s, z: the score at x~ and the noise in it; sigma > 0; weight sigma^2 for SMLD's, g^2 for the
    likelihood's. The minimiser is x~'s own score. ValueError unless sigma is a scalar or (B, 1).
    """
    if getattr(sigma, "shape", ()) not in ((), (len(s), 1)):
        raise ValueError("sigma must be a scalar or (B, 1)")
    return expectation(half_square(residual(s, require_shape(s, z, "z"), sigma)), weight)

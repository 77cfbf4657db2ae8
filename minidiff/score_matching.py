"""Four ways to fit s(x) to grad_x log p(x), as means over a batch of points.

Points, scores and probes are (B, D) arrays (images flattened). What needs the model's
Jacobian takes it as an argument: its trace (B,), or its product with a probe v, (B, D).
"""


def _dot(u, v):
    """u . v a sample."""
    return (u * v).sum(-1)


def explicit(s, score):
    """J = 1/2 E |s(x) - grad log p(x)|^2. [Hyvarinen 2005, eq. 2]

    s, score: (B, D), model's and data's. Returns a scalar.
    """
    return .5 * _dot(s - score, s - score).mean()


def implicit(s, trace):
    """J = E [tr(grad s(x)) + 1/2 |s(x)|^2] = explicit + constant. [Hyvarinen 2005, eq. 4]

    s: (B, D); trace: (B,), of the model's Jacobian. Returns a scalar.
    """
    return (trace + .5 * _dot(s, s)).mean()


def sliced(s, v, jacobian_v):
    """J = E [v . (grad s) v + 1/2 (v . s)^2], E v v' = I. [SSM: Song et al. 2019, sec. 3]

    s, v: (B, D); jacobian_v: (B, D), the model's Jacobian times v. Returns a scalar whose
    mean over v is the implicit objective. v of unit norm scales it by 1/D.
    """
    return (_dot(v, jacobian_v) + .5 * _dot(v, s)**2).mean()


def sliced_vr(s, v, jacobian_v):
    """J = E [v . (grad s) v + 1/2 |s|^2], the reduced-variance form. [SMLD eq. 3]

    As `sliced`; v must have E v v' = I (normal or Rademacher, never unit norm).
    """
    return (_dot(v, jacobian_v) + .5 * _dot(s, s)).mean()


def residual(s, z, /, sigma):
    """e = s - grad log q(x~|x) = s + z / sigma, for x~ = a x + sigma z."""
    return s + z / sigma


def denoising(s, z, sigma, weight=1.):
    """J = 1/2 E w |s(x~) - grad log q(x~|x)|^2 with x~ = a x + sigma z, so that
    grad log q(x~|x) = -z / sigma. [Vincent 2011, eq. 9; weights: SMLD eq. 6]

    s, z: (B, D), the score at x~ and the noise in it; sigma > 0, weight: scalar or (B, 1).
    Returns a scalar; its minimiser is the score of x~'s own density.
    """
    e = residual(s, z, sigma)
    return .5 * (weight * e * e).sum(-1).mean()


def posterior_mean(x, s, /, a, sigma):
    """E[x0 | x] = (x + sigma^2 s) / a for x = a x0 + sigma z. [Tweedie; Efron 2011, eq. 2.8]

    x, s: same shape, s the score at x; a, sigma > 0. The last, noiseless step of a sampler.
    """
    return (x + sigma**2 * s) / a

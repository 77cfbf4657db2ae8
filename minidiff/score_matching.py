"""Four ways to fit s(x) to grad_x log p(x), and what a network may return instead of s.

Objectives are means over a batch, of samples weighed by `weight`, a scalar or (B,); points, scores
and probes are (B, D), arrays or tensors; ValueError for other shapes. What needs the model's
Jacobian takes it as an argument: its trace (B,), or its product with a probe v, (B, D). Predictions
are functions of (x, s) at x = a x0 + sigma z, a, sigma > 0.
"""

from .affine import like


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
    return expectation(half_square(s - like(s, score)), weight)


def implicit(s, trace, weight=1.):
    """J = E [tr(grad s(x)) + 1/2 |s(x)|^2] = explicit + constant. [Hyvarinen 2005, eq. 4]"""
    square = half_square(s)
    return expectation(like(square, trace, "trace") + square, weight)


def sliced(s, v, jacobian_v, weight=1.):
    """J = E [v . (grad s) v + 1/2 (v . s)^2], E v v' = I: on average over v the implicit
    objective; v of unit norm scales it by 1/D. [SSM: Song et al. 2019, sec. 3]"""
    like(s, v, "v"), like(s, jacobian_v, "jacobian_v")
    return expectation((v * jacobian_v).sum(-1) + .5 * (v * s).sum(-1)**2, weight)


def sliced_vr(s, v, jacobian_v, weight=1.):
    """J = E [v . (grad s) v + 1/2 |s|^2], the reduced-variance form; v normal or Rademacher,
    never of unit norm, which would move the minimiser. [SMLD eq. 3]"""
    return implicit(s, (like(s, v, "v") * like(s, jacobian_v, "jacobian_v")).sum(-1), weight)


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
    return expectation(half_square(residual(s, like(s, z, "z"), sigma)), weight)


def posterior_mean(x, s, /, a, sigma):
    """D = E[x0 | x] = (x + sigma^2 s) / a: x0 as predicted, EDM's denoiser at a = 1, the last
    step of a sampler. [Tweedie; Efron 2011, eq. 2.8]"""
    return (x + sigma**2 * s) / a


def noise_prediction(x, s, /, a, sigma):
    """eps = -sigma s = E[z | x]. [DDPM sec. 3.2]"""
    return -sigma * s


def velocity(x, s, /, a, sigma):
    """v = a eps - sigma x0. [PD: Salimans & Ho 2022, sec. 4]"""
    return a * noise_prediction(x, s, a, sigma) - sigma * posterior_mean(x, s, a, sigma)


def c_in(sigma, sigma_data=.5):
    """1 / sqrt(sigma^2 + sigma_data^2): scales x_0 + sigma z to unit variance. [EDM table 1]"""
    return (sigma**2 + sigma_data**2)**-.5


def preconditioned(x, s, /, a, sigma, sigma_data=.5):
    """F of EDM's denoiser D = c_skip x + c_out F(c_in x; c_noise). [EDM eq. 7, table 1]

        F = (D - c_skip x) / c_out = sigma (s + c_in^2 x) / (c_in sd),  sd = sigma_data
        c_skip = (c_in sd)^2, c_out = c_in sigma sd

    here of x / a at sigma / a: D - x cancels at small sigma, the last form does not.
    """
    c = c_in(sigma / a, sigma_data)
    return sigma * (s + (c / a)**2 * x) / (c * sigma_data)


def inverse(prediction):
    """The score (x, u, **p) -> s with u = prediction(x, s, **p), which is affine in s."""
    def score(x, u, **p):
        return (u - prediction(1., 0., **p) * x) / prediction(0., 1., **p)
    return score


def as_score(network, prediction, marginal):
    """score(x, level), for any sampler, of a network(x, level) that returns `prediction`.

    marginal(level): (a, sigma) there, an SDE's own or (1, level) for noise levels.
    """
    def score(x, level):
        a, sigma = map(float, marginal(level))  # so that a float32 x stays one
        return inverse(prediction)(x, network(x, level), a=a, sigma=sigma)
    return score


def rescaled(score, marginal):
    """score(x, level) of a x0 + sigma z from a score s(x, sigma) of x0 + sigma z, by change of
    variables: s(x / a, sigma / a) / a. marginal as in `as_score`."""
    def of_level(x, level):
        a, sigma = map(float, marginal(level))
        return score(x / a, sigma / a) / a
    return of_level

"""What a network may return instead of the score, and how each becomes the score.

Near the data the score is large, about 1 / sigma; a network learns better from targets of
one size. So papers let it predict the clean data, D = E[x_0 | x], the noise,
eps = E[z | x], a mixture v of both, their difference, the velocity of a flow, or EDM's F.
All say the same: at x = a x_0 + sigma z each is affine in x and the score s. Here each is
written as that function of (x, s), and its own coefficients invert it.

Operands x and s are of one shape; a, sigma > 0 are numbers, or arrays that broadcast to it.
Next: `langevin`, which draws samples with nothing but a score.
"""

from .arguments import check_domain


def posterior_mean(x, s, /, a, sigma):
    """D = E[x_0 | x] = (x + sigma^2 s) / a, Tweedie's formula. [Efron 2011]

    The best guess of the clean data, in mean square: a score of noisy data is a denoiser.
    It is what a network that predicts x_0 returns, EDM's D at a = 1, and the last step of a
    sampler.

    Example:
        >>> print(posterior_mean(2., -1., a=1., sigma=1.))  # x_0 ~ N(0, 1): s = -x / 2
        1.0
    """
    return (x + sigma**2 * s) / a


def noise_prediction(x, s, /, a, sigma):
    """eps = E[z | x] = -sigma s, the noise that x seems to hold. [DDPM sec. 3.2]

    Example:
        >>> print(noise_prediction(2., -1., a=1., sigma=.5))
        0.5
    """
    return -sigma * s


def v_prediction(x, s, /, a, sigma):
    """v = a eps - sigma D, for a^2 + sigma^2 = 1. [PD app. D]

    Along x = cos(phi) x_0 + sin(phi) z it is dx / dphi. At little noise it is about eps, at
    much noise about -D, whichever x does not tell by itself; and what a network is trained
    on, a z - sigma x_0, has variance 1 at every level, for data of variance 1.

    Example:
        >>> print(round(v_prediction(2., -1., a=.8, sigma=.6), 4))  # eps = .6, D = 2.05
        -0.75
    """
    eps = noise_prediction(x, s, a, sigma)
    x0_hat = posterior_mean(x, s, a, sigma)
    return a * eps - sigma * x0_hat


def flow_velocity(x, s, /, a, sigma):
    """E[z - x_0 | x] = eps - D, what a network returns after flow matching.
    [Lipman et al. 2023, eq. 23; Liu et al. 2023, eq. 1]

    Each x_t = (1 - t) x_0 + t z moves along its own straight line at the velocity z - x_0.
    Many lines meet at a point. Their mean velocity there moves the points as the
    probability flow of `sde.FlowMatching` does, where a = 1 - t and sigma = t:

        dx / dt = f - g^2 s / 2 = -(x + t s) / (1 - t) = eps - D

    Both papers let time run from noise to data; for such a network pass
    lambda x, t: -network(x, 1 - t).

    Example:
        >>> print(flow_velocity(2., -1., a=.5, sigma=.5))  # eps = .5, D = 3.5
        -3.0
    """
    eps = noise_prediction(x, s, a, sigma)
    x0_hat = posterior_mean(x, s, a, sigma)
    return eps - x0_hat


def c_in(sigma, sigma_data=.5):
    """1 / sqrt(sigma^2 + sigma_data^2), which scales x_0 + sigma z to unit variance.
    [EDM table 1]

    sigma_data: the std of the data.

    Example:
        >>> print(round(c_in(1.2), 4))  # 1 / 1.3
        0.7692
    """
    return (sigma**2 + sigma_data**2)**-.5


def preconditioned(x, s, /, a, sigma, sigma_data=.5):
    """F, what EDM's network returns. [EDM eq. 7, table 1]

        D = c_skip x + c_out F(c_in x; c_noise)

        F = (D - c_skip x) / c_out = sigma (s + c_in^2 x) / (c_in sd),  sd = sigma_data
        c_skip = (c_in sd)^2, c_out = c_in sigma sd

    So the network's input c_in x and its training target have variance 1 at every level.
    F is taken of x / a at sigma / a. At small sigma D - x would cancel; the last form does
    not.

    Example:
        >>> s = -1. / (.3**2 + .5**2)  # the score at x = 1, data N(0, sigma_data^2)
        >>> print(abs(round(preconditioned(1., s, a=1., sigma=.3), 12)))
        0.0
    """
    c = c_in(sigma / a, sigma_data)
    return sigma * (s + (c / a)**2 * x) / (c * sigma_data)


def inverse(prediction):
    """The function (x, u, **p) -> s that undoes a prediction: u = prediction(x, s, **p).

    A prediction is affine in s, so that its coefficients are itself at (1, 0) and (0, 1).

    Example:
        >>> D = posterior_mean(2., -1., a=1., sigma=1.)
        >>> print(inverse(posterior_mean)(2., D, a=1., sigma=1.))
        -1.0
    """
    def score(x, u, **p):
        return (u - prediction(1., 0., **p) * x) / prediction(0., 1., **p)
    return score


def as_score(network, prediction, marginal):
    """score(x, level), for any sampler, from a network(x, level) that returns `prediction`.

    prediction: a function of this module. marginal(level) returns (a, sigma): an SDE's own,
    or (1, level) where levels are sigmas.

    Example:
        >>> denoiser = lambda x, sigma: x / (1 + sigma**2)  # exact, for data N(0, 1)
        >>> score = as_score(denoiser, posterior_mean, lambda sigma: (1., sigma))
        >>> print(score(np.array([4.]), 1.))
        [-2.]
    """
    def score(x, level):
        a, sigma = map(float, marginal(level))  # so that a float32 x stays one
        return inverse(prediction)(x, network(x, level), a=a, sigma=sigma)
    return score


def rescaled(score, marginal):
    """score(x, level) of a x_0 + sigma z from a score s(x, sigma) of x_0 + sigma z.

    Dividing by a makes one of the other, and a score changes as a gradient does: it is
    s(x / a, sigma / a) / a. So one network serves every process. marginal: as in
    `as_score`.

    Example:
        >>> score = lambda x, sigma: -x / (1 + sigma**2)  # exact, for data N(0, 1)
        >>> of_vp = rescaled(score, lambda t: (.8, .6))  # N(0, 1) at every time
        >>> print(of_vp(np.array([2.]), .5))
        [-2.]
    """
    def of_level(x, level):
        a, sigma = map(float, marginal(level))
        return score(x / a, sigma / a) / a
    return of_level


def in_sigma(score, sde):
    """score(x, sigma) of x_0 + sigma z from an SDE's own score(x, t): undoes `rescaled`.

    So a network that was trained on one process runs on all others, and in every family. It
    is asked at times in [0, T] alone. Where there is more noise than at T, D is that at T
    of x, shrunk as the noise is: off by some v / sigma_T, v the variance of the data. Below
    VE's smallest level the score is that of this level. ValueError unless sigma > 0.

    Example:
        >>> from minidiff.sde import FlowMatching
        >>> def velocity(x, t):  # exact, for data N(0, 1)
        ...     return (2 * t - 1) / (t**2 + (1 - t)**2) * x
        >>> flow = FlowMatching()
        >>> score = in_sigma(as_score(velocity, flow_velocity, flow.marginal), flow)
        >>> print(score(np.array([4.]), 1.).round(12))  # -x / (1 + sigma^2)
        [-2.]
    """
    def of_sigma(x, sigma):
        sigma = float(check_domain(sigma=sigma)["sigma"])
        a, noise = map(float, sde.marginal(sde.T))
        within = min(sigma, noise / a)
        t = min(max(0., float(sde.time(within))), sde.T)
        a, _ = map(float, sde.marginal(t))
        x_within = within / sigma * x
        s = a * score(a * x_within, t)
        if within == sigma:
            return s
        D = posterior_mean(x_within, s, 1., within)
        return inverse(posterior_mean)(x, D, a=1., sigma=sigma)
    return of_sigma

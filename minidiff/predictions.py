"""What a network may return instead of the score, and how each becomes the score.

A prediction is a function of (x, s) at x = a x0 + sigma z, with a, sigma > 0. It is affine
in s, so its own coefficients invert it.
"""


def posterior_mean(x, s, /, a, sigma):
    """D = E[x0 | x] = (x + sigma^2 s) / a. [Tweedie; Efron 2011, eq. 2.8]

    It is the prediction of x0, EDM's denoiser at a = 1, and the last step of a sampler.
    """
    return (x + sigma**2 * s) / a


def noise_prediction(x, s, /, a, sigma):
    """eps = -sigma s = E[z | x]. [DDPM sec. 3.2]"""
    return -sigma * s


def velocity(x, s, /, a, sigma):
    """v = a eps - sigma x0. [PD: Salimans & Ho 2022, sec. 4]"""
    eps = noise_prediction(x, s, a, sigma)
    x0_hat = posterior_mean(x, s, a, sigma)
    return a * eps - sigma * x0_hat


def c_in(sigma, sigma_data=.5):
    """1 / sqrt(sigma^2 + sigma_data^2). [EDM table 1]

    It scales x_0 + sigma z to unit variance.
    """
    return (sigma**2 + sigma_data**2)**-.5


def preconditioned(x, s, /, a, sigma, sigma_data=.5):
    """F of EDM's denoiser D = c_skip x + c_out F(c_in x; c_noise). [EDM eq. 7, table 1]

        F = (D - c_skip x) / c_out = sigma (s + c_in^2 x) / (c_in sd),  sd = sigma_data
        c_skip = (c_in sd)^2, c_out = c_in sigma sd

    It is taken of x / a at sigma / a. At small sigma D - x would cancel; the last form does
    not.
    """
    c = c_in(sigma / a, sigma_data)
    return sigma * (s + (c / a)**2 * x) / (c * sigma_data)


def inverse(prediction):
    """The function (x, u, **p) -> s that solves u = prediction(x, s, **p), affine in s."""
    def score(x, u, **p):
        return (u - prediction(1., 0., **p) * x) / prediction(0., 1., **p)
    return score


def as_score(network, prediction, marginal):
    """score(x, level), for any sampler, from a network(x, level) that returns `prediction`.

    marginal(level) returns (a, sigma): an SDE's own, or (1, level) where levels are sigmas.
    """
    def score(x, level):
        a, sigma = map(float, marginal(level))  # so that a float32 x stays one
        return inverse(prediction)(x, network(x, level), a=a, sigma=sigma)
    return score


def rescaled(score, marginal):
    """score(x, level) of a x0 + sigma z from a score s(x, sigma) of x0 + sigma z.

    By the change of variables it is s(x / a, sigma / a) / a. marginal: as in `as_score`.
    """
    def of_level(x, level):
        a, sigma = map(float, marginal(level))
        return score(x / a, sigma / a) / a
    return of_level

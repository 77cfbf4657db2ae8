"""Conditions: samples of p(x | y) from the scores of all other chapters.

Bayes' rule is p(x | y) = p(x) p(y | x) / p(y). In a score the last factor is gone, so

    grad log p(x | y) = grad log p(x) + grad log p(y | x),

at every noise level, where x is noisy and y is not. It is a score, and every sampler runs
it. What y is decides where the last term comes from:

    a label      one network learns both p(x) and p(x | y), and their difference is the
                 term. `guided` takes w times that: classifier-free guidance.
    H x_0        a part of the data, or another linear map of it, with or without noise.
                 The term follows from the score of p(x) alone: `posterior`.
                 `replaced` does without it, and is biased.

Next: `families`, every sampler from one score.
"""

from inspect import Parameter, signature
from itertools import count

import numpy as np

from .affine import operands
from .arguments import check_domain
from .noise import KNOWN, PREDICTOR
from .predictions import posterior_mean
from .sde import perturb, reverse_sde_step


def guided(s, s_y, /, w):
    """The guided score, w times as far from s as s_y is. [Ho & Salimans 2022]

        s_w = s + w (s_y - s),   s = grad log p(x),  s_y = grad log p(x | y)

    w = 0 forgets the label, w = 1 is p(x | y), w > 1 also prefers what is most typical of
    the label: samples are clearer, and less diverse. At each noise level s_w is the score
    of p(x | y)^w p(x)^(1 - w) there. For w other than 0 and 1 these are not the noisy
    versions of any one distribution, so what a sampler ends with depends on the sampler.

    Example:
        >>> print(guided(-1., -2., w=3.))
        -4.0
    """
    return (1 - w) * s + w * s_y


def guided_step(step):
    """A step of (x, s, z) as one of (x, s, s_y, z): the step itself, by the guided score.

    It takes w besides the step's own parameters. It is affine as the step is, so that one
    fused update runs it.

    Example:
        >>> from minidiff.langevin import langevin_step
        >>> step = guided_step(langevin_step)
        >>> print(operands(step), step(0., -1., -2., 1., w=3., eps=1.))
        ('x', 's', 's_y', 'z') -1.0
    """
    def composite(x, s, s_y, /, *z, w, **parameters):
        return step(x, guided(s, s_y, w), *z, **parameters)
    # what `affine` reads: operands by their place, then w, then what the step takes
    x, s, *rest = signature(step).parameters.values()
    at = len(operands(step)) - 2
    w = Parameter("w", Parameter.POSITIONAL_OR_KEYWORD)
    taken = [x, s, s.replace(name="s_y"), *rest[:at], w, *rest[at:]]
    composite.__signature__ = signature(step).replace(parameters=taken)
    composite.__name__ = f"guided_{step.__name__}"
    composite.__doc__ = f"`guided`, then {step.__doc__}"
    return composite


guided_reverse_sde_step = guided_step(reverse_sde_step)


def guide(score, score_y, w, engine):
    """(score, engine) with which any sampler follows the guided score.

    score, score_y: s and s_y as functions (x, level); w: a number. At w = 0 and 1 only the
    score that counts is asked, and the engine is the one given. Else the score is a `Pair`,
    and the engine puts it together: in the step's own update where the step has one score.

    Example:
        >>> from minidiff.samplers import Reference, pf_ode
        >>> from minidiff.sde import EDM
        >>> all_data = lambda x, sigma: -x / (4 + sigma**2)  # N(0, 4)
        >>> of_label = lambda x, sigma: -x / (1 + sigma**2)  # N(0, 1)
        >>> score, engine = guide(all_data, of_label, 2., Reference())
        >>> times = np.geomspace(50., .01, 200)
        >>> *_, x = pf_ode(score, np.array([[50.]]), EDM(50.), times, engine)
        >>> print(x.round(1))  # w = 1 ends at 1
        [[0.5]]
    """
    w = float(check_domain(w=w)["w"])
    if w == 0:
        return score, engine
    if w == 1:
        return score_y, engine

    def both(x, level):
        return Pair(score(x, level), score_y(x, level))

    return both, Guided(engine, w)


class Pair:
    """s(x) and s(x | y) at one state; `whole` is the guided score once it was needed."""

    def __init__(self, s, s_y):
        self.both = s, s_y
        self.whole = None

    def __truediv__(self, a):
        """Both, divided: what `predictions.rescaled` does to a score."""
        return Pair(*(s / a for s in self.both))


class Guided:
    """The engine of `guide`: another one's steps, by pairs of scores."""

    def __init__(self, engine, w):
        self.engine = engine
        self.w = w
        self.require_one_seed = engine.require_one_seed
        self.require_new = engine.require_new
        self.together = engine(guided, PREDICTOR, w=w)

    def whole(self, u):
        """The guided score of a pair; anything else as it is."""
        if not isinstance(u, Pair):
            return u
        if u.whole is None:
            u.whole = self.together(0, *u.both)
        return u.whole

    def __call__(self, step, tag, steps=None, denoise=None, **parameters):
        """move(k, x, *u) of the engine; u may hold pairs."""
        if denoise or operands(step) not in (("x", "s"), ("x", "s", "z")):
            move = self.engine(step, tag, steps, denoise=denoise, **parameters)
            return lambda k, *u: move(k, *map(self.whole, u))
        move = self.engine(guided_step(step), tag, steps, w=self.w, **parameters)
        return lambda k, x, pair: move(k, x, *pair.both)

    def corrector(self, *step, **parameters):
        """correct(k, x, pair) of the engine."""
        correct = self.engine.corrector(*step, **parameters)
        return lambda k, x, pair: correct(k, x, self.whole(pair))


def where(mask, u, v):
    """u where the mask is true, v elsewhere: arrays or tensors."""
    return u.where(mask, v) if hasattr(u, "where") else np.where(mask, u, v)


def replaced(score, y, marginal, engine):
    """score(x, level), where the known part of x is replaced by y at that noise level.
    [SDE app. I.2]

        s(a y + sigma z on what is known, x elsewhere),  z drawn anew at every call

    Every sampler of the unknown part then runs as it is. The known part follows the score
    of N(a y, sigma^2), and ends at y. y: like x, NaN where unknown; marginal: as in
    `predictions.as_score`.

    It is the score given the *noisy* y, which tells less than y does: samples know too
    little of y, however many steps there are. Of two unit normals of correlation .8, one
    known to be 1.5, the other comes out with mean .75 and variance .49 in the place of 1.2
    and .36. `posterior` is right there.
    """
    known = y == y
    calls = count()

    def of_level(x, level):
        a, sigma = map(float, marginal(level))
        k = next(calls)
        own = range(k, k + 1)
        noised = engine(perturb, KNOWN, own, a=a, sigma=sigma)
        s = score(where(known, noised(0, y), x), level)
        return where(known, (a * y - x) / sigma**2, s)
    return of_level


def definite(covariance, weakest):
    """Symmetric matrices, (B, m, m); an eigenvalue that is not positive, but for rounding,
    is `weakest`."""
    symmetric = (covariance + covariance.swapaxes(1, 2)) / 2
    values, vectors = np.linalg.eigh(symmetric)
    values = np.where(values > 1e-12 * weakest, values, weakest)
    return (vectors * values[:, None]) @ vectors.swapaxes(1, 2)


def weights(covariance, error, known, noise_std):
    """S^-1 error, (B, m), of what is known alone; S = covariance + noise_std^2 I."""
    both = known[:, :, None] & known[:, None]
    S = np.where(both, covariance, 0.)
    variance = np.where(known, noise_std**2, 1.)
    S = S + variance[:, None] * np.eye(known.shape[1])
    found = np.linalg.solve(S, error[..., None])
    return found[..., 0]


def posterior(linearize, y, marginal, *, H=None, noise_std=0., sigma_data=None):
    """score(x, level) of x given y = H x_0 + noise_std n, n ~ N(0, I).

        s + grad_x log N(y; H D(x), S),   S = noise_std^2 I + H C H^T

    D = E[x_0 | x], by Tweedie's formula, and C = Cov[x_0 | x] = (sigma^2 / a) grad D, by
    its derivative. For every Gaussian this is exact, because there x_0 given x is normal,
    and C the same at every x. Else it is an approximation, and keeps a bias too: some
    samples end where y rules the data out. A learned score may make C indefinite. An
    eigenvalue that is not positive counts as (sigma / a)^2, the weakest pull.

    linearize(x, level): as in `likelihood`, the score (B, D) and v -> v^T grad s.
    y: (B, m), NaN where there is no measurement; H: (m, D), None for x_0 itself.
    sigma_data: None for that C, which takes m products, for small m. Or the std of the
    data: then C = r^2 I with r^2 = sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2), for
    images. That takes one product, and is exact where the data are white. [PiGDM]
    marginal: as in `predictions.as_score`.

    Example:
        >>> def linearize(x, sigma):  # data N(0, I)
        ...     v = 1 + sigma**2
        ...     return -x / v, lambda u: -u / v
        >>> y = np.array([[3., np.nan]])
        >>> score = posterior(linearize, y, lambda sigma: (1., sigma))
        >>> x = np.array([[1., 1.]])
        >>> print(score(x, 1.))  # the known part: (y - x) / sigma^2
        [[ 2.  -0.5]]
    """
    check_domain(noise_std=noise_std, sigma_data=1. if sigma_data is None else sigma_data)
    known = y == y
    whole = H is None  # images: no matrix of all their pixels

    def of_level(x, level):
        a, sigma = map(float, marginal(level))
        s, vjp = linearize(x, level)

        def pulled(v):
            """v^T grad D: D is linear in x and s."""
            return posterior_mean(v, vjp(v), a, sigma)

        D = posterior_mean(x, s, a, sigma)
        error = np.where(known, y - (D if whole else D @ H.T), 0.)
        r2 = sigma_data and 1 / (sigma_data**-2 + (a / sigma)**2)
        if whole and r2:
            return s + pulled(error / (noise_std**2 + r2))
        rows = np.eye(x.shape[1]) if whole else H
        if r2:
            covariance = r2 * rows @ rows.T
        else:
            gradients = [pulled(np.broadcast_to(row, x.shape)) for row in rows]
            covariance = sigma**2 / a * np.stack(gradients, 1) @ rows.T  # H C H^T
            covariance = definite(covariance, (sigma / a)**2)
        pull = weights(covariance, error, known, noise_std)
        return s + pulled(pull @ rows)
    return of_level

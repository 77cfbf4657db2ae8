"""The sampling loops: generators of states that hold no formula.

Each takes `score(x, level)`, a start `x` and `op`, which turns a step into a function that
draws its own noise:  move = op(step, tag, **parameters);  x = move(k, x, s).
`Reference(seed)` here is the step as printed, in NumPy; `kernels.Fused(seed, backend)` runs the
same step in one fused kernel with the same noise. `level` is what the score is a function
of: sigma (Langevin), the index i (DDPM, DDIM, reverse diffusion) or the time t (SDEs).

Example: *_, x = reverse_sde(score, x, VP(), times, Reference(seed=0))
"""

from functools import partial
from inspect import signature

import numpy as np

from . import ddpm, langevin, noise
from . import sde as sdes
from .affine import check_domain, coefficients, operands
from .score_matching import posterior_mean
from .solvers import snr_step_size


class Reference:
    """Steps as the papers print them, on NumPy arrays, with the contract's noise.

    seed names the run, sample the global id of the first row of x.
    """

    def __init__(self, seed=0, sample=0):
        self.seed, self.sample = seed, sample

    def __call__(self, step, tag, denoise=None, clip=None, **parameters):
        """A step, or a step whose second operand is denoise(x, s) clipped to (lo, hi)."""
        def own(f, k=None):
            return {n: v if k is None or not np.ndim(v) else v[k] for n, v in parameters.items()
                    if n in signature(f).parameters}
        coefficients(step, **own(step))  # refuses what a fused kernel would

        def move(k, x, *u):
            if denoise:
                x0_hat = denoise(x, u[0], **own(denoise, k))
                u = (x0_hat if clip is None else np.clip(x0_hat, *clip), *u[1:])
            z = (self.normal(x.shape, k, tag),) if operands(step)[-1] == "z" else ()
            return step(x, *u, *z, **own(step, k))
        return move

    def normal(self, shape, k, tag):
        """The noise of step k."""
        return noise.normal(shape, self.seed, self.sample, k, tag)

    def correct(self, step, rule, x, s, k, tag):
        """x becomes step(x, s, z, eps), in place, with eps = rule(|z_b|, |s_b|), one a sample."""
        def norm(u):
            return (u * u).reshape(len(u), -1).sum(1)**.5
        z = self.normal(x.shape, k, tag)
        x[...] = step(x, s, z, eps=rule(norm(z), norm(s)).reshape(-1, *[1] * (x.ndim - 1)))
        return x


def prior(shape, std=1., seed=0, sample=0):
    """x_T = std z, float32 of `shape`: where a reverse process starts. `sde.prior_std`."""
    return np.float32(std) * noise.normal(shape, seed, sample, tag=noise.PRIOR)


def iterate(step, score, x, levels, op, check_finite=False, **parameters):
    """x_{k+1} = step(x_k, score(x_k, levels[k]), z_k; parameters[k]), yielding each x.

    levels: (N,); parameters: scalars or (N,). check_finite raises FloatingPointError naming
    the step whose state is not finite (one synchronisation a step on a GPU).
    """
    for name, value in parameters.items():
        if np.ndim(value) and len(value) != len(levels):
            raise ValueError(f"{name} has {len(value)} entries for {len(levels)} levels")
    move = op(step, noise.PREDICTOR, **parameters)
    for k, level in enumerate(levels):
        x = move(k, x, score(x, level))
        if check_finite and not bool((abs(x) < float("inf")).all()):
            raise FloatingPointError(f"step {k} (level {level:g}): the state is not finite")
        yield x


def denoise(score, x, level, op, a, sigma):
    """E[x_0 | x], the last step of a sampler, without noise. `score_matching.posterior_mean`."""
    return op(posterior_mean, noise.PREDICTOR, a=a, sigma=sigma)(0, x, score(x, level))


def annealed_langevin(score, x, sigmas, op, eps=2e-5, n_steps=100, **kw):
    """SMLD: n_steps Langevin steps a level, from the largest sigma down. [SMLD Alg. 1]

    score(x, sigma). `denoise` at sigmas[-1] ends it without noise. [NCSNv2 Alg. 1]
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    alphas = langevin.step_sizes(sigmas, eps)
    yield from iterate(langevin.langevin_step, score, x, np.repeat(sigmas, n_steps), op,
                       eps=np.repeat(alphas, n_steps), **kw)


def ancestral(score, x, betas, op, variances=None, last_noise=False, **kw):
    """DDPM: i = N-1 ... 0 with variance beta (or `variances`), score(x, i). [DDPM Alg. 2]

    last_noise: the paper's algorithm draws none at i = 0.
    """
    betas = np.asarray(betas, np.float64)
    variances = np.array(betas if variances is None else variances, np.float64)
    if not betas.size or variances.shape != betas.shape:
        raise ValueError(f"variances must be one a beta, at least one, got {variances.shape} "
                         f"and {betas.shape}")
    if not last_noise:
        variances[0] = 0.
    yield from iterate(ddpm.ancestral_step, score, x, np.arange(len(betas))[::-1], op,
                       beta=np.asarray(betas, np.float64)[::-1], variance=variances[::-1],
                       **kw)


def ddim(score, x, alpha_bar, op, eta=0., **kw):
    """DDIM over the given (N,) falling alpha_bar, a whole grid or a subset of one, ending at
    alpha_bar = 1; score(x, i), i = N-1 ... 0. [DDIM eq. 12]"""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    if not alpha_bar.size or not (np.diff(alpha_bar) < 0).all():
        raise ValueError("alpha_bar must be at least one number, each smaller than the last")
    yield from iterate(ddpm.ddim_step, score, x, np.arange(len(alpha_bar))[::-1], op,
                       alpha_bar=alpha_bar[::-1], alpha_bar_prev=ddpm.previous(alpha_bar)[::-1],
                       eta=eta, **kw)


def reverse_sde(score, x, sde, times, op, **kw):
    """Euler-Maruyama on the reverse-time SDE along falling times (N+1,); score(x, t)."""
    t, dt = _grid(times, sde)
    yield from iterate(sdes.reverse_sde_step, score, x, t, op, sde=sde, t=t, dt=dt, **kw)


def pf_ode(score, x, sde, times, op, **kw):
    """Euler on the probability-flow ODE along falling times (N+1,); score(x, t)."""
    t, dt = _grid(times, sde)
    yield from iterate(sdes.pf_ode_step, score, x, t, op, sde=sde, t=t, dt=dt, **kw)


def forward_sde(x, sde, times, op):
    """Euler-Maruyama on the forward SDE along rising times (N+1,)."""
    dt, t = _grid(times[::-1], sde)[1][::-1], np.asarray(times, np.float64)[:-1]
    move = op(sdes.forward_sde_step, noise.PREDICTOR, sde=sde, t=t, dt=dt)
    for k in range(len(t)):
        x = move(k, x)
        yield x


def predictor_corrector(score, x, sde, times, op, snr=.16, n_corrector=1):
    """Euler-Maruyama, then n_corrector Langevin steps at the new time; score(x, t).
    [SDE Alg. 1; step sizes of Algs. 4 and 5 from each sample's own norms, kappa = 1]"""
    t, dt = _grid(times, sde)
    predict = op(sdes.reverse_sde_step, noise.PREDICTOR, sde=sde, t=t, dt=dt)
    rule = partial(snr_step_size, snr=snr)
    for k, after in enumerate(t - dt):
        x = predict(k, x, score(x, t[k]))
        for m in range(n_corrector):
            x = op.correct(langevin.langevin_step, rule, x, score(x, after), k,
                           noise.CORRECTOR + m)
        yield x


def reverse_diffusion(score, x, sde, n, op, **kw):
    """The SDE's own n-step discretisation reversed, i = n-1 ... 0; score(x, i). [SDE eq. 46]"""
    if n < 2:
        raise ValueError(f"n must be at least 2 steps, got {n}")
    i = np.arange(n)[::-1]
    yield from iterate(sdes.reverse_diffusion_step, score, x, i, op, sde=sde, i=i, n=n, **kw)


def _grid(times, sde):
    """Falling times (N+1,) to each step's start and size."""
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or times.size < 2 or not (np.diff(times) < 0).all():
        raise ValueError("times must be at least two numbers, each smaller than the last")
    check_domain(sde=sde, t=times)
    return times[:-1], -np.diff(times)

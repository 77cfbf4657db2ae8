"""The sampling loops: generators of states that hold no formula.

Each takes `score(x, level)`, a start `x`, its noise levels or times, and `op`, which turns a
step into a function that draws its own noise:  move = op(step, tag, **parameters);
x = move(k, x, s). `Reference(seed)` here is the step as printed, in NumPy;
`kernels.Fused(seed, backend)` runs the same step in one fused kernel with the same noise.
`level` is sigma (Langevin, EDM, DPM-Solver++), the index i (DDPM, DDIM) or the time t (SDEs,
whose `times` fall, (N+1,), or are N for even steps to 0).

Example: *_, x = reverse_sde(score, x, VP(), 100, Reference(seed=0))
"""

import numpy as np

from . import ddpm, langevin, noise, solvers
from . import sde as sdes
from .affine import accepted_by, coefficient_row, operands
from .arguments import SLACK, check_domain, check_falling, require_shape, schedule
from .predictions import posterior_mean


class Reference:
    """Steps as the papers print them, in NumPy, with the contract's noise: seed names the
    run, sample the first row of x. normal(shape, k, tag), if given, is its source instead."""

    def __init__(self, seed=0, sample=0, normal=None):
        self.normal = normal or (lambda shape, k, tag: noise.normal(shape, seed, sample, k, tag))

    def __call__(self, step, tag, denoise=None, clip=None, **parameters):
        """A step, or a step whose second operand is denoise(x, s) clipped to (lo, hi)."""
        coefficient_row(step, denoise, clip, **parameters)  # refuses what a fused kernel would
        parameters = check_domain(**parameters)

        def at(f, k):
            return {n: v[k] if np.ndim(v) else v for n, v in accepted_by(f, parameters).items()}

        def move(k, x, *u):
            if hasattr(x, "data_ptr"):
                raise TypeError("x must be a NumPy array; kernels.Fused takes tensors")
            u = [require_shape(x, v) for v in u]
            if denoise:
                x0_hat = denoise(x, u[0], **at(denoise, k))
                u = (x0_hat if clip is None else np.clip(x0_hat, *clip), *u[1:])
            if operands(step)[-1] == "z":
                u = [*u, require_shape(x, self.normal(x.shape, k, tag), "z")]
            return step(x, *u, **at(step, k))
        return move

    def correct(self, step, rule, x, s, k, tag):
        """x becomes step(x, s, z, eps), in place, with eps = rule(|z_b|, |s_b|), one a sample."""
        z = require_shape(x, self.normal(x.shape, k, tag), "z")
        norms = (np.square(u, dtype=float).sum(tuple(range(1, x.ndim)))**.5
                 for u in (z, require_shape(x, s)))
        x[...] = step(x, s, z, eps=rule(*norms).reshape(-1, *[1] * (x.ndim - 1)))
        return x


def prior(shape, std=1., seed=0, sample=0):
    """x_T = std z, float32 of `shape`: where a reverse process starts. `sde.prior_std`."""
    return np.float32(std) * noise.normal(shape, seed, sample, tag=noise.PRIOR)


def check_finite(states):
    """The states; FloatingPointError names the first step whose state is not finite."""
    for k, x in enumerate(states):
        if not bool((abs(x) < float("inf")).all()):
            raise FloatingPointError(f"step {k}: the state is not finite")
        yield x


def iterate(step, score, x, levels, op, correct=lambda k, x: x, **parameters):
    """x_{k+1} = correct(k, step(x_k, score(x_k, levels[k]), z_k; parameters[k])), N states.

    levels: (N,); parameters: scalars or (N,), else ValueError, and the denoise stage of `op`.
    """
    for name, v in parameters.items():
        if name != "clip" and np.shape(v) not in ((), np.shape(levels)):
            raise ValueError(f"{name} {np.shape(v)} must be one, or one of {len(levels)} levels")
    move = op(step, noise.PREDICTOR, **parameters)
    for k, level in enumerate(levels):
        x = correct(k, move(k, x, score(x, level)))
        yield x


def denoise(score, x, level, op, a, sigma):
    """E[x_0 | x], a sampler's last step, without noise. `score_matching.posterior_mean`."""
    return op(posterior_mean, noise.PREDICTOR, a=a, sigma=sigma)(0, x, score(x, level))


def annealed_langevin(score, x, sigmas, op, eps=2e-5, n_steps=100):
    """SMLD: n_steps Langevin steps a level, from the largest sigma down; score(x, sigma). What it
    leaves of noise is the caller's to `denoise`, at sigmas[-1]. [SMLD Alg. 1, NCSNv2 Alg. 1]"""
    check_domain(n_steps=n_steps)
    alphas = langevin.step_sizes(sigmas, eps)
    yield from iterate(langevin.langevin_step, score, x, np.repeat(sigmas, n_steps), op,
                       eps=np.repeat(alphas, n_steps))


def ancestral(score, x, betas, op, variances=None, last_noise=False, clip=None):
    """DDPM: i = N-1 ... 0 with variance beta (or `variances`), score(x, i). [DDPM Alg. 2]

    last_noise: the paper's algorithm draws none at i = 0. clip: (lo, hi) of the predicted x_0,
    from which the posterior's mean is then formed. A subset of steps: `ddpm.subset_betas`; i then
    counts the subset.
    """
    betas = schedule(betas, "betas")
    variances = np.array(betas if variances is None else variances, np.float64)
    require_shape(betas, variances, "variances")
    check_domain(variance=variances)
    variances[0] = variances[0] if last_noise else 0.
    step, p = ddpm.ancestral_step, {"beta": betas[::-1]}
    if clip is not None:
        alpha_bar = ddpm.alpha_bars(betas)
        step, p = ddpm.posterior_step, {
            "denoise": ddpm.predicted_x0, "clip": clip, "alpha_bar": alpha_bar[::-1],
            "alpha_bar_prev": ddpm.previous(alpha_bar)[::-1]}
    i = np.arange(len(betas))[::-1]
    yield from iterate(step, score, x, i, op, variance=variances[::-1], **p)


def ddim(score, x, alpha_bar, op, eta=0.):
    """DDIM over the given (N,) falling alpha_bar, a whole grid or a subset of one, ending at
    alpha_bar = 1; score(x, i), i = N-1 ... 0 of those given. [DDIM eq. 12]"""
    alpha_bar = check_falling(alpha_bar, "alpha_bar")
    yield from iterate(ddpm.ddim_step, score, x, np.arange(len(alpha_bar))[::-1], op,
                       alpha_bar=alpha_bar[::-1], alpha_bar_prev=ddpm.previous(alpha_bar)[::-1],
                       eta=eta)


def reverse_sde(score, x, sde, times, op, step=sdes.reverse_sde_step, **kw):
    """Euler-Maruyama on the reverse-time SDE; score(x, t)."""
    t, after = _grid(times, sde)
    yield from iterate(step, score, x, t, op, sde=sde, t=t, dt=t - after, **kw)


def pf_ode(score, x, sde, times, op, **kw):
    """Euler on the probability-flow ODE; score(x, t)."""
    yield from reverse_sde(score, x, sde, times, op, sdes.pf_ode_step, **kw)


def reverse_diffusion(score, x, sde, times, op, step=sdes.reverse_diffusion_step, **kw):
    """The SDE's own chain reversed, a step i a time: i = trunc(t (n-1) / T) = n-1 ... 0 of the
    n times but the last; score(x, t). [SDE eq. 46]"""
    t, _ = _grid(times, sde)
    n = len(t)
    i = np.trunc((t / sde.T + SLACK) * (n - 1)).astype(int)  # what rounding alone made smaller
    if n < 2 or (i != np.arange(n)[::-1]).any():
        raise ValueError("times must be at least three and fall evenly from T, one an index")
    yield from iterate(step, score, x, t, op, sde=sde, i=i, n=n, **kw)


def ancestral_sde(score, x, sde, times, op, **kw):
    """Ancestral sampling of VE's or VP's chain, else as `reverse_diffusion`. [SDE eqs. 4, 47]"""
    if not hasattr(sde, "ancestral"):
        raise ValueError(f"sde must be VE or VP for ancestral sampling, got {sde}")
    yield from reverse_diffusion(score, x, sde, times, op, sdes.ancestral_step, **kw)


def predictor_corrector(score, x, sde, times, op, predictor=reverse_sde, corrector="langevin",
                        snr=.16, n_corrector=1):
    """A predictor's step, then n_corrector Langevin steps at the new time; score(x, t).
    [SDE Algs. 1, 4 and 5]

    predictor: reverse_sde, reverse_diffusion, ancestral_sde or pf_ode. corrector: "langevin",
    its step sizes from each sample's own norms; "batch_langevin", from their means over the
    batch; "annealed", from sigma(t). The data, where sigma(t) = 0, is not corrected. A sample's
    own norms bias in low dimension: in two, |s| comes near 0 and steps explode.
    """
    rules = {"langevin": lambda z_norm, s_norm, sigma: (z_norm, s_norm),
             "batch_langevin": lambda z_norm, s_norm, sigma: (z_norm.mean(), s_norm.mean()),
             "annealed": lambda z_norm, s_norm, sigma: (sigma + 0 * z_norm, 1.)}
    if corrector not in rules:
        raise ValueError(f"corrector {corrector!r} is none of {', '.join(rules)}")
    check_domain(snr=snr, n_corrector=n_corrector)
    before, after = _grid(times, sde)
    noisy = sde.marginal(after)[1] > 0
    t, dt = after[noisy], (before - after)[noisy]
    (_, sigma), kappa = sde.marginal(t), sde.kappa(t, dt)
    if not (kappa > 0).all():
        raise ValueError("times: steps too long for the corrector's kappa = 1 - beta(t) dt > 0")

    def correct(k, x):
        def rule(z_norm, s_norm):
            ratio = rules[corrector](z_norm, s_norm, sigma[k])
            return solvers.snr_step_size(*ratio, snr, kappa[k])
        for tag in range(noise.CORRECTOR, noise.CORRECTOR + n_corrector) if k < len(t) else ():
            x = op.correct(langevin.langevin_step, rule, x, score(x, t[k]), k, tag)
        return x
    yield from predictor(score, x, sde, times, op, correct=correct)


def forward_sde(x, sde, times, op):
    """Euler-Maruyama on the forward SDE along rising times (N+1,), or in N even steps to T."""
    after, t = (v[::-1] for v in _grid(times[::-1] if np.ndim(times) else times, sde))
    move = op(sdes.forward_sde_step, noise.FORWARD, sde=sde, t=t, dt=after - t)
    for k in range(len(t)):
        x = move(k, x)
        yield x


def heun(score, x, sde, times, op, raised=None, stir=lambda k, x: x):
    """Heun on the probability-flow ODE; a last step to t = 0, where there is no score, is
    Euler's. score(x, t), 2 N - 1 evaluations if so. [EDM Alg. 1] A step starts from
    stir(k, x) at the time raised[k], where they are given."""
    t, after = _grid(times, sde)
    t, n = t if raised is None else raised, np.count_nonzero(after)
    euler = op(sdes.pf_ode_step, noise.PREDICTOR, sde=sde, t=t, dt=t - after)
    both = op(sdes.heun_step, noise.PREDICTOR, sde=sde, t=t[:n], dt=(t - after)[:n])
    for k, level in enumerate(t):
        x = stir(k, x)
        s = score(x, level)
        x_next = euler(k, x, s)
        x = both(k, x, s, score(x_next, after[k])) if k < n else x_next
        yield x


def edm(score, x, sigmas, op, **churn):
    """EDM's sampler: Heun along falling sigmas (N,), then to 0, each level raised first by fresh
    noise as `solvers.churn`(sigmas, **churn) says, by default not. score(x, sigma). [EDM Alg. 2]"""
    sigmas = check_falling(sigmas)
    raised, std = solvers.churn(sigmas, **churn)
    add = op(sdes.perturb, noise.CHURN, a=1., sigma=np.where(std > 0, std, 1.))
    yield from heun(score, x, sdes.EDM(raised.max()), [*sigmas, 0.], op, raised,
                    lambda k, x: add(k, x) if std[k] > 0 else x)


def dpmpp_2m(score, x, sigmas, op):
    """DPM-Solver++(2M) along falling sigmas (N,), then to 0: the first step is Euler's, the last
    D itself. score(x, sigma), N evaluations. [DPM-Solver++ Alg. 2]"""
    sigmas = check_falling(sigmas)
    first = op(sdes.pf_ode_step, noise.PREDICTOR, sde=sdes.EDM(sigmas[0]), t=sigmas[0],
               dt=sigmas[0] - sigmas[1:2])
    second = op(solvers.dpmpp_2m_step, noise.PREDICTOR, sigma_prev=sigmas[:-2],
                sigma=sigmas[1:-1], sigma_next=sigmas[2:])
    before = ()
    for k, sigma in enumerate(sigmas[:-1]):
        s = score(x, sigma)
        x, before = second(k - 1, x, s, *before) if k else first(0, x, s), (x, s)
        yield x
    yield denoise(score, x, sigmas[-1], op, 1., sigmas[-1])


def pf_ode_adaptive(score, x, sde, times, rtol=1e-5, atol=1e-5):
    """The probability-flow ODE by RK45, NumPy arrays; states at times[1:], score(x, t). One step
    size serves the whole batch, which so affects every sample within the tolerances."""
    t, after = _grid(times, sde)

    def velocity(x, t):
        return sdes.flow(x, require_shape(x, score(x, t)), sde, t)
    states, _ = rk45(velocity, x, t[0], after, rtol, atol)
    yield from states


def rk45(velocity, x, start, times, rtol, atol):
    """(states of dx/dt = velocity(x, t) at times, (N, *x.shape); evaluations), by SciPy."""
    from scipy.integrate import solve_ivp
    check_domain(rtol=rtol, atol=atol)

    def finite(t, y):  # else the solver's step size becomes NaN and it never ends
        v = velocity(y.reshape(x.shape), t).ravel()
        if not np.isfinite(v).all():
            raise FloatingPointError(f"the velocity is not finite at t = {t:g}")
        return v
    if not x.size:
        return np.empty((len(times), *x.shape)), 0
    y = solve_ivp(finite, (start, times[-1]), np.ravel(x), t_eval=times, rtol=rtol, atol=atol)
    if not y.success:
        raise FloatingPointError(f"RK45 stopped at t = {y.t[-1:]}: {y.message}")
    return y.y.T.reshape(-1, *x.shape), y.nfev


def _grid(times, sde):
    """(t, the time after it) of each step, from falling times (N+1,) or a number of steps."""
    if np.ndim(times) == 0:
        if not times >= 1 or times % 1:
            raise ValueError(f"times must be a whole number of steps, or fall, got {times}")
        times = np.linspace(sde.T, 0, int(times) + 1)
    times = schedule(times, "times")
    if times.size < 2 or not (np.diff(times) < 0).all():
        raise ValueError("times must be at least two numbers, each smaller than the last")
    times = check_domain(sde=sde, t=times)["t"]
    return times[:-1], times[1:]

"""The sampling loops: generators of states that hold no formula.

Each takes `score(x, level)`, a start `x`, its noise levels or times, and an `engine`. An
engine turns a step into a function that draws its own noise:

    move = engine(step, tag, **parameters)
    x = move(k, x, s)

`Reference(seed)` here runs the step as printed, in NumPy; `kernels.Fused(seed, backend)`
runs it in one fused kernel with the same noise. `level` is sigma (Langevin, EDM,
DPM-Solver++), the index i (DDPM, DDIM) or the time t (SDEs). The `times` of an SDE are
(N+1,) and fall, or a number N of even steps from T to 0.

Example: *_, x = reverse_sde(score, x, VP(), 100, Reference(seed=0))
"""

import numpy as np

from . import ddpm, langevin, noise, solvers
from . import sde as sdes
from .affine import accepted_by, coefficient_row, operands
from .arguments import SLACK, check_domain, check_falling, require_shape, schedule
from .noise import CHURN, CORRECTOR, FORWARD, PREDICTOR, PRIOR
from .predictions import posterior_mean


class Reference:
    """An engine: the steps as the papers print them, in NumPy, with the contract's noise.

    seed names the run, sample the first row of x. normal(shape, k, tag), if given, is the
    source of noise instead.
    """

    def __init__(self, seed=0, sample=0, normal=None):
        def contract(shape, k, tag):
            return noise.normal(shape, seed, sample, k, tag)
        self.normal = normal or contract

    def __call__(self, step, tag, denoise=None, clip=None, **parameters):
        """move(k, x, *u), which runs step k of a schedule on x and the other operands u.

        denoise, clip: for a step whose second operand is denoise(x, s) clipped to (lo, hi).
        parameters: the step's own, numbers or arrays (N,).
        Errors are those of `coefficient_row`. move raises TypeError for a tensor and
        ValueError for an operand of another shape.
        """
        coefficient_row(step, denoise, clip, **parameters)  # refuses what a kernel would
        parameters = check_domain(**parameters)

        def parameters_of(f, k):
            accepted = accepted_by(f, parameters)
            return {name: v[k] if np.ndim(v) else v for name, v in accepted.items()}

        def move(k, x, *u):
            if hasattr(x, "data_ptr"):
                raise TypeError("x must be a NumPy array; kernels.Fused takes tensors")
            u = [require_shape(x, v) for v in u]
            if denoise:
                x0_hat = denoise(x, u[0], **parameters_of(denoise, k))
                u[0] = x0_hat if clip is None else np.clip(x0_hat, *clip)
            if operands(step)[-1] == "z":
                z = self.normal(x.shape, k, tag)
                u.append(require_shape(x, z, "z"))
            return step(x, *u, **parameters_of(step, k))
        return move

    def correct(self, step, rule, x, s, k, tag):
        """In place, x becomes step(x, s, z, eps), eps = rule(|z_b|, |s_b|) of sample b."""
        def norm(u):
            squares = np.square(u, dtype=float)
            return squares.sum(tuple(range(1, x.ndim)))**.5

        z = require_shape(x, self.normal(x.shape, k, tag), "z")
        require_shape(x, s)
        one_each = (-1, *[1] * (x.ndim - 1))
        eps = rule(norm(z), norm(s)).reshape(one_each)
        x[...] = step(x, s, z, eps=eps)
        return x


def prior(shape, std=1., seed=0, sample=0):
    """x_T = std z, float32 of `shape`: where a reverse process starts. std: `prior_std`."""
    return np.float32(std) * noise.normal(shape, seed, sample, tag=PRIOR)


def check_finite(states):
    """The states. FloatingPointError names the first step whose state is not finite."""
    for k, x in enumerate(states):
        if not (abs(x) < np.inf).all():
            raise FloatingPointError(f"step {k}: the state is not finite")
        yield x


def _unchanged(k, x):
    """The state as it is: a loop's own steps alone."""
    return x


def iterate(step, score, x, levels, engine, correct=_unchanged, **parameters):
    """N states: x_{k+1} = correct(k, step(x_k, score(x_k, levels[k]), z_k; parameters[k])).

    levels: (N,). parameters: the step's own and its denoise stage, each a number or (N,).
    ValueError for one of another shape.
    """
    for name, v in parameters.items():
        if name != "clip" and np.shape(v) not in ((), np.shape(levels)):
            raise ValueError(f"{name} {np.shape(v)} must be one, "
                             f"or one of {len(levels)} levels")
    move = engine(step, PREDICTOR, **parameters)
    for k, level in enumerate(levels):
        x = correct(k, move(k, x, score(x, level)))
        yield x


def denoise(score, x, level, engine, a, sigma):
    """E[x_0 | x], a sampler's last step, without noise: `predictions.posterior_mean`."""
    move = engine(posterior_mean, PREDICTOR, a=a, sigma=sigma)
    return move(0, x, score(x, level))


def annealed_langevin(score, x, sigmas, engine, eps=2e-5, n_steps=100):
    """SMLD: n_steps Langevin steps a level, from the largest sigma down.
    [SMLD Alg. 1, NCSNv2 Alg. 1]

    score(x, sigma); sigmas (L,), falling. The last state still has noise of sigmas[-1],
    which `denoise` takes out.
    """
    check_domain(n_steps=n_steps)
    alphas = langevin.step_sizes(sigmas, eps)
    levels = np.repeat(sigmas, n_steps)
    yield from iterate(langevin.langevin_step, score, x, levels, engine,
                       eps=np.repeat(alphas, n_steps))


def ancestral(score, x, betas, engine, variances=None, *, last_noise=False, clip=None):
    """DDPM: i = N-1 ... 0 with score(x, i). [DDPM Alg. 2]

    variances: (N,), by default the betas. last_noise: whether the step from i = 0 adds
    noise; the paper's algorithm adds none. clip: (lo, hi) of the predicted x_0, from which
    the posterior's mean is then formed. For a subset of another chain's steps, pass
    `ddpm.subset_betas`; i then counts the subset.
    """
    betas = schedule(betas, "betas")
    variances = np.array(betas if variances is None else variances, np.float64)
    require_shape(betas, variances, "variances")
    check_domain(variance=variances)
    if not last_noise:
        variances[0] = 0.
    if clip is None:
        step = ddpm.ancestral_step
        parameters = {"beta": betas[::-1]}
    else:
        alpha_bar = ddpm.alpha_bars(betas)
        step = ddpm.posterior_step
        parameters = {"denoise": ddpm.predicted_x0, "clip": clip,
                      "alpha_bar": alpha_bar[::-1],
                      "alpha_bar_prev": ddpm.previous(alpha_bar)[::-1]}
    i = np.arange(len(betas))[::-1]
    yield from iterate(step, score, x, i, engine,
                       variance=variances[::-1], **parameters)


def ddim(score, x, alpha_bar, engine, eta=0.):
    """DDIM: i = N-1 ... 0 with score(x, i), ending at alpha_bar = 1. [DDIM eq. 12]

    alpha_bar: (N,), falling, a whole chain's or a subset; i counts those given.
    eta in [0, 1]: `ddpm.ddim_step`.
    """
    alpha_bar = check_falling(alpha_bar, "alpha_bar")
    i = np.arange(len(alpha_bar))[::-1]
    alpha_bar_prev = ddpm.previous(alpha_bar)
    yield from iterate(ddpm.ddim_step, score, x, i, engine, eta=eta,
                       alpha_bar=alpha_bar[::-1], alpha_bar_prev=alpha_bar_prev[::-1])


def reverse_sde(score, x, sde, times, engine, step=sdes.reverse_sde_step, **options):
    """Euler-Maruyama on the reverse-time SDE, with score(x, t). options: `iterate`'s."""
    t, t_next = _grid(times, sde)
    yield from iterate(step, score, x, t, engine,
                       sde=sde, t=t, dt=t - t_next, **options)


def pf_ode(score, x, sde, times, engine, **options):
    """Euler on the probability-flow ODE, with score(x, t). options: `iterate`'s."""
    yield from reverse_sde(score, x, sde, times, engine, sdes.pf_ode_step, **options)


def reverse_diffusion(score, x, sde, times, engine, step=sdes.reverse_diffusion_step,
                      **options):
    """The SDE's own chain reversed, one step a time, with score(x, t). [SDE eq. 46]

    The index of a time is i = trunc(t (n-1) / T). ValueError unless the n times but the
    last have i = n-1 ... 0, n > 1. options: `iterate`'s.
    """
    t, _ = _grid(times, sde)
    n = len(t)
    share = t / sde.T + SLACK  # SLACK, for a time that rounding alone made smaller
    i = np.trunc(share * (n - 1)).astype(int)
    if n < 2 or (i != np.arange(n)[::-1]).any():
        raise ValueError("times must be at least three and fall evenly from T, "
                         "one an index")
    yield from iterate(step, score, x, t, engine,
                       sde=sde, i=i, n=n, **options)


def ancestral_sde(score, x, sde, times, engine, **options):
    """Ancestral sampling of VE's or VP's chain. [SDE eqs. 4 and 47]

    Otherwise as `reverse_diffusion`. ValueError for another SDE.
    """
    if not hasattr(sde, "ancestral"):
        raise ValueError(f"sde must be VE or VP for ancestral sampling, got {sde}")
    yield from reverse_diffusion(score, x, sde, times, engine,
                                 sdes.ancestral_step, **options)


CORRECTORS = "langevin", "batch_langevin", "annealed"


def predictor_corrector(score, x, sde, times, engine, *, predictor=reverse_sde,
                        corrector="langevin", snr=.16, n_corrector=1):
    """A predictor's step, then n_corrector Langevin steps. [SDE Algs. 1, 4 and 5]

    score(x, t); a correction is at the time that the predictor reached.
    predictor: reverse_sde, reverse_diffusion, ancestral_sde or pf_ode.
    corrector: where its step size comes from. "langevin": from each sample's own norms;
      this biases in low dimension, and in two |s| comes near 0 and steps explode.
      "batch_langevin": from the norms' means over the batch. "annealed": from sigma(t).
    The data, where sigma(t) = 0, is not corrected. ValueError where kappa <= 0.
    """
    if corrector not in CORRECTORS:
        raise ValueError(f"corrector {corrector!r} is none of {', '.join(CORRECTORS)}")
    check_domain(snr=snr, n_corrector=n_corrector)
    t, t_next = _grid(times, sde)
    _, sigma = sde.marginal(t_next)
    n = np.count_nonzero(sigma)
    kappa = sde.kappa(t_next, t - t_next)[:n]
    if not (kappa > 0).all():
        raise ValueError("times: steps too long for the corrector's "
                         "kappa = 1 - beta(t) dt > 0")

    def correct(k, x):
        def rule(z_norm, s_norm):
            if corrector == "batch_langevin":
                z_norm = z_norm.mean()
                s_norm = s_norm.mean()
            if corrector == "annealed":
                z_norm = sigma[k] + 0 * z_norm
                s_norm = 1.
            return solvers.snr_step_size(z_norm, s_norm, snr, kappa[k])

        if k >= n:  # the data has no noise left
            return x
        for tag in range(CORRECTOR, CORRECTOR + n_corrector):
            s = score(x, t_next[k])
            x = engine.correct(langevin.langevin_step, rule, x, s, k, tag)
        return x

    yield from predictor(score, x, sde, times, engine, correct=correct)


def forward_sde(x, sde, times, engine):
    """Euler-Maruyama on the forward SDE. times: (N+1,), rising, or N even steps to T."""
    falling = times[::-1] if np.ndim(times) else times
    t_next, t = _grid(falling, sde)
    dt = (t_next - t)[::-1]
    move = engine(sdes.forward_sde_step, FORWARD,
                  sde=sde, t=t[::-1], dt=dt)
    for k in range(len(t)):
        x = move(k, x)
        yield x


def heun(score, x, sde, times, engine, *, t_hat=None, add_noise=_unchanged):
    """Heun on the probability-flow ODE, with score(x, t). [EDM Alg. 1]

    A last step to t = 0, where there is no score, is Euler's: then 2 N - 1 evaluations.
    t_hat, add_noise: where given, step k starts from add_noise(k, x) at the time t_hat[k].
    """
    t, t_next = _grid(times, sde)
    if t_hat is not None:
        t = t_hat
    dt = t - t_next
    n = np.count_nonzero(t_next)
    euler = engine(sdes.pf_ode_step, PREDICTOR,
                   sde=sde, t=t, dt=dt)
    trapezoid = engine(sdes.heun_step, PREDICTOR,
                       sde=sde, t=t[:n], dt=dt[:n])
    for k in range(len(t)):
        x = add_noise(k, x)
        s = score(x, t[k])
        x_next = euler(k, x, s)
        if k < n:
            x_next = trapezoid(k, x, s, score(x_next, t_next[k]))
        x = x_next
        yield x


def edm(score, x, sigmas, engine, **churn):
    """EDM's sampler: Heun along falling sigmas (N,), then to 0. [EDM Alg. 2]

    score(x, sigma), 2 N - 1 evaluations. churn: keywords of `solvers.churn`, by which fresh
    noise raises each level first; by default it raises none.
    """
    sigmas = check_falling(sigmas)
    sigma_hat, std = solvers.churn(sigmas, **churn)
    perturb = engine(sdes.perturb, CHURN,
                     a=1., sigma=np.where(std > 0, std, 1.))

    def add_noise(k, x):
        return perturb(k, x) if std[k] > 0 else x

    times = np.append(sigmas, 0.)
    yield from heun(score, x, sdes.EDM(sigma_hat.max()), times, engine,
                    t_hat=sigma_hat, add_noise=add_noise)


def dpmpp_2m(score, x, sigmas, engine):
    """DPM-Solver++(2M) along falling sigmas (N,), then to 0. [DPM-Solver++ Alg. 2]

    score(x, sigma), N evaluations. The first step is Euler's, the last is D itself.
    """
    sigmas = check_falling(sigmas)
    first = sigmas[0]
    euler = engine(sdes.pf_ode_step, PREDICTOR,
                   sde=sdes.EDM(first), t=first, dt=first - sigmas[1:2])
    multistep = engine(solvers.dpmpp_2m_step, PREDICTOR,
                       sigma_prev=sigmas[:-2], sigma=sigmas[1:-1], sigma_next=sigmas[2:])
    x_prev = s_prev = None
    for k, sigma in enumerate(sigmas[:-1]):
        s = score(x, sigma)
        if k == 0:
            x_next = euler(0, x, s)  # nothing yet to extrapolate from
        else:
            x_next = multistep(k - 1, x, s, x_prev, s_prev)
        x_prev, s_prev, x = x, s, x_next
        yield x
    last = sigmas[-1]
    yield denoise(score, x, last, engine, a=1., sigma=last)


def pf_ode_adaptive(score, x, sde, times, rtol=1e-5, atol=1e-5):
    """The probability-flow ODE by RK45, with score(x, t): states at times[1:].

    It takes and gives NumPy arrays. One step size serves the whole batch, so within the
    tolerances each sample depends on the others.
    """
    t, t_next = _grid(times, sde)

    def velocity(x, t):
        s = require_shape(x, score(x, t))
        return sdes.flow(x, s, sde, t)

    states, _ = rk45(velocity, x, t[0], t_next, rtol, atol)
    yield from states


def rk45(velocity, x, start, times, rtol, atol):
    """(states, evaluations) of dx/dt = velocity(x, t) from x at `start`, by SciPy's RK45.

    states: at the times, (N, *x.shape). FloatingPointError where the velocity is not finite
    or the solver gives up.
    """
    from scipy.integrate import solve_ivp
    check_domain(rtol=rtol, atol=atol)

    def checked(t, y):  # else the solver's step size becomes NaN and it never ends
        v = velocity(y.reshape(x.shape), t).ravel()
        if not np.isfinite(v).all():
            raise FloatingPointError(f"the velocity is not finite at t = {t:g}")
        return v
    if not x.size:
        return np.empty((len(times), *x.shape)), 0
    found = solve_ivp(checked, (start, times[-1]), np.ravel(x), t_eval=times,
                      rtol=rtol, atol=atol)
    if not found.success:
        raise FloatingPointError(f"RK45 stopped at t = {found.t[-1:]}: {found.message}")
    return found.y.T.reshape(-1, *x.shape), found.nfev


def _grid(times, sde):
    """(t, t_next) of each step, from falling times (N+1,) or a number of even steps."""
    if np.ndim(times) == 0:
        if not times >= 1 or times % 1:
            raise ValueError(f"times must be a whole number of steps, or fall, got {times}")
        times = np.linspace(sde.T, 0, int(times) + 1)
    times = schedule(times, "times")
    if times.size < 2 or not (np.diff(times) < 0).all():
        raise ValueError("times must be at least two numbers, each smaller than the last")
    times = check_domain(sde=sde, t=times)["t"]
    return times[:-1], times[1:]

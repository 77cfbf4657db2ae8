"""The sampling loops: generators of states that hold no formula.

A chapter gave each step; a loop says in which order they go, at which levels, and where the
score is asked. It yields every state, so that plotting, logging and stopping stay outside:
for x in loop(...) goes with it, *_, x = loop(...) takes the last.

Each takes `score(x, level)`, a start `x`, its noise levels or times, and an `engine`. An
engine turns a step into a function that draws its own noise:

    move = engine(step, tag, steps, **parameters)
    x = move(k, x, s)

`Reference(seed)` here runs the step as printed, in NumPy; `kernels.Fused(seed, backend)`
runs it in one fused kernel with the same noise. An engine is one run (minidiff.engine): a
loop claims the steps whose noise it draws, `first_step` on. So a chain in pieces is the
chain: the second loop of 100 steps takes first_step=100. Levels and parameters are those
of the piece and count from 0. `level` is sigma (Langevin, EDM, DPM-Solver++), the index i
(DDPM, DDIM) or the time t (SDEs). The `times` of an SDE are (N+1,) and fall, or a number N
of even steps from T to 0.

Example:
    >>> from minidiff.sde import VP
    >>> score = lambda x, t: -x  # of N(0, 1), which VP leaves as it is
    >>> *_, x = reverse_sde(score, prior((4096, 1)), VP(), 100, Reference(seed=0))
    >>> print(x.std().round(1))
    1.0

Next: `likelihood`; `guidance`; and `families`, which gives every loop its levels.
"""

from operator import index

import numpy as np

from . import ddpm, noise, solvers
from . import sde as sdes
from .affine import accepted_by, coefficient_row, operands
from .arguments import SLACK, check_domain, check_falling, require_shape, schedule
from .engine import Engine, at, draws, usable
from .langevin import langevin_step, step_sizes
from .noise import CHURN, CORRECTOR, FORWARD, PREDICTOR, PRIOR
from .predictions import posterior_mean


class Reference(Engine):
    """An engine: the steps as the papers print them, in NumPy, with the contract's noise.

    seed, sample, normal: as in `Engine`. A state keeps its precision, float32 or float64.
    """

    def __init__(self, seed=0, sample=0, normal=None):
        super().__init__(seed, sample, normal)

    def __call__(self, step, tag, steps=None, denoise=None, clip=None, **parameters):
        """move(k, x, *u), which runs step k of a schedule on x and the other operands u.

        steps: a range to claim for this tag; step k then draws the noise of steps[k]. None
        claims nothing: step k draws that of k.
        denoise, clip: for a step whose second operand is denoise(x, s) clipped to (lo, hi).
        parameters: the step's own, numbers or arrays (N,).
        Errors are those of `coefficient_row` and `Engine.claim`. move raises TypeError for
        a tensor and ValueError for an operand of another shape.
        """
        row = coefficient_row(step, denoise, clip, **parameters)
        parameters = check_domain(**parameters)
        first = self.claim(tag, steps) if draws(step, row) else 0

        def move(k, x, *u):
            if hasattr(x, "data_ptr"):
                raise TypeError("x must be a NumPy array; kernels.Fused takes tensors")
            u = [require_shape(x, v) for v in u]
            if denoise:
                of_step = at(k, accepted_by(denoise, parameters))
                x0_hat = denoise(x, u[0], **of_step)
                u[0] = x0_hat if clip is None else np.clip(x0_hat, *clip)
            if operands(step)[-1] == "z":
                u.append(self._normal(x, first + k, tag))
            of_step = at(k, accepted_by(step, parameters))
            return like(x, step(x, *u, **of_step))
        return move

    def corrector(self, step, rule, tag, steps=None, **parameters):
        """correct(k, x, s): in place, x becomes step(x, s, z, eps), a step size a sample.

        eps = rule(|z_b|, |s_b|, **parameters) of sample b. steps, parameters: as in a call.
        """
        first = self.claim(tag, steps)

        def norm(u):
            squares = np.square(u, dtype=float)
            return squares.sum(tuple(range(1, u.ndim)))**.5

        def correct(k, x, s):
            z = self._normal(x, first + k, tag)
            require_shape(x, s)
            one_each = (-1, *[1] * (x.ndim - 1))
            with np.errstate(divide="ignore", over="ignore"):
                eps = usable(rule(norm(z), norm(s), **at(k, parameters)), np)
            x[...] = step(x, s, z, eps=eps.reshape(one_each))
            return x
        return correct

    def _normal(self, x, k, tag):
        """The noise of a step, like x."""
        if self.normal:
            z = self.normal(x.shape, k, tag)
        else:
            z = noise.normal(x.shape, self.seed, self.sample, k, tag)
        return require_shape(x, z, "z")


def like(x, x_next):
    """The next state in x's precision: a float32 network is given float32 at every step."""
    kind = getattr(getattr(x, "dtype", None), "kind", None)
    return x_next.astype(x.dtype, copy=False) if kind == "f" else x_next


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


def steps_from(first_step, n):
    """The n steps from first_step on, as a range. TypeError where that is no int."""
    try:
        first = index(first_step)
    except TypeError:
        raise TypeError(f"first_step must be an int, got {first_step!r}") from None
    return range(first, first + n)


def iterate(step, score, x, levels, engine, correct=_unchanged, *, first_step=0,
            **parameters):
    """N states: x_{k+1} = correct(k, step(x_k, score(x_k, levels[k]), z_k; parameters[k])).

    levels: (N,). correct(k, x): what follows a step, by default nothing. first_step: of the
    noise; step k draws first_step + k's. parameters: the step's own and its denoise stage,
    each a number or (N,). ValueError for one of another shape, and where the engine has
    drawn a step before.
    """
    for name, v in parameters.items():
        if name != "clip" and np.shape(v) not in ((), np.shape(levels)):
            raise ValueError(f"{name} {np.shape(v)} must be one, "
                             f"or one of {len(levels)} levels")
    steps = steps_from(first_step, len(levels))
    move = engine(step, PREDICTOR, steps, **parameters)
    for k, level in enumerate(np.asarray(levels).tolist()):
        x = correct(k, move(k, x, score(x, level)))
        yield x


def denoise(score, x, level, engine, a, sigma):
    """E[x_0 | x], a sampler's last step, without noise: `predictions.posterior_mean`."""
    move = engine(posterior_mean, PREDICTOR, a=a, sigma=sigma)
    return move(0, x, score(x, np.asarray(level).item()))


def langevin(score, x, n, engine, eps=1e-2, *, correct=_unchanged, first_step=0):
    """Langevin dynamics at one noise level: n steps of size eps with score(x).
    [SMLD eq. 4]

    The chain forgets its start and settles on p, but for a bias of order eps. Between modes
    that lie far apart it hardly ever crosses, so their weights stay those of the start.
    eps > 0, a number or one a step, (n,). correct, first_step: as in `iterate`.

    Example:
        >>> from minidiff.targets import Gaussian
        >>> data = Gaussian([3.], 1.)
        >>> *_, x = langevin(data.score, prior((4096, 1)), 100, Reference(seed=0), eps=.1)
        >>> print(x.mean().round(1), x.std().round(1))
        3.0 1.0
    """
    check_domain(n=n, eps=eps)
    yield from iterate(langevin_step, lambda x, _: score(x), x, np.arange(n), engine,
                       correct, first_step=first_step, eps=eps)


def annealed_langevin(score, x, sigmas, engine, eps=2e-5, n_steps=100, *,
                      correct=_unchanged, first_step=0):
    """SMLD: n_steps Langevin steps a level, from the largest sigma down.
    [SMLD Alg. 1; NCSNv2]

    score(x, sigma); sigmas (L,), falling. The last state still has noise of sigmas[-1],
    which `denoise` takes out. correct, first_step: as in `iterate`.
    """
    check_domain(n_steps=n_steps)
    alphas = step_sizes(sigmas, eps)
    levels = np.repeat(sigmas, n_steps)
    yield from iterate(langevin_step, score, x, levels, engine, correct,
                       first_step=first_step, eps=np.repeat(alphas, n_steps))


def ancestral(score, x, betas, engine, variances=None, *, last_noise=False, clip=None,
              correct=_unchanged, first_step=0):
    """DDPM: i = N-1 ... 0 with score(x, i). [DDPM Alg. 2]

    variances: (N,), by default the betas. last_noise: whether the step from i = 0 adds
    noise; the paper's algorithm adds none. clip: (lo, hi) of the predicted x_0, from which
    the posterior's mean is then formed. For a subset of another chain's steps, pass
    `ddpm.subset_betas`; i then counts the subset. correct, first_step: as in `iterate`.
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
    yield from iterate(step, score, x, i, engine, correct, first_step=first_step,
                       variance=variances[::-1], **parameters)


def ddim(score, x, alpha_bar, engine, eta=0., *, correct=_unchanged, first_step=0):
    """DDIM: i = N-1 ... 0 with score(x, i), ending at alpha_bar = 1. [DDIM eq. 12]

    At eta = 0, the default, it is a solver of the probability flow: no noise, and few steps
    do. alpha_bar: (N,), falling, a whole chain's or a subset; i counts those given. eta in
    [0, 1]: `ddpm.ddim_step`. correct, first_step: as in `iterate`. ValueError for alpha_bar
    that does not fall within (0, 1).
    """
    alpha_bar = check_falling(alpha_bar, "alpha_bar")
    i = np.arange(len(alpha_bar))[::-1]
    alpha_bar_prev = ddpm.previous(alpha_bar)
    yield from iterate(ddpm.ddim_step, score, x, i, engine, correct,
                       first_step=first_step, eta=eta, alpha_bar=alpha_bar[::-1],
                       alpha_bar_prev=alpha_bar_prev[::-1])


def reverse_sde(score, x, sde, times, engine, step=sdes.reverse_sde_step, *,
                correct=_unchanged, first_step=0):
    """Euler-Maruyama on the reverse-time SDE, with score(x, t). [SDE eq. 6]

        dx = [f - g^2 s] dt + g dw,  from the first of the times to the last

    The plainest way from noise to data: every step draws noise, and the path shakes. times:
    falling, (N+1,), else ValueError, or a number N. correct, first_step: as in `iterate`.
    """
    t, t_next = _grid(times, sde)
    yield from iterate(step, score, x, t, engine, correct, first_step=first_step,
                       sde=sde, t=t, dt=t - t_next)


def pf_ode(score, x, sde, times, engine, *, correct=_unchanged, first_step=0):
    """Euler on the probability-flow ODE, with score(x, t). [SDE eq. 13]

        dx = [f - g^2 s / 2] dt

    The same distributions without noise on the way: one map from noise to data. times,
    correct, first_step: as in `reverse_sde`.
    """
    yield from reverse_sde(score, x, sde, times, engine, sdes.pf_ode_step,
                           correct=correct, first_step=first_step)


def reverse_diffusion(score, x, sde, times, engine, step=sdes.reverse_diffusion_step, *,
                      correct=_unchanged, first_step=0):
    """The SDE's own chain reversed, one step a time, with score(x, t). [SDE eq. 46]

    The index of a time is i = trunc(t (n-1) / T). ValueError unless the n times but the
    last have i = n-1 ... 0, n > 1. correct, first_step: as in `iterate`.
    """
    t, _ = _grid(times, sde)
    n = len(t)
    slack = min(SLACK, .5 / n**2)  # the last of n even steps is at 1 - 1 / n
    share = t / sde.T + slack
    i = np.trunc(share * (n - 1)).astype(int)
    if n < 2 or (i != np.arange(n)[::-1]).any():
        raise ValueError("times must be at least three and fall evenly from T, "
                         "one an index")
    yield from iterate(step, score, x, t, engine, correct, first_step=first_step,
                       sde=sde, i=i, n=n)


def ancestral_sde(score, x, sde, times, engine, *, correct=_unchanged, first_step=0):
    """Ancestral sampling of VE's or VP's chain. [SDE eqs. 4 and 47]

    Otherwise as `reverse_diffusion`. ValueError for another SDE.
    """
    if not hasattr(sde, "ancestral"):
        raise ValueError(f"sde must be VE or VP for ancestral sampling, got {sde}")
    yield from reverse_diffusion(score, x, sde, times, engine, sdes.ancestral_step,
                                 correct=correct, first_step=first_step)


CORRECTORS = "langevin", "batch_langevin", "annealed"


def predictor_corrector(score, x, sde, times, engine, *, predictor=reverse_sde,
                        corrector="langevin", snr=.16, n_corrector=1, first_step=0):
    """A predictor's step, then n_corrector Langevin steps. [SDE Algs. 1, 4 and 5]

    score(x, t); a correction is at the time that the predictor reached.
    predictor: reverse_sde, reverse_diffusion, ancestral_sde or pf_ode.
    corrector: where its step size comes from. "langevin": from each sample's own norms;
      its eps follows |z|, and so the chain settles on |s|^2 p^(D / (D + 2)), not on p: in
      low dimension far too wide, and in two |s| comes near 0 and steps explode.
      "batch_langevin": from the norms' means over the batch. "annealed": from sigma(t).
    first_step: as in `iterate`.
    The data, where sigma(t) = 0, is not corrected. ValueError where kappa <= 0, and for
    "batch_langevin" with seeds or ids a row: there each sample depends on the others.
    """
    if corrector not in CORRECTORS:
        raise ValueError(f"corrector {corrector!r} is none of {', '.join(CORRECTORS)}")
    if corrector == "batch_langevin":
        engine.require_one_seed(corrector)
    check_domain(snr=snr, n_corrector=n_corrector)
    t, t_next = _grid(times, sde)
    _, sigma = sde.marginal(t_next)
    n = np.count_nonzero(sigma)
    kappa = sde.kappa(t_next, t - t_next)[:n]
    if not (kappa > 0).all():
        raise ValueError("times: steps too long for the corrector's "
                         "kappa = 1 - beta(t) dt > 0")

    def rule(z_norm, s_norm, sigma, kappa):
        if corrector == "batch_langevin":
            z_norm = z_norm.mean()
            s_norm = s_norm.mean()
        if corrector == "annealed":
            z_norm = sigma + 0 * z_norm
            s_norm = 1.
        return solvers.snr_step_size(z_norm, s_norm, snr, kappa)

    steps = steps_from(first_step, len(t))  # the predictor's, so that they go on together
    tags = range(CORRECTOR, CORRECTOR + n_corrector)
    if predictor is not pf_ode:
        engine.require_new([*tags, PREDICTOR], steps)
    corrections = [engine.corrector(langevin_step, rule, tag, steps,
                                    sigma=sigma, kappa=kappa)
                   for tag in tags]

    def correct(k, x):
        if k >= n:  # the data has no noise left
            return x
        for correction in corrections:
            x = correction(k, x, score(x, t_next[k].item()))
        return x

    yield from predictor(score, x, sde, times, engine, correct=correct,
                         first_step=first_step)


def forward_sde(x, sde, times, engine, *, first_step=0):
    """Euler-Maruyama on the forward SDE: data to noise, step by step. [SDE eq. 5]

        dx = f dt + g dw

    For pictures and proofs: training draws x_t at once, `sde.perturb`. times: (N+1,),
    rising, else ValueError, or N even steps to T. first_step: as in `iterate`.
    """
    falling = times[::-1] if np.ndim(times) else times
    t_next, t = _grid(falling, sde)
    dt = (t_next - t)[::-1]
    move = engine(sdes.forward_sde_step, FORWARD, steps_from(first_step, len(t)),
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
        s = score(x, t[k].item())
        x_next = euler(k, x, s)
        if k < n:
            x_next = trapezoid(k, x, s, score(x_next, t_next[k].item()))
        x = x_next
        yield x


def edm(score, x, sigmas, engine, *, s_churn=0., s_min=0., s_max=np.inf, s_noise=1.,
        first_step=0):
    """EDM's sampler: Heun along falling sigmas (N,), then to 0. [EDM Alg. 2]

    score(x, sigma), 2 N - 1 evaluations. s_churn, s_min, s_max, s_noise: by how much fresh
    noise raises each level first, as in `solvers.churn`; by default not at all. first_step:
    as in `iterate`.
    """
    sigmas = check_falling(sigmas)
    sigma_hat, std = solvers.churn(sigmas, s_churn, s_min, s_max, s_noise)
    drawn = steps_from(first_step, len(sigmas) if std.any() else 0)
    perturb = engine(sdes.perturb, CHURN, drawn,
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
    for k, sigma in enumerate(sigmas[:-1].tolist()):
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

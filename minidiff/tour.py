"""The field in pictures. Every score here is exact, so nothing is trained.

A function makes one figure from what the chapters give: a mixture, whose score is known at
every noise level, a sampler's loop, and the engine that runs it. Read one beside its
picture, change a number, and look again. Its docstring is the picture's caption.

    python -m minidiff tour --out out/tour
"""

import textwrap
import time
from itertools import islice

import numpy as np
from matplotlib import animation

from . import ddpm, samplers, score_matching, sde
from .affine import accepted_by, coefficients, operands
from .data import moons
from .files import whole
from .guidance import guide, guided
from .langevin import noise_levels
from .noise import FORWARD, PERTURBATION, PROBE, normal
from .plot import OKABE_ITO, plt
from .samplers import Reference, prior
from .solvers import dpmpp_2m_step, rho_levels
from .targets import Mixture

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = OKABE_ITO
THREE = Mixture([.5, .3, .2], [[-1., -.7], [1.2, -.4], [.1, 1.2]], .05)
TWO = Mixture([.2, .8], [[-5., -5.], [5., 5.]], 1.)  # [SMLD sec. 3.2.2]
ALL = Mixture([.25, .25, .5], [[-1.1, .5], [-.1, -.9], [.8, .5]], .15)
CLASS = Mixture([.5, .5], ALL.means[:2], .15)  # of which the first two are
LINE = Mixture([.3, .7], [[-1.4], [1.]], .03)


def points_of_a_square(half, n):
    """n by n points, (n, n, 2), of the square from -half to half."""
    side = np.linspace(-half, half, n)
    return np.stack(np.meshgrid(side, side), -1)


def show_density(axis, target, half):
    """A density of the plane in shades of blue."""
    p = np.exp(target.log_density(points_of_a_square(half, 160)))
    axis.imshow(p, origin="lower", extent=(-half, half, -half, half), cmap="Blues",
                vmax=1.5 * p.max())
    axis.set(xticks=[], yticks=[], xlim=(-half, half), ylim=(-half, half))


def show_points(axis, x, title, half, color=BLUE):
    """Points of the plane."""
    axis.scatter(*x.T, s=3, color=color, linewidths=0)
    axis.set(xticks=[], yticks=[], aspect="equal", xlim=(-half, half), ylim=(-half, half))
    axis.set_title(title, fontsize=10)


def show_arrows(axis, s, at):
    """Arrows s at the points `at`, as long as the root of their length."""
    root = s / np.linalg.norm(s, axis=-1, keepdims=True)**.5
    axis.quiver(*np.moveaxis(at, -1, 0), *np.moveaxis(root, -1, 0),
                scale=75, color=BLACK, alpha=.6, width=.004)


def score_by_sigma(data):
    """The score(x, sigma) of a distribution with noise of std sigma."""
    return lambda x, sigma: data.noised(1, sigma).score(x)


def score_by_time(data, process):
    """The score(x, t) of a distribution that a process has carried to t."""
    return lambda x, t: data.noised(*process.marginal(t)).score(x)


def show_times(axis, data, process, times, half=3.):
    """p_t(x) of data on a line in shades of blue, each time scaled to its own peak."""
    height = np.linspace(-half, half, 300)
    p = [np.exp(data.noised(*process.marginal(t)).log_density(height[:, None]))
         for t in times]
    shade = (np.transpose(p) / np.max(p, axis=1))**.6
    axis.pcolormesh(times, height, shade, cmap="Blues", vmax=1.25, rasterized=True)
    axis.set(xlim=(1, -.01), ylim=(-half, half), xlabel="t: noise at 1, data at 0")


def show_paths(axis, times, states):
    """Paths of points of a line, from noise to data, each up to its dot."""
    axis.plot(times, states[..., 0], "o-", markevery=[-1], color=ORANGE, mec="white", lw=.9)


def score_field(seed=0):
    """The score is an arrow at every point: where the log density rises fastest. Its length
    is how fast, drawn here as the square root, on one scale. Little noise: steep hills, and
    between them arrows that no sample has ever seen. Much noise: one broad hill, and arrows
    that lead from anywhere to the data. Langevin paths (orange, each up to its dot) follow
    the arrows and shake.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3))
    start = prior((5, 2), 1.2, seed)
    at = points_of_a_square(2.8, 13)
    for axis, sigma in zip(axes, (.1, .4, 1.2)):
        noised = THREE.noised(1, sigma)
        show_density(axis, noised, 3.2)
        show_arrows(axis, noised.score(at), at)
        eps = .02 * sigma + .002
        states = samplers.langevin(noised.score, start, 120, Reference(seed), eps=eps)
        path = np.stack([start, *states])
        axis.plot(path[..., 0], path[..., 1], color=ORANGE, lw=1)
        axis.plot(*path[-1].T, "o", color=ORANGE, mec="white", ms=6)
        axis.set_title(f"noise of std {sigma}: score and Langevin paths", fontsize=10)
    return figure


def langevin_weights(seed=0):
    """Langevin at one noise level keeps the weights of its start: no path crosses the empty
    middle. Annealed Langevin starts where the noise joins the modes, lets the weights
    settle, and takes the noise away.
    """
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6))
    z = prior((2000, 2), seed=seed)
    *_, plain = samplers.langevin(TWO.score, 8 * z, 300, Reference(seed), eps=.1)

    levels = noise_levels(40, 20., .1)
    *_, annealed = samplers.annealed_langevin(score_by_sigma(TWO), 20 * z, levels,
                                              Reference(seed), eps=.002, n_steps=30)
    shown = {"start": 8 * z, "Langevin": plain, "annealed Langevin": annealed,
             "data": TWO.sample(2000, seed)}
    for axis, (name, x) in zip(axes, shown.items()):
        left = x.sum(1) < 0  # nearer to the mode on the left
        show_points(axis, x, f"{name}: {left.mean():.2f} on the left", 13,
                    np.where(left, ORANGE, BLUE))
    return figure


def losses(m, data, n=20000, seed=0, sigma=.4, h=1e-5):
    """{name: value} of the four objectives, on data, for the model with modes at -m and m.

    Sliced takes a derivative along a probe v: here a difference over 2 h.
    """
    model = Mixture([.5, .5], [[-m, 0.], [m, 0.]], .25)
    x = data.sample(n, seed)
    v = normal((n, 2), seed, tag=PROBE)
    z = normal((n, 2), seed, tag=PERTURBATION)
    s = model.score(x)
    jacobian_v = (model.score(x + h * v) - model.score(x - h * v)) / (2 * h)
    noised = model.noised(1, sigma).score(x + sigma * z)
    return {"explicit": score_matching.explicit(s, data.score(x)),
            "implicit": score_matching.implicit(s, model.jacobian_trace(x)),
            "sliced": score_matching.sliced(s, v, jacobian_v),
            "denoising": score_matching.denoising(noised, z, sigma)}


def four_losses(seed=0):
    """Four objectives, one minimum. Explicit score matching needs the score of the data,
    which nobody has. Implicit and sliced trade it for a derivative of the model, and differ
    from it by a constant: above their lowest points the three are one curve. Denoising
    trades it for noise that we drew ourselves. It is explicit matching of the noisy data,
    plus a constant: another curve, but its minimum is here too, for with noise the model of
    the data is that of the noisy data. The data's modes are at -1 and 1.
    """
    data = Mixture([.5, .5], [[-1., 0.], [1., 0.]], .25)
    at = np.linspace(.6, 1.4, 41)
    found = [losses(m, data, seed=seed) for m in at]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.3))
    looks = (SKY, "-", 6), (BLACK, "--", 2), (BLUE, ":", 2.5), (ORANGE, "-", 2)
    for name, (color, style, width) in zip(found[0], looks):
        curve = np.array([values[name] for values in found])
        lowest = curve.argmin()
        label = f"{name}: lowest at {at[lowest]:.2f}"
        for axis, shown in zip(axes, (curve, curve - curve[lowest])):
            axis.plot(at, shown, style, color=color, lw=width, label=label)
            axis.plot(at[lowest], shown[lowest], "o", color=color)
    titles = "the objectives", "each above its lowest point"
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="where the model has its modes")
        axis.legend(fontsize=8)
    axes[0].set(ylabel="J", ylim=(-4, 9))
    return figure


def ddpm_there_and_back(seed=0):
    """Above, DDPM's thousand small steps turn two moons into noise. Below, ancestral
    sampling starts from other noise, on the right, and takes the steps back, led by the
    score alone.
    """
    n, steps = 800, (0, 60, 150, 300, 500, 1000)
    data = Mixture(np.ones(100), moons(100, seed) * 2, .01)
    betas = ddpm.linear_betas()
    alpha_bar = ddpm.alpha_bars(betas)
    forward = Reference(seed)(ddpm.forward_step, FORWARD, range(1000), beta=betas)
    there = [data.sample(n, seed)]
    for i in range(1000):
        there.append(forward(i, there[-1]))

    def score(x, i):
        return data.noised(alpha_bar[i]**.5, (1 - alpha_bar[i])**.5).score(x)

    z = prior((n, 2), seed=seed)
    back = [z, *samplers.ancestral(score, z, betas, Reference(seed))]
    figure, axes = plt.subplots(2, len(steps), figsize=(12, 4.6))
    for column, i in zip(axes.T, steps):
        show_points(column[0], there[i], f"after {i} steps", 2.8)
        show_points(column[1], back[1000 - i], f"{i} steps to go", 2.8, ORANGE)
    return figure


def processes():
    """Four ways to drown data: x_t = a x_0 + sigma z. VE leaves the data where it is and
    piles noise on it. VP lets the data fade, so that data of std 1 keep it. Sub-VP adds
    less noise on the way. Flow matching leads from data to noise in straight lines. At
    equal sigma / a all four are one distribution, scaled.
    """
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6))
    titles = "mean: a", "spread: sigma", "std, data of std 1", "noise over signal"
    kinds = sde.VE(), sde.VP(), sde.SubVP(), sde.FlowMatching()
    for kind, style in zip(kinds, ("-", "-", "--", "-")):
        t = np.linspace(0, kind.T, 400)
        a, sigma = kind.marginal(t)
        curves = a, sigma, (a**2 + sigma**2)**.5, sigma / a
        for axis, curve, title in zip(axes, curves, titles):
            axis.plot(t, curve, style, lw=2, label=type(kind).__name__)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("t")
    for axis, ends in zip(axes[1:], ((5e-3, 300), (.3, 100), (5e-3, 300))):
        axis.set(yscale="log", ylim=ends)
    axes[0].legend()
    return figure


def reversal(seed=0):
    """Time runs from noise, on the left, to data. The colour is p_t(x), known exactly, each
    time scaled to its own peak. Both sides start at the same points: the reverse SDE shakes
    on its way, the probability flow does not, and at every time both have the distribution
    p_t.
    """
    vp = sde.VP()
    times = np.linspace(1, 1e-3, 601)
    z = prior((8, 1), seed=seed)
    score = score_by_time(LINE, vp)
    runs = {"reverse SDE": samplers.reverse_sde(score, z, vp, times, Reference(seed)),
            "probability flow": samplers.pf_ode(score, z, vp, times, Reference(seed))}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.3), sharey=True)
    for axis, (name, states) in zip(axes, runs.items()):
        show_times(axis, LINE, vp, times)
        show_paths(axis, times, np.stack([z, *states]))
        axis.set_title(name)
    axes[0].set_ylabel("x")
    return figure


def variances(step, tag, steps=None, **parameters):
    """An engine that moves no sample but the variance of all samples, exactly.

    For data N(0, V) the score is k x, and the loops' score returns k. A step then is
    x' = (a + b k) x + c z: it multiplies x, and adds noise. var' = (a + b k)^2 var + c^2.
    """
    rows = np.atleast_2d(coefficients(step, **parameters))

    def move(i, variance, k=0.):
        row = dict(zip(operands(step), rows[i % len(rows)]))
        of_x = row["x"] + row.get("s", 0.) * k
        return of_x**2 * variance + row.get("z", 0.)**2
    return move


def solver_errors(n, V=.25):
    """{step: how wrong the final std is} of n steps from noise 80 to .002, data N(0, V)."""
    levels = rho_levels(n + 1, 80., .002)
    start, exact = V + levels[[0, -1]]**2
    edm, ve = sde.EDM(), sde.VE(.002, 80.)
    times = np.append(np.linspace(1, 1e-5 / n, n + 1), 0.)  # of VE's own chain
    alpha_bar = 1 / (1 + levels[::-1]**2)  # a DDPM chain through the same levels
    betas = ddpm.subset_betas(alpha_bar)

    def k(a, sigma):
        return -1 / (a**2 * V + sigma**2)

    def at_sigma(_, sigma):
        return k(1., sigma)

    def at_time(_, t):
        return k(*ve.marginal(t))

    def at_index(_, i):
        return k(alpha_bar[i]**.5, (1 - alpha_bar[i])**.5)

    def score(x, sigma):
        return k(1., sigma) * x

    laws = {sde.pf_ode_step: samplers.pf_ode(at_sigma, start, edm, levels, variances),
            sde.reverse_sde_step: samplers.reverse_sde(
                at_sigma, start, edm, levels, variances),
            sde.reverse_diffusion_step: samplers.reverse_diffusion(
                at_time, start, ve, times, variances),
            sde.ancestral_step: samplers.ancestral_sde(
                at_time, start, ve, times, variances)}
    chains = {ddpm.ddim_step: samplers.ddim(
                  at_index, start * alpha_bar[-1], alpha_bar, variances),
              ddpm.ancestral_step: samplers.ancestral(
                  at_index, start * alpha_bar[-1], betas, variances,
                  ddpm.posterior_variances(betas))}
    # two solvers move more than a state: a flow is linear, so the std itself may be one
    flows = {sde.heun_step: samplers.heun(score, start**.5, edm, levels, Reference()),
             dpmpp_2m_step: samplers.dpmpp_2m(score, start**.5, levels, Reference())}
    std = {step: nth(states, n)**.5 for step, states in laws.items()}
    std |= {step: (nth(states, n) / alpha_bar[0])**.5 for step, states in chains.items()}
    std |= {step: nth(states, n) for step, states in flows.items()}
    return {step: abs(found - exact**.5) for step, found in std.items()}


def nth(states, n):
    """The n-th state of a loop, counted from 1."""
    return next(islice(states, n - 1, None))


def orders():
    """How fast each solver forgets its step size, on Gaussian data, where its error is an
    exact number. Dots are measured; a grey line has the slope that the solver states. Twice
    the steps halve an error of order 1, and quarter one of order 2.
    """
    steps = np.array([32, 64, 128, 256, 512])
    found = [solver_errors(n) for n in steps]
    figure, axis = plt.subplots(figsize=(8, 5))
    for step, color, marker in zip(found[0], (*OKABE_ITO, "gray"), "osD^vp<>"):
        errors = np.array([of_n[step] for of_n in found])
        slope, _ = np.polyfit(np.log(steps[1:]), np.log(errors[1:]), 1)
        stated = errors[-1] * (steps / steps[-1])**-step.order
        axis.plot(steps, stated, color="silver", lw=1)
        axis.plot(steps, errors, marker, color=color, mfc="none", mew=1.5, ms=7,
                  label=f"{step.__module__[9:]}.{step.__name__}: states {step.order}, "
                        f"measured {-slope:.2f}")
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="error of the final std",
             title="dots: measured; grey: the stated order")
    axis.set_xticks(steps, map(str, steps))
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


def flow(seed=0):
    """The probability flow in motion: from noise each point follows its own line to the
    data. Nothing is drawn after the start, so the flow is one map from noise to data. The
    colour is the exact density of the moment.
    """
    vp = sde.VP()
    times = np.linspace(1, 0, 61)**2  # most of it happens late
    z = prior((700, 2), seed=seed)

    score = score_by_time(THREE, vp)
    states = [z, *samplers.heun(score, z, vp, times, Reference(seed))]
    figure, axis = plt.subplots(figsize=(4, 4), dpi=80)

    def draw(k):
        k = min(k, len(states) - 1)  # the last one stays for a while
        axis.clear()
        show_density(axis, THREE.noised(*vp.marginal(times[k])), 2.6)
        show_points(axis, states[k], f"t = {times[k]:.3f}", 2.6, ORANGE)

    return animation.FuncAnimation(figure, draw, frames=len(states) + 20, interval=70)


def guidance(seed=0):
    """A class is the two modes on the left; a third mode is of another class. The class's
    own score leads to p(x | y), and its samples (orange) lie as the class does. The guided
    score goes beyond it, away from where all the data are: w = 3 keeps samples off the side
    that the other class has too. They are easier to tell, and less like the data.
    """
    w, sigma, half = 3., .5, 2.4
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7))
    at = points_of_a_square(half - .2, 13)
    s, s_y = (data.noised(1, sigma).score(at) for data in (ALL, CLASS))
    titles = "score of the class", f"guided score, w = {w:g}"
    for axis, arrows, title in zip(axes, (s_y, guided(s, s_y, w)), titles):
        show_density(axis, ALL.noised(1, sigma), half)
        show_arrows(axis, arrows, at)
        axis.set_title(f"{title}, noise {sigma}", fontsize=10)
    levels = rho_levels(40, 20., .01)
    z = 20 * prior((1500, 2), seed=seed)
    for axis, weight in zip(axes[2:], (1., w)):
        score, engine = guide(score_by_sigma(ALL), score_by_sigma(CLASS), weight,
                              Reference(seed))
        *_, x = samplers.edm(score, z, levels, engine)
        show_density(axis, ALL, half)
        show_points(axis, x, f"samples, w = {weight:g}", half, ORANGE)
    return figure


def even_errors(process, steps, z):
    """How far from the flow's end, on average, n even steps of Euler's lead, for each n."""
    score = score_by_time(LINE, process)
    x = process.prior_std * z
    fine = process.T * np.linspace(1, 0, 801)**2
    *_, end = samplers.heun(score, x, process, fine, Reference())
    errors = []
    for n in steps:
        *_, found = samplers.pf_ode(score, x, process, n, Reference())
        errors.append(abs(found - end).mean())
    return errors


def straight_and_curved(seed=0):
    """Black: x_t of pairs of a sample and its noise, on curved paths in VP, on straight
    ones in flow matching. Such paths cross. The probability flow (orange) moves at the mean
    velocity of all that pass, so that its own paths never cross, and bend in both: in flow
    matching at a steadier velocity; in VP most of it happens near the data. Right: how far
    Euler's method, with even steps, ends from where the flow leads. With four steps flow
    matching is half as far off; with more it is not.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.1))
    x0, z = LINE.sample(7, seed), prior((7, 1), seed=seed)
    many = prior((2000, 1), seed=seed).astype(float)
    steps = np.array([4, 8, 16, 32, 64, 128])
    names = {"VP": sde.VP(), "flow matching": sde.FlowMatching()}
    for axis, (name, process), color in zip(axes, names.items(), (SKY, GREEN)):
        times = process.T * np.linspace(1, 0, 401)
        a, sigma = process.marginal(times[:, None])
        score = score_by_time(LINE, process)
        x = process.prior_std * z
        flow = samplers.pf_ode(score, x, process, times, Reference())
        show_times(axis, LINE, process, times)
        axis.plot(times, sde.perturb(x0.T, z.T, a, sigma), color=BLACK, lw=.8)
        show_paths(axis, times, np.stack([x, *flow]))
        axis.set(title=name, ylabel="x")
        errors = even_errors(process, steps, many)
        axes[2].plot(steps, errors, "o-", color=color, label=name)
    axes[2].set(xscale="log", yscale="log", xlabel="even steps of Euler's method",
                title="mean distance from the flow's end")
    axes[2].set_xticks(steps, map(str, steps))
    axes[2].minorticks_off()
    axes[2].legend()
    return figure


FIGURES = {
    "1-score.png": score_field,
    "2-weights.png": langevin_weights,
    "3-losses.png": four_losses,
    "4-ddpm.png": ddpm_there_and_back,
    "5-processes.png": processes,
    "6-reversal.png": reversal,
    "7-orders.png": orders,
    "8-flow.gif": flow,
    "9-guidance.png": guidance,
    "10-paths.png": straight_and_curved,
}


def write(file, picture):
    """Write a figure or an animation, whole or not at all, and forget it.

    The ground is white on any page.
    """
    with whole(file) as part:
        if hasattr(picture, "savefig"):
            picture.tight_layout()
            picture.savefig(part, dpi=110, facecolor="white")
        else:
            picture.save(part, animation.PillowWriter())
    plt.close("all")


def tour(out, seed=0):
    """Write every figure to the folder `out`, a Path; print each's name and caption."""
    start = time.perf_counter()
    for name, make in FIGURES.items():
        file = out / name
        write(file, make(**accepted_by(make, {"seed": seed})))
        caption = " ".join(make.__doc__.split())
        indented = textwrap.fill(caption, 88, initial_indent="  ", subsequent_indent="  ")
        print(f"{file}\n{indented}", flush=True)
    print(f"{len(FIGURES)} pictures in {time.perf_counter() - start:.0f} s")

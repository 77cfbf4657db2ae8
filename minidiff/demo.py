"""Train one network, sample it with every family, measure, draw."""

import time
from contextlib import contextmanager
from functools import partial
from math import prod
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from . import ddpm, noise
from .chunks import (
    NetScore,
    chunk_size,
    compile_first,
    evaluations_of,
    in_chunks,
    samples,
    states,
)
from .conditions import Conditions, as_seen, linearized, of_points
from .data import dequantized
from .families import FAMILIES
from .guidance import replaced
from .likelihood import bits_per_dim, log_likelihood, variational_bound, with_trace
from .predictions import rescaled
from .quality import CLEAR, Judge, Quality, share_of
from .samplers import Reference
from .score_matching import denoising, explicit
from .sde import VP, prior_std
from .targets import Gaussian
from .terminal import printable, say
from .train import (
    FEW_PIXELS,
    LOG_LEVEL,
    Trainer,
    edm_weight,
    iterations,
    metadata,
    stop_on_interrupt,
)
from .weights import read, save

CURVE = 10, 20, 40  # evaluations of the figure, besides the table's
TRAJECTORY = "reverse_sde_vp"  # the family that the figure follows from noise to data
QUICK = "dpmpp_2m"  # the family whose samples tell how far a training is
HALVINGS = 4  # they are measured after 1/16, 1/8 ... of the iterations
GUIDANCE = 2.  # of the samples that are shown by class
CLASSES = 10  # that are shown at most
FRESH = 1 << 20  # samples from here on are in no training set


class Measured(NamedTuple):
    """A line of the demo's table: what a family's samples cost and how good they are."""

    family: str
    evaluations: int  # of the network, a chunk
    seconds: float
    quality: Quality


class Trained(NamedTuple):
    """A point of the training's figure: what it had cost and how good samples were."""

    iterations: int
    seconds: float
    quality: Quality


def labels_of(net, data):
    """The classes of held-out samples where network and data know them, or None."""
    return data.held_labels if net.classes else None


def given(net, data):
    """What the printed lines say of them."""
    return "" if labels_of(net, data) is None else " given their classes"


def bits_of(log_density, net, data, n, seed, desc):
    """(mean, standard error, evaluations a chunk) of bits/dim of n held-out samples.

    log_density(score, x, first): nats (B,) of points x (B, D), dequantised, whose ids begin
    at `first`; score(x, sigma) is the network's, of tensors. A network of classes is told
    those of the samples, where they are known. Held-out samples after the n, or the first
    again, fill the last chunk.
    """
    calls = NetScore(net)
    labels = labels_of(net, data)
    rows = chunk_size(data.shape)

    def chunk(first):
        ids = np.arange(first, first + rows) % len(data.held)
        told = partial(calls, label=None if labels is None else labels[ids])
        x = dequantized(data.held[ids], data.levels, seed, first)
        return log_density(told, x.reshape(rows, -1).astype(float), first)

    log_p = np.concatenate([*in_chunks(chunk, n, rows, desc=desc)])
    bits = bits_per_dim(log_p, prod(data.shape), data.levels or 2)
    error = bits.std(ddof=1) / n**.5
    return bits.mean(), error, evaluations_of(calls, data.shape, n)


def likelihood(net, data, n, seed=0, device="cpu", sde=VP()):  # noqa: B008
    """Bits/dim of n held-out samples: of their grey levels, or of the density of points.

    The prior is N(0, std^2 I), the process's own. The trace of the score's Jacobian is
    exact in up to 4 dimensions; beyond, one Rademacher probe a sample estimates it. RK45's
    step size is a chunk's own. Prints the result. Returns what `bits_of` does.
    """
    size = prod(data.shape)
    prior = Gaussian(np.zeros(size), prior_std(sde)**2)

    def log_density(score, x, first):
        linearize = linearized(rescaled(score, sde.marginal), data.shape, device)
        probes = np.eye(size) if size <= 4 else [noise.rademacher(x.shape, seed, first)]
        log_p, *_ = log_likelihood(with_trace(linearize, probes), x, sde, prior.log_density)
        return log_p

    mean, error, evaluations = bits_of(log_density, net, data, n, seed, "likelihood")
    means, uniform = "-log2 of the model's\ndensity, a coordinate", "1"
    if data.levels:
        means = "what the model\nneeds to name a grey level"
        uniform = f"log2({data.levels}) = {np.log2(data.levels):.2f}"
    print(f"bits/dim {mean:.3f} +- {error:.3f} on {n} held-out samples{given(net, data)}; "
          f"{evaluations} evaluations: {means}. "
          f"Less is better; {uniform} is a uniform guess.")
    return mean, error, evaluations


def bound(net, data, n, seed=0, device="cpu"):
    """Bits/dim of n held-out samples by DDPM's chain of 1000 steps: its variational bound.

    The chain is another model than the probability flow of the same network. Prints the
    result. Returns what `bits_of` does.
    """
    betas = ddpm.linear_betas()
    alpha_bar = ddpm.alpha_bars(betas)

    def log_density(score, x, first):
        score_i = rescaled(score, lambda i: ddpm.marginal(alpha_bar[i]))
        of_chain = of_points(score_i, data.shape, device)
        terms = variational_bound(of_chain, x, betas, Reference(seed, first))
        return -terms.sum(0)

    mean, error, evaluations = bits_of(log_density, net, data, n, seed, "bound")
    print(f"DDPM's chain of {len(betas)} steps, another model of the same network: at most "
          f"{mean:.3f} +- {error:.3f}\nbits/dim{given(net, data)}, by its variational "
          f"bound; {evaluations} evaluations.")
    return mean, error, evaluations


def losses(net, target, seed=0, device="cpu", n=1 << 14):
    """[(sigma, loss, floor, left)] on fresh samples of a distribution with a known score.

    loss: denoising, as in training; floor: that of the exact score, which no network can
    beat; left: explicit score matching, how far the network is from the exact score. On
    average loss = floor + left. The levels are equally probable ones of training, so that
    the mean over them is about the loss that training shows.
    """
    x0 = target.sample(n, seed, FRESH)
    z = noise.normal(x0.shape, seed, FRESH, tag=noise.PERTURBATION)
    score = NetScore(net)
    rows = []
    for k in range(12):
        sigma = float(np.exp(NormalDist(*LOG_LEVEL).inv_cdf((k + .5) / 12)))
        x = x0 + sigma * z
        s = score(torch.tensor(x, dtype=torch.float32, device=device), sigma)
        s = s.double().cpu().numpy()
        exact = target.noised(1, sigma).score(x)
        weight = edm_weight(sigma) / x.shape[1]  # an element, as in training
        rows.append((sigma, denoising(s, z, sigma, weight),
                     denoising(exact, z, sigma, weight), explicit(s, exact, weight)))
    return rows


def losses_table(rows):
    """Those of `losses` as text, and their means."""
    lines = [f"{'sigma':<8}{'loss':>9}{'floor':>9}{'left':>9}"]
    for sigma, *values in rows:
        lines.append(f"{sigma:<8.3f}" + "".join(f"{v:>9.4f}" for v in values))
    _, *means = np.mean(rows, 0)
    lines.append(f"{'mean':<8}" + "".join(f"{v:>9.4f}" for v in means))
    lines.append("floor: the exact score's loss, which no network can beat. left: how far "
                 "the network's\nscore is from it, what is left to learn.")
    return "\n".join(lines)


def labels_asked(data, n, seed=0, conditions=None, **_):
    """The classes that n samples were asked to be of, by the data's numbers, or None."""
    if conditions is None or conditions.names != data.classes:
        return None
    return conditions.labels(n, seed)


def measure(net, judge, family, n, kernels, evaluations=None, *, show=False, **options):
    """Sample one family and judge its samples.

    judge: a `quality.Judge`; show: whether there is a progress bar; options: seed, device,
    backend and conditions, as in `states`. Returns (Measured, samples, trajectory): arrays
    (n, *shape) and, of the first sample's states, (k, *shape).
    """
    data = judge.data
    score = NetScore(net)
    trajectory = []
    begun = time.perf_counter()
    parts = samples(score, data.shape, family, n, kernels, evaluations, show=show,
                    kept=trajectory, **options)
    x = np.concatenate([*parts])
    seconds = time.perf_counter() - begun
    x = data.quantize(x)
    if not np.isfinite(x).all():
        raise FloatingPointError(f"{family}: samples are not finite")
    evaluations = evaluations_of(score, data.shape, n)
    labels = labels_asked(data, n, **options)
    row = Measured(family, evaluations, seconds, judge(x, labels))
    return row, x, np.stack(trajectory)


def measure_all(net, judge, n, kernels, **options):
    """Every family: (its rows, samples, a trajectory).

    samples: {family: (n, *shape)}; the trajectory is TRAJECTORY's.
    """
    rows = []
    drawn = {}
    bar = tqdm(FAMILIES, desc="sampling", unit="family")
    for family in bar:
        bar.set_postfix_str(family)
        row, drawn[family], states = measure(net, judge, family, n, kernels, **options)
        rows.append(row)
        if family == TRAJECTORY:
            trajectory = states
    return rows, drawn, trajectory


def measure_fewer(net, judge, rows, n, kernels, **options):
    """The rows of all families again at those of CURVE's evaluations that are fewer."""
    found = {}  # one row for each family and cost
    for row in tqdm(rows, desc="at fewer evaluations", unit="family"):
        fewest = 0
        for evaluations in CURVE:
            if fewest + 1 < evaluations < row.evaluations:
                less, *_ = measure(net, judge, row.family, n, kernels, evaluations,
                                   **options)
                fewest = less.evaluations  # some families need more steps than asked for
                found[row.family, fewest] = less
    return list(found.values())


def learn(trainer, judge, n, kernels, **options):
    """Train to the end, and judge QUICK's samples of the average network on the way.

    The learning rate falls over the whole training, so a point is not the best that a
    training of so many iterations can do. Returns ([Trained], seconds of training).
    KeyboardInterrupt after Ctrl-C, once the iteration is done.
    """
    after = {trainer.steps >> k for k in range(1, HALVINGS + 1)}
    net = trainer.average.module.eval().requires_grad_(False)
    points = []
    judging = 0.
    start = time.perf_counter()
    with stop_on_interrupt() as interrupted:
        for _ in iterations(trainer):
            if interrupted:
                raise KeyboardInterrupt
            if trainer.step in after:
                now = time.perf_counter()
                row, *_ = measure(net, judge, QUICK, n, kernels, **options)
                points.append(Trained(trainer.step, now - start - judging, row.quality))
                judging += time.perf_counter() - now
    return points, time.perf_counter() - start - judging


def by_class(data, x, labels):
    """{title: samples} of the first CLASSES classes, of samples x and their labels."""
    titles = [f"{printable(name)}, w = {GUIDANCE:g}" for name in data.classes[:CLASSES]]
    return {title: x[labels == k] for k, title in enumerate(titles)}


def complete(net, judge, kernels, **options):
    """Held-out images that are covered from the middle down, completed in several ways.

    Prints how many a classifier then gives the class of the image that was covered, where
    classes are known. Returns {what: images (n, *shape)}, NaN where they are covered.
    options: seed, device and backend, as in `states`.
    """
    data = judge.data
    images = data.held[:chunk_size(data.shape)]
    known, noise_std = as_seen(images, data.levels)
    known[..., data.shape[1] // 2:, :] = np.nan
    labels = data.held_labels
    shown = {"data": images, "covered": np.where(np.isnan(known), known, images)}
    counts = data.counts() if net.classes else None
    of_known = Conditions(counts, known=known, noise_std=noise_std)
    on_device = torch.tensor(known, dtype=torch.float32, device=options["device"])

    def by_replacement(score, engine, first, rows):
        return replaced(score, on_device, lambda sigma: (1., sigma), engine), engine

    ways = {"completed": of_known}
    if net.classes and labels is not None:
        own = labels[:len(images)]

        def told(score, *rest):
            return of_known(partial(score, label=own), *rest)

        ways["its class told"] = told
    ways["by replacement"] = by_replacement
    for way, conditions in ways.items():
        *_, x = states(NetScore(net), data.shape, TRAJECTORY, 0, len(images), kernels,
                       conditions=conditions, **options)
        x = x.cpu().numpy()
        shown[way] = data.quantize(np.where(np.isnan(known), x, known))
        if judge.classify and labels is not None:
            named, error = share_of(judge.classify(shown[way]).argmax(1)
                                    == labels[:len(images)])
            print(f"covered images, {way}: {named:.3f} +- {error:.3f} of the right class")
    return shown


def require_own(out, model, data):
    """ValueError where a folder holds a training run, or a demo's model of other data."""
    if (out / "state.safetensors").exists():
        raise ValueError(f"{out} holds a training run: choose another --out")
    if model.exists():
        _, saved = read(model)
        if saved.get("digest") != data.digest:
            raise ValueError(f"{model} was trained on {saved.get('data')}: choose another "
                             "--out")


@contextmanager
def keeping(model, data, trainer):
    """Whatever ends this context, the average network is saved to the file `model`."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped at iteration {trainer.step}; {model} is what was learnt until then")
        raise
    finally:
        if trainer.step:
            learnt = metadata(data, trainer) | {"steps": trainer.step}
            save(model, trainer.average.module.state_dict(), learnt)


def demo(data, out, kernels, steps=None, n=360, *, seed=0, device="cpu", backend="auto"):
    """Train, sample, measure and draw. Returns a `Measured` for each family.

    Where classes are known the network learns them, and samples are of every class as often
    as the data are; guided ones are shown class by class. Prints the table. Writes
    model.safetensors, demo.png and training.png to `out`, a Path; completed.png of images,
    evaluations.png too unless they are large, and loss.png where the data's own score is
    known.
    """
    from .plot import CAPTION, completions, curves, loss_levels, picture, training
    model = out / "model.safetensors"
    require_own(out, model, data)
    print(data.about)
    n = min(n, len(data.held))
    start = time.perf_counter()
    where = {"seed": seed, "device": device, "backend": backend}
    counts = data.counts() if data.classes else None
    options = where | {"conditions": Conditions(counts)}
    guided = where | {"conditions": Conditions(counts, w=GUIDANCE)}
    compile_first(data.shape, FAMILIES, kernels, **options)
    if counts:
        compile_first(data.shape, [QUICK], kernels, **guided)
    judge = Judge(data)
    trainer = Trainer(data.train, kernels, steps, levels=data.levels, labels=data.labels,
                      classes=len(data.classes), **where)
    net = trainer.average.module
    with keeping(model, data, trainer):
        points, trained = learn(trainer, judge, n, kernels, **options)
    rows, drawn, trajectory = measure_all(net, judge, n, kernels, **options)
    real = judge.of_data(n)
    shown = [*rows]
    if counts:
        row, x, _ = measure(net, judge, QUICK, n, kernels, **guided)
        shown.append(row._replace(family=f"{QUICK}, w = {GUIDANCE:g}"))
        drawn |= by_class(data, x, labels_asked(data, n, **guided))
    print(table(shown, real, judge.right))
    likelihood(net, data, n, seed, device)
    points += [Trained(trainer.steps, trained, row.quality) for row in rows
               if row.family == QUICK]
    files = [out / "demo.png", out / "training.png", model]
    picture(files[0], data, drawn, trajectory)
    training(files[1], points, real)
    if len(data.shape) == 3:
        files.append(out / "completed.png")
        completions(files[-1], complete(net, judge, kernels, **where))
    if prod(data.shape[1:]) <= FEW_PIXELS:  # it takes as long again
        fewer = measure_fewer(net, judge, rows, n, kernels, **options)
        files.append(out / "evaluations.png")
        curves(files[-1], [*rows, *fewer], real.accuracy)
    if data.target:
        by_level = losses(net, data.target, seed, device)
        print(losses_table(by_level))
        files.append(out / "loss.png")
        loss_levels(files[-1], by_level)
    print(CAPTION)
    print(f"{len(data.train)} training, {len(data.held)} held-out samples of "
          f"{data.name}, {n} of them compared; {trainer.steps} iterations")
    print(f"in {trained:.0f} s, {trainer.steps / trained:.1f} a second; "
          f"{time.perf_counter() - start:.0f} s in all")
    print(*files, sep="  ")
    return rows


def table(rows, real, right=None):
    """Evaluations, seconds and quality of each family, a line each; real data's last.

    rows: `Measured`; real: `Quality`; right: the classifier's share, where there is one.
    Returns text.
    """
    labelled = right is not None

    def line(name, cost, quality):
        text = f"{name:<20}{cost:>21}{quality.accuracy:>9.3f} +- {quality.error:.3f}"
        text += f"{quality.nearest:>9.2f}"
        if labelled:
            text += f"{quality.clear:>9.3f} +- {quality.clear_error:.3f}"
        if quality.named is not None:
            text += f"{quality.named:>9.3f} +- {quality.named_error:.3f}"
        return text

    header = (f"{'family':<20}{'evaluations':>12}{'seconds':>9}{'SVM accuracy':>18}"
              f"{'nearest':>9}")
    if labelled:
        header += f"{'clear class':>18}"
    if rows[0].quality.named is not None:
        header += f"{'as asked':>18}"
    lines = [header]
    for row in rows:
        cost = f"{row.evaluations}{row.seconds:>9.1f}"
        lines.append(line(row.family, cost, row.quality))
    lines.append(line("train | held-out", "", real))
    lines.append("SVM accuracy: telling samples from held-out data, .5 is perfect. "
                 "nearest: median distance\n"
                 "to the closest training sample; far below held-out's (last line) is "
                 "memorising.")
    if labelled:
        lines.append("clear class: share that a classifier gives one class at probability "
                     f"{CLEAR} or more;\n"
                     f"it was trained on real data, and named {right:.3f} of others right.")
    if rows[0].quality.named is not None:
        lines.append("as asked: share that it gives the class that was asked for; of "
                     "held-out data their own.")
    return "\n".join(lines)

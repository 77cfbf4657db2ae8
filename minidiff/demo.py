"""Train one network, sample it with every family, measure, draw."""

import time
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from . import noise
from .data import dequantized
from .families import FAMILIES
from .likelihood import bits_per_dim, log_likelihood, with_trace
from .predictions import rescaled
from .quality import nearest_distance, svm_accuracy
from .score_matching import denoising, explicit
from .sde import VP, prior_std
from .targets import Gaussian
from .train import LOG_LEVEL, Trainer, edm_weight, iterations, metadata
from .weights import save

EVALUATIONS = {"annealed_langevin": 96, "ddim": 40, "pf_ode": 40, "pf_ode_adaptive": 40,
               "heun": 39, "dpmpp_2m": 20}
CURVE = 10, 20, 40  # evaluations of the figure, besides the table's
TRAJECTORY = "reverse_sde_vp"  # the family that the figure follows from noise to data


FRESH = 1 << 20  # samples from here on are in no training set


class Measured(NamedTuple):
    """A line of the demo's table: what a family's samples cost and how good they are."""

    family: str
    evaluations: int  # of the network
    seconds: float
    accuracy: float  # of an SVM that tells samples from held-out data: .5 is perfect
    error: float  # the accuracy's standard error
    nearest: float  # median distance to the closest training sample


class NetScore:
    """s(x, sigma) of a network at one noise level for the whole batch; counts its calls."""

    def __init__(self, net):
        self.net = net
        self.evaluations = 0

    def __call__(self, x, sigma):
        self.evaluations += 1
        levels = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
        return self.net(x, levels)


def likelihood(net, data, n, seed=0, device="cpu", sde=VP()):  # noqa: B008
    """Bits/dim of n held-out samples: of their grey levels, or of the density of points.

    The prior is N(0, std^2 I), the process's own. The trace of the score's Jacobian is
    exact in up to 4 dimensions; beyond, one Rademacher probe a sample estimates it.
    Prints the result. Returns (mean, standard error, evaluations).
    """
    score = rescaled(NetScore(net), sde.marginal)
    size = int(np.prod(data.shape))

    def tensor(u):
        """(n, size) float64 to what the network takes."""
        return torch.tensor(u, dtype=torch.float32, device=device).reshape(-1, *data.shape)

    def host(u):
        return u.reshape(-1, size).double().cpu().numpy()

    def linearize(x, t):
        s, vjp = torch.func.vjp(lambda x: score(x, t), tensor(x))

        def product(v):
            gradient, = vjp(tensor(v))
            return host(gradient)

        return host(s), product

    x = dequantized(data.held[:n], data.levels, seed)
    x = x.reshape(-1, size).astype(float)
    if size <= 4:
        probes = np.eye(size)
    else:
        probes = [noise.rademacher(x.shape, seed, tag=noise.PROBE)]
    prior = Gaussian(np.zeros(size), prior_std(sde)**2)
    log_p, _, evaluations = log_likelihood(with_trace(linearize, probes), x, sde,
                                           prior.log_density)
    bits = bits_per_dim(log_p, size, data.levels or 2)
    mean = bits.mean()
    error = bits.std(ddof=1) / len(bits)**.5
    means, uniform = "-log2 of the model's\ndensity, a coordinate", "1"
    if data.levels:
        means = "what the model\nneeds to name a grey level"
        uniform = f"log2({data.levels}) = {np.log2(data.levels):.2f}"
    print(f"bits/dim {mean:.3f} +- {error:.3f} on {len(x)} held-out samples; "
          f"{evaluations} evaluations: {means}. "
          f"Less is better; {uniform} is a uniform guess.")
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


def sample(score, shape, family, n, kernels, evaluations=None, *, seed=0, device="cpu",
           backend="auto"):
    """The states of n samples of one family, as a generator of tensors (n, *shape).

    score: s(x, sigma); kernels: minidiff.kernels; evaluations: about how many to make, by
    default the family's in EVALUATIONS.
    """
    z = kernels.normal((n, *shape), device=device, seed=seed, backend=backend)
    engine = kernels.Fused(seed, backend=backend)
    evaluations = evaluations or EVALUATIONS.get(family, 80)
    yield from FAMILIES[family](score, z, evaluations, engine)


def compile_first(shape, families, kernels, **options):
    """Have all kernels of these families compiled, before the network is asked anything.

    What cannot be compiled is known now, and not minutes later. Two samples of each family
    are made from a score of 0. options: as in `sample`.
    """
    for family in families:
        for _ in sample(lambda x, _: torch.zeros_like(x), shape, family, 2, kernels,
                        **options):
            pass


def measure(net, data, family, n, kernels, evaluations=None, **options):
    """Sample one family and compare its samples with held-out data.

    options: seed, device and backend, as in `sample`. Returns (Measured, samples,
    trajectory): arrays (n, *shape) and, of the first sample's states, (k, *shape).
    """
    score = NetScore(net)
    trajectory = []
    begun = time.perf_counter()
    for x in sample(score, data.shape, family, n, kernels, evaluations, **options):
        trajectory.append(x[0].cpu().numpy())
    seconds = time.perf_counter() - begun
    x = data.quantize(x.cpu().numpy())
    if not np.isfinite(x).all():
        raise FloatingPointError(f"{family}: samples are not finite")
    accuracy, error = svm_accuracy(x, data.held[:n])
    nearest = nearest_distance(x, data.train)
    row = Measured(family, score.evaluations, seconds, accuracy, error, nearest)
    return row, x, np.stack(trajectory)


def measure_fewer(net, data, measured, n, kernels, **options):
    """Measure the same family again at each of CURVE's evaluations below those measured."""
    family = measured.family
    fewest = 0
    for evaluations in CURVE:
        if fewest + 1 < evaluations < measured.evaluations:
            row, *_ = measure(net, data, family, n, kernels, evaluations, **options)
            fewest = row.evaluations  # more than asked for: some families need more steps
            yield row


def measure_all(net, data, n, kernels, **options):
    """Every family: (its rows, those at fewer evaluations, samples, a trajectory).

    samples: {family: (n, *shape)}; the trajectory is TRAJECTORY's.
    """
    rows = []
    fewer = {}  # one row for each family and cost
    samples = {}
    bar = tqdm(FAMILIES, desc="sampling", unit="family")
    for family in bar:
        bar.set_postfix_str(family)
        row, samples[family], states = measure(net, data, family, n, kernels, **options)
        rows.append(row)
        if family == TRAJECTORY:
            trajectory = states
        for less in measure_fewer(net, data, row, n, kernels, **options):
            fewer[family, less.evaluations] = less
    return rows, list(fewer.values()), samples, trajectory


def demo(data, out, kernels, steps=None, n=360, *, seed=0, device="cpu", backend="auto"):
    """Train, sample, measure and draw. Returns a `Measured` for each family.

    Prints the table. Writes model.safetensors, demo.png and evaluations.png to `out`, a
    Path, and loss.png where the data's own score is known.
    """
    from .plot import CAPTION, curves, loss_levels, picture
    if (out / "state.safetensors").exists():
        raise ValueError(f"{out} holds a training run: choose another --out")
    model = out / "model.safetensors"
    samples_png = out / "demo.png"
    curves_png = out / "evaluations.png"
    print(data.about)
    n = min(n, len(data.held))
    start = time.perf_counter()
    options = {"seed": seed, "device": device, "backend": backend}
    compile_first(data.shape, FAMILIES, kernels, **options)
    trainer = Trainer(data.train, kernels, steps, levels=data.levels, **options)
    for _ in iterations(trainer):
        pass
    net = trainer.average.module.eval().requires_grad_(False)
    save(model, net.state_dict(), metadata(data, trainer))
    trained = time.perf_counter() - start
    rows, fewer, samples, trajectory = measure_all(net, data, n, kernels, **options)
    held = data.held[:n]
    accuracy, error = svm_accuracy(data.train[:n], held)
    nearest = nearest_distance(held, data.train)
    real = Measured("train | held-out", 0, 0., accuracy, error, nearest)
    print(table(rows, real))
    likelihood(net, data, n, seed, device)
    picture(samples_png, data, samples, trajectory)
    curves(curves_png, [*rows, *fewer], accuracy)
    files = [samples_png, curves_png, model]
    if data.target:
        by_level = losses(net, data.target, seed, device)
        print(losses_table(by_level))
        files.append(out / "loss.png")
        loss_levels(files[-1], by_level)
    print(CAPTION)
    print(f"{len(data.train)} training, {len(data.held)} held-out samples of "
          f"{data.name}, {n} of them compared; {trainer.steps} iterations")
    print(f"in {trained:.0f} s, {time.perf_counter() - start:.0f} s in all")
    print(*files, sep="  ")
    return rows


def table(rows, real):
    """Evaluations, seconds and quality of each family, a line each; real data's last.

    rows, real: `Measured`. Returns text.
    """
    def line(row, cost):
        quality = f"{row.accuracy:>9.3f} +- {row.error:.3f}{row.nearest:>9.2f}"
        return f"{row.family:<20}{cost:>21}{quality}"

    lines = [f"{'family':<20}{'evaluations':>12}{'seconds':>9}{'SVM accuracy':>17}"
             f"{'nearest':>9}"]
    for row in rows:
        lines.append(line(row, f"{row.evaluations}{row.seconds:>9.1f}"))
    lines.append(line(real, ""))
    lines.append("SVM accuracy: telling samples from held-out data, .5 is perfect. "
                 "nearest: median distance\n"
                 "to the closest training sample; far below held-out's (last line) is "
                 "memorising.")
    return "\n".join(lines)

"""Training by score matching, and the files it leaves.

Data order, noise levels and noise are functions of (seed, iteration) alone. So a run that
was stopped and resumed returns the bits of one that was not.
"""

import hashlib
import os
import signal
import time
from contextlib import contextmanager
from math import log, prod

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import __version__, noise, score_matching
from .affine import coefficients
from .data import dequantized, permuted
from .net import ScoreNet, usual_defaults
from .predictions import c_in, flow_velocity
from .processes import ALONE
from .score_matching import residual
from .sde import VP, FlowMatching, importance_times, perturb
from .terminal import say
from .weights import kinds, read, save

LOG_LEVEL = -1.2, 1.2  # mean and std of ln sigma [EDM table 1]
SMALL = 8  # pixels along a side: larger images have larger levels
UNTOLD = .1  # of the labels are not told, so that the network learns p(x) too
FEW_PIXELS = 256  # images of more are trained in smaller batches


def edm_weight(sigma, sigma_data=.5):
    """lambda of |s - grad log q|^2: sigma^4 times EDM's weight of |D - x_0|^2, that is
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. [EDM table 1]"""
    return sigma**2 * (c_in(sigma, sigma_data) * sigma_data)**-2


def usual_run(shape):
    """(iterations, batch) of a training that says nothing else.

    An image costs more time than a point, so there are fewer of either. Batches of images
    with many pixels are small, so that minutes on two cores still take thousands of steps.
    """
    if len(shape) == 1:
        return 3000, 512
    if prod(shape[1:]) <= FEW_PIXELS:
        return 1250, 128
    return 4000, 32


def shift_of_levels(shape):
    """By how much training's levels are larger for a larger image: ln(side / 8).

    Neighbouring pixels are alike, and their noise averages out. So it takes twice the noise
    to hide as much of an image of twice the sides. [Hoogeboom et al. 2023]

    Example:
        >>> print([round(shift_of_levels((1, n, n)), 2) for n in (8, 16, 28)])
        [0.0, 0.69, 1.25]
    """
    if len(shape) == 1:
        return 0.
    side = prod(shape[1:])**.5
    return max(0., log(side / SMALL))


def training_levels(n, seed, step, weighting="edm", *, sde=VP(), sample=0,  # noqa: B008
                    shift=0.):
    """The noise levels of one iteration's samples and the weights of their losses.

    sample: the place of the first of the n in the batch; shift: see `shift_of_levels`.
    Returns (sigma, lambda(sigma)), each (n,) float64. lambda weighs |s - grad log q|^2.

    edm: ln sigma ~ N(shift - 1.2, 1.2^2), lambda = `edm_weight`. [EDM table 1]
    sigma2: the same levels, lambda = sigma^2. [SMLD eq. 6]
    flow: t is uniform, sigma = t / (1 - t), and the loss is that of the velocity,
        |v - (z - x_0)|^2 / 2, whatever the image's size. [Lipman et al. 2023]
    likelihood: lambda = g^2 of the sde, by importance sampling of t, for x / a. [ScoreFlow]
    """
    draw = {"seed": seed, "sample": sample, "step": step, "tag": noise.TIME}
    if weighting == "likelihood":
        u = noise.uniform((n,), **draw).astype(float)
        t, Z = importance_times(sde, u)
        a, sigma = sde.marginal(t)
        return sigma / a, Z * (sigma / a)**2
    if weighting == "flow":
        flow = FlowMatching()
        u = noise.uniform((n,), **draw).astype(float)
        a, sigma = flow.marginal(flow.T * u)
        per_score = flow_velocity(0., 1., 1., sigma / a)  # of x / a
        return sigma / a, per_score**2
    z = noise.normal((n,), **draw).astype(float)
    mean, std = LOG_LEVEL
    sigma = np.exp(shift + mean + std * z)
    return sigma, edm_weight(sigma) if weighting == "edm" else sigma**2


def jacobian_objective(name, score, x, v, weight=1.):
    """One of the objectives of `score_matching` that need the score's Jacobian.

    implicit takes D products with the Jacobian; sliced and sliced_vr take one, with probes.
    score: a function of tensors from (B, D) to (B, D), each row on its own; v, the probes:
    (B, D); weight: a number or (B,). Returns a scalar to be differentiated.
    """
    s, vjp = torch.func.vjp(score, x)

    def diagonal(e):
        """The Jacobian's element on the diagonal at the unit vector e, (B,)."""
        product, = vjp(e.expand_as(x))
        return (product * e).sum(-1)

    if name == "implicit":
        unit_vectors = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        trace = torch.func.vmap(diagonal)(unit_vectors).sum(0)
        return score_matching.implicit(s, trace, weight)
    sliced = getattr(score_matching, name)
    product, = vjp(v)
    return sliced(s, v, product, weight)


def batch_indices(n, batch, seed, step):
    """Which of n samples the batch of iteration `step` holds.

    Each epoch has a fresh permutation. What is left after its last whole batch is dropped.
    """
    epoch, k = divmod(step, n // batch)
    return permuted(k * batch + np.arange(batch), n, seed, 1 + epoch)


class Trainer:
    """One training run: the network, its average (EMA), Adam and the iteration count.

    x: training data, (n, *shape) float32; levels: its grey levels, or None.
    kernels: minidiff.kernels, handed in: it perturbs in one fused kernel.
    steps, batch: by default `usual_run`'s. A batch is at most all samples.
    weighting: see `training_levels`. The default is edm for denoising and sigma2 for the
        others: at large sigma, EDM's sigma^4 suits the small residual of denoising, but not
        the terms of the others.
    labels: the class of each sample, (n,) whole numbers below `classes`, or None. One in
        ten is not told in an iteration. [Ho & Salimans 2022]
    processes: those of the run, of which each computes its rows of every batch and has the
        same network. ValueError where the rows are not equally many, or where an objective
        differentiates the network by itself.
    """

    def __init__(self, x, kernels, steps=None, *, batch=None, lr=2e-3, decay=.995, seed=0,
                 device="cpu", backend="auto", levels=None, weighting=None,
                 objective="denoising", labels=None, classes=0, processes=ALONE):
        usual_steps, usual_batch = usual_run(x.shape[1:])
        self.x = x
        self.levels = levels
        self.labels = labels
        self.steps = steps or usual_steps
        self.batch = min(batch or usual_batch, len(x))
        self.shift = shift_of_levels(x.shape[1:])
        self.processes = processes
        self.rows = processes.rows(self.batch)
        if processes.size > 1 and objective != "denoising":
            raise ValueError(f"--objective {objective} differentiates the network itself, "
                             "in one process alone")
        if weighting == "flow" and objective != "denoising":
            raise ValueError("--weighting flow needs --objective denoising, "
                             f"not {objective}")
        self.lr = lr
        self.seed = seed
        self.kernels = kernels
        self.backend = backend
        self.device = device
        self.objective_name = objective
        self.weighting = weighting or ("edm" if objective == "denoising" else "sigma2")
        torch.manual_seed(seed & (1 << 63) - 1)
        with usual_defaults():
            self.net = ScoreNet(x.shape[1:], classes=classes).to(device)
            self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.network = processes.parallel(self.net)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=lr, betas=(.9, .99))
        self.step = 0

    def objective(self):
        """This process's part of an iteration's objective: (fitted, value, gradient).

        It is a mean over elements, so that the mean over processes is the batch's.

        `fitted.backward(gradient)` differentiates it. For denoising, fitted is the scores.
        One kernel, which draws the perturbation's noise again, returns the value and its
        gradient with respect to them. For the others, fitted is the value itself and
        gradient is None.
        """
        draw = {"seed": self.seed, "sample": self.rows.start, "step": self.step}
        chosen = batch_indices(len(self.x), self.batch, self.seed, self.step)[self.rows]
        x0 = dequantized(self.x[chosen], self.levels, **draw)
        x0 = torch.from_numpy(x0).to(self.device)
        sigma, weight = training_levels(len(x0), weighting=self.weighting,
                                        shift=self.shift, **draw)
        weight = weight / x0[0].numel()
        draw |= {"tag": noise.PERTURBATION, "backend": self.backend}
        x = self.kernels.apply(perturb, x0, a=1., sigma=sigma, **draw)
        condition = [self._tensor(sigma)]
        if self.labels is not None:
            condition.append(self._told(chosen))
        if self.objective_name != "denoising":
            value = self._jacobian_objective(x, condition, weight)
            return value, value.detach(), None
        s = self.network(x, *condition)
        of_residual = coefficients(residual, sigma=sigma)
        coef = np.column_stack((of_residual, weight / len(x)))
        value, gradient = self.kernels.dsm_loss(s.detach(), coef, **draw)
        return s, value, gradient

    def _told(self, chosen):
        """What the network is told of these samples' classes, a tensor."""
        u = noise.uniform(chosen.shape, self.seed, self.rows.start, self.step, noise.LABEL)
        label = np.where(u < UNTOLD, self.net.classes, self.labels[chosen])
        return torch.from_numpy(label).to(self.device)

    def _jacobian_objective(self, x, condition, weight):
        """`jacobian_objective` of the network at the perturbed samples x, (B, *shape)."""
        def score(rows):
            return self.net(rows.reshape(x.shape), *condition).flatten(1)

        rows = x.flatten(1)
        v = noise.rademacher(rows.shape, self.seed, self.rows.start, self.step)
        return jacobian_objective(self.objective_name, score, rows, self._tensor(v),
                                  self._tensor(weight))

    def _tensor(self, u):
        """A NumPy array as a float32 tensor on the network's device."""
        return torch.from_numpy(u.astype(np.float32)).to(self.device)

    def rate(self):
        """Learning rate: 50 steps of warm-up, then half a cosine down to 0."""
        warm_up = min(1, (self.step + 1) / 50)
        cosine = 1 + np.cos(np.pi * self.step / self.steps)
        return self.lr * warm_up * .5 * cosine

    def advance(self):
        """Run one iteration. Returns its loss, the whole batch's.

        FloatingPointError, before any weight is changed, if the loss or the gradient's norm
        is not finite.
        """
        for group in self.adam.param_groups:
            group["lr"] = self.rate()
        fitted, loss, gradient = self.objective()
        self.adam.zero_grad()
        fitted.backward(gradient)
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.)
        loss = self.processes.mean(loss)
        if not torch.isfinite(loss + norm):
            raise FloatingPointError(f"the loss is {loss.item()} and its gradient's norm "
                                     f"{norm.item()} at iteration {self.step}: lower --lr")
        with usual_defaults():
            self.adam.step()
            self.average.update_parameters(self.net)
        self.step += 1
        return loss.item()

    def state(self):
        """All that a resumed run needs besides the iteration count: {name: tensor}."""
        parts = {"net": self.net.state_dict(), "average": self.average.state_dict()}
        for i, slots in self.adam.state_dict()["state"].items():
            parts[f"adam.{i}"] = slots
        return _flat(parts)

    def restore(self, tensors, step):
        """Continue from `state()` after `step` iterations; ValueError for anything else."""
        def part(prefix):
            return {name.removeprefix(prefix): u for name, u in tensors.items()
                    if name.startswith(prefix)}

        possible = type(step) is int and 0 <= step <= self.steps
        if not possible or kinds(tensors) != self._kinds_of_state(step):
            raise ValueError(f"not a state of this network after {step} of {self.steps} "
                             "iterations")
        counts = [u for name, u in tensors.items()
                  if name.endswith((".step", ".n_averaged"))]
        if any(u != step for u in counts):
            raise ValueError(f"its parts are not of iteration {step}")
        self.net.load_state_dict(part("net."))
        self.average.load_state_dict(part("average."))
        adam = self.adam.state_dict()
        for key, value in part("adam.").items():
            i, name = key.split(".")
            adam["state"].setdefault(int(i), {})[name] = value
        self.adam.load_state_dict(adam)
        self.step = step

    def _kinds_of_state(self, step):
        """`kinds` of `state()` after `step` iterations."""
        parts = {"net": self.net.state_dict(), "average": self.average.state_dict()}
        if step:
            for i, p in enumerate(self.net.parameters()):
                parts[f"adam.{i}"] = {"step": torch.tensor(0.), "exp_avg": p,
                                      "exp_avg_sq": p}
        return kinds(_flat(parts))


def _flat(parts):
    """{part: {name: tensor}} as {"part.name": tensor}."""
    return {f"{part}.{name}": u for part, tensors in parts.items()
            for name, u in tensors.items()}


def circumstances(device="cpu", processes=ALONE):
    """What the bits of a training depend on besides its options: torch sums in an order
    of its own for each number of threads and processes, version and device; and another
    minidiff may order its data otherwise."""
    return {"minidiff": __version__, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "processes": processes.size,
            "device": str(device)}


def _digest(labels):
    """What tells labels from others, or None. They are in the order of their samples' hash,
    whatever the file's."""
    return None if labels is None else hashlib.sha256(labels.astype("<i8")).hexdigest()


def metadata(data, trainer):
    """What a model file says of itself."""
    return {"shape": list(data.shape), "data": data.name, "digest": data.digest,
            "split": data.split, "levels": data.levels, "ends": list(data.ends),
            "classes": data.counts() if trainer.net.classes else None,
            "labels": _digest(trainer.labels),
            "steps": trainer.steps, "seed": trainer.seed,
            "circumstances": circumstances(trainer.device, trainer.processes)}


def _require_run(file, saved, run):
    """ValueError unless a file's metadata are those of this run.

    The name of the data may differ: the same numbers may lie elsewhere by now. So may what
    `circumstances` has.
    """
    other = [f"{key} {repr(saved.get(key)):.70}, not {run[key]!r}" for key in run
             if key not in ("data", "circumstances") and saved.get(key) != run[key]]
    if other:
        raise ValueError(f"{file} is of another run: {'; '.join(other)}")


def resume(trainer, file, run):
    """Put a trainer where the file of an earlier run left off.

    run: the run's own metadata, which the file's must equal. Says where the circumstances
    differ. The first process reads it for all. ValueError, in one line, where the file is
    another run's or damaged.
    """
    found = _read_state(file, run) if trainer.processes.first else None
    tensors, step = trainer.processes.from_first(found)
    try:
        trainer.restore(tensors, step)
    except (ValueError, RuntimeError, KeyError) as e:
        raise ValueError(f"{file}: {str(e).splitlines()[0]}") from e


def _read_state(file, run):
    """(tensors, step) of `resume`'s file."""
    tensors, saved = read(file)
    if "step" not in saved:
        raise ValueError(f"{file} is a model; a training leaves its state beside it, in "
                         "state.safetensors")
    _require_run(file, saved, run)
    before = saved.get("circumstances")
    if not isinstance(before, dict):
        raise ValueError(f"{file}: a safetensors file, but not minidiff's")
    before = {"minidiff": saved.get("version"), "processes": 1, **before}  # as in 0.4.0
    now = run["circumstances"]
    changed = [f"{key} {before.get(key)}, now {now[key]}" for key in now
               if before.get(key) != now[key]]
    if changed:
        say(f"{file} was written with {'; '.join(changed)}: the bits may differ from those "
            "of a run that was not stopped")
    return tensors, saved["step"]


def claim(out, run, resumed):
    """Make sure that a run writes over no file of another run in the folder `out`.

    resumed: whether the run goes on, so that files of its own may be there. One that is
    damaged is renamed: else the next save would keep it as the save before.
    ValueError, in one line, where a file is another run's.
    """
    for name in ("state", "model"):
        file = out / f"{name}.safetensors"
        previous = out / f"{name}.previous"
        found = [str(f) for f in (file, previous) if f.exists()]
        if found and not resumed:
            raise ValueError(f"{found[0]} exists: --resume its run, or choose another "
                             "--out")
        if not file.exists():
            continue
        try:
            _, saved = read(file)
        except ValueError:
            damaged = out / f"{name}.damaged"
            os.replace(file, damaged)
            say(f"{file} was damaged and is now {damaged}")
        else:
            _require_run(file, saved, run)


@contextmanager
def stop_on_interrupt(processes=ALONE):
    """A list that Ctrl-C fills, so that a loop can finish its iteration and save.

    A second Ctrl-C interrupts at once; in several processes it does not, because there
    torchrun passes on the first one, which each of them has had from the terminal.
    """
    stopped = []
    old = signal.getsignal(signal.SIGINT)

    def note(*_):
        stopped.append(True)
        if processes.size == 1:
            signal.signal(signal.SIGINT, old)

    signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, old)


def iterations(trainer):
    """Train to the end behind a progress bar, yielding after every iteration."""
    bar = tqdm(total=trainer.steps, initial=trainer.step, desc="training", unit="it",
               mininterval=.5)
    with bar:
        while trainer.step < trainer.steps:
            loss = trainer.advance()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            yield


def run(trainer, out, metadata, save_every):
    """Train to the end, saving the state every so many iterations and the model last.

    out: a folder, a Path; the first process writes there. Returns the exit code: 130 after
    Ctrl-C, which finishes the iteration and saves first.
    """
    processes = trainer.processes
    state = out / "state.safetensors"
    model = out / "model.safetensors"
    begun = trainer.step
    kept = begun if state.exists() else None
    start = time.perf_counter()

    def keep():
        nonlocal kept
        if processes.first and kept != trainer.step:  # else it is its own save before
            save(state, trainer.state(), metadata | {"step": trainer.step})
        kept = trainer.step

    with stop_on_interrupt(processes) as interrupted:
        for _ in iterations(trainer):
            stopped = processes.any(interrupted)  # all at the same iteration
            if stopped or trainer.step % save_every == 0:
                keep()
            if stopped:
                say(f"stopped at iteration {trainer.step}; --resume goes on from {state}")
                return 130
    seconds = time.perf_counter() - start
    keep()
    if processes.first and (trainer.step > begun or not model.exists()):
        save(model, trainer.average.module.state_dict(), metadata)
    done = trainer.step - begun
    rate = f", {done / seconds:.1f} a second" if done else ""
    say(f"{model}: {trainer.steps} iterations{rate}")
    return 0

"""Training by score matching, and the files it leaves.

Data order, noise levels and noise are functions of (seed, iteration) alone, so a run that
was stopped and resumed returns the bits of one that was not.
"""

import json
import math
import os
import signal
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import noise, score_matching
from .affine import coefficients
from .data import _order, dequantized
from .net import ScoreNet
from .predictions import c_in
from .score_matching import residual
from .sde import VP, importance_times, perturb


def training_levels(n, seed, step, weighting="edm", sigma_data=.5, sde=VP()):  # noqa: B008
    """(sigma, lambda(sigma) of |s - grad log q|^2), (n,) float64.

    edm: ln sigma ~ N(-1.2, 1.2^2), and the weight that makes it EDM's of |D - x_0|^2:
        (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 * sigma^4. [EDM table 1]
    sigma2: the same levels, sigma^2. [SMLD eq. 6]
    likelihood: g^2 by importance, in the variable x / a of the sde. [ScoreFlow]
    """
    draw = {"seed": seed, "step": step, "tag": noise.TIME}
    if weighting == "likelihood":
        t, Z = importance_times(sde, noise.uniform((n,), **draw).astype(float))
        a, sigma = sde.marginal(t)
        return sigma / a, Z * (sigma / a)**2
    sigma = np.exp(-1.2 + 1.2 * noise.normal((n,), **draw).astype(float))
    edm = (c_in(sigma, sigma_data) * sigma_data)**-2
    return sigma, sigma**2 * (edm if weighting == "edm" else 1.)


def jacobian_objective(name, score, x, v, weight=1.):
    """implicit (D products with the Jacobian), sliced or sliced_vr (one, by the probes v) of
    `score_matching`, to be differentiated; score: tensors (B, D) to (B, D), a row on its own."""
    s, vjp = torch.func.vjp(score, x)
    if name == "implicit":
        rows = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        diagonal = torch.func.vmap(lambda e: (vjp(e.expand_as(x))[0] * e).sum(-1))(rows)
        return score_matching.implicit(s, diagonal.sum(0), weight)
    return getattr(score_matching, name)(s, v, vjp(v)[0], weight)


def batch_indices(n, batch, seed, step):
    """The batch of iteration `step`: epochs of a fresh permutation each, drop the rest."""
    per_epoch = max(1, n // batch)
    return _order(n, seed, 1 + step // per_epoch)[step % per_epoch * batch:][:batch]


@contextmanager
def usual_defaults():
    """float32 on the CPU, where torch makes what it is not told more of: a default dtype or device
    of the user's is for tensors of the user's, and changes no bit of a network."""
    dtype, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


class Trainer:
    """One training run: the network, its average (EMA), Adam and the iteration count.

    `kernels` is minidiff.kernels, handed in: it perturbs in one fused kernel.
    """

    def __init__(self, x, kernels, steps=None, batch=None, lr=2e-3, decay=.995, seed=0,
                 device="cpu", backend="auto", levels=None, weighting=None,
                 objective="denoising"):
        self.x, self.levels, self.fitted_by = x, levels, objective
        # sigma^4 of EDM's suits denoising, whose residual is small there; the others' terms are not
        self.weighting = weighting or ("edm" if objective == "denoising" else "sigma2")
        images = x.ndim > 2  # a convolution is worth more time and smaller batches than points
        steps, batch = steps or (1250 if images else 3000), batch or (128 if images else 512)
        torch.manual_seed(seed & (1 << 63) - 1)
        with usual_defaults():
            self.net = ScoreNet(x.shape[1:]).to(device)
            self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.adam = torch.optim.Adam(self.net.parameters(), lr=lr, betas=(.9, .99))
        self.steps, self.batch, self.lr, self.seed = steps, batch, lr, seed
        self.kernels, self.backend, self.device = kernels, backend, device
        self.step = 0

    def objective(self):
        """(what to differentiate, its value, its gradient or None) of this iteration, a mean over
        elements. Denoising gives the scores and the gradient with respect to them, by one kernel
        that draws the perturbation's noise again; others, of the perturbed data, themselves."""
        k = self.step
        x0 = self.x[batch_indices(len(self.x), self.batch, self.seed, k)]
        x0 = torch.from_numpy(dequantized(x0, self.levels, self.seed, k)).to(self.device)
        sigma, weight = training_levels(len(x0), self.seed, k, self.weighting)
        draw = {"seed": self.seed, "step": k, "tag": noise.PERTURBATION, "backend": self.backend}
        x = self.kernels.apply(perturb, x0, a=1., sigma=sigma, **draw)
        level = torch.from_numpy(sigma.astype(np.float32)).to(self.device)
        weight = weight / x[0].numel()
        if self.fitted_by == "denoising":
            s = self.net(x, level)
            coef = np.column_stack((coefficients(residual, sigma=sigma), weight / len(x)))
            return s, *self.kernels.dsm_loss(s.detach(), coef, **draw)
        v = noise.rademacher(x.flatten(1).shape, self.seed, step=k, tag=noise.PROBE)
        v, weight = (torch.from_numpy(u.astype(np.float32)).to(self.device) for u in (v, weight))
        value = jacobian_objective(self.fitted_by, lambda rows: self.net(
            rows.reshape(x.shape), level).flatten(1), x.flatten(1), v, weight)
        return value, value.detach(), None

    def rate(self):
        """Learning rate: 50 steps of warm-up, then half a cosine down to 0."""
        return self.lr * min(1, (self.step + 1) / 50) \
            * .5 * (1 + np.cos(np.pi * self.step / self.steps))

    def advance(self):
        """One iteration; returns its loss."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate()
        fitted, loss, gradient = self.objective()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at iteration {self.step}; "
                                     "lower --lr")
        self.adam.zero_grad()
        fitted.backward(gradient)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.)
        with usual_defaults():
            self.adam.step()
            self.average.update_parameters(self.net)
        self.step += 1
        return loss.item()

    def state(self):
        """All that a resumed run needs, as flat tensors."""
        flat = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        flat |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, slots in self.adam.state_dict()["state"].items():
            flat |= {f"adam.{i}.{k}": v for k, v in slots.items()}
        return flat

    def restore(self, flat, step):
        """Continue from `state()` after `step` iterations; ValueError for anything else."""
        slots = {f"adam.{i}.{k}": torch.Size() if k == "step" else p.shape for i, p in
                 enumerate(self.net.parameters()) for k in ("step", "exp_avg", "exp_avg_sq")}
        found = {k: v.shape for k, v in flat.items() if k.startswith("adam.")}
        if type(step) is not int or not 0 <= step <= self.steps or found != (slots if step else {}):
            raise ValueError(f"not a state of this network after {step} of {self.steps} iterations")
        def part(prefix):
            return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
        self.net.load_state_dict(part("net."))
        self.average.load_state_dict(part("average."))
        adam = self.adam.state_dict()
        for key, value in part("adam.").items():
            i, name = key.split(".")
            adam["state"].setdefault(int(i), {})[name] = value
        self.adam.load_state_dict(adam)
        self.step = step


def save(file, tensors, metadata):
    """Write safetensors whole or not at all; the file it replaces stays as *.previous."""
    file = Path(file)
    part = file.with_suffix(".part")
    data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()},
                                  {"minidiff": json.dumps(metadata)})
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if file.exists():
            previous = file.with_suffix(".previous")
            previous.unlink(missing_ok=True)
            os.link(file, previous)
        os.replace(part, file)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OSError(f"{file}: not saved, the old file is untouched ({e.strerror})") from e


def read(file):
    """(tensors, metadata) of a file `save` wrote; ValueError in one line otherwise."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    try:
        with safe_open(file, "pt") as f:
            metadata = dict(json.loads((f.metadata() or {})["minidiff"]))
            return {k: f.get_tensor(k) for k in f.keys()}, metadata  # noqa: SIM118
    except KeyError:
        raise ValueError(f"{file}: a safetensors file, but not minidiff's") from None
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise ValueError(f"{file}: not a readable safetensors file ({e})") from e


def _rise(ends):
    """Whether these are two finite numbers, the first smaller."""
    return isinstance(ends, list) and len(ends) == 2 \
        and all(isinstance(v, (int, float)) for v in ends) and 0 < ends[1] - ends[0] < math.inf


def load_model(file, device="cpu"):
    """(score network ready to sample, metadata) from a model file."""
    tensors, metadata = read(file)
    shape, levels = metadata.get("shape"), metadata.get("levels", 0)
    ends = metadata.setdefault("ends", None)  # 0.2.0 kept none
    if not (isinstance(shape, list) and shape and all(isinstance(n, int) and n > 0 for n in shape)
            and len(shape) in (1, 3) and isinstance(metadata.get("data"), str)
            and (levels is None or type(levels) is int and levels > 1)
            and (ends is None or _rise(ends))):
        raise ValueError(f"{file}: a safetensors file, but not minidiff's")
    with usual_defaults():
        net = ScoreNet(tuple(shape))
    try:
        net.load_state_dict(tensors)
    except RuntimeError:
        raise ValueError(f"{file}: weights of another architecture") from None
    return net.to(device).eval().requires_grad_(False), metadata


@contextmanager
def stop_on_interrupt():
    """A list that Ctrl-C fills, so that a loop can finish its iteration and save."""
    stopped = []
    old = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, old)


def iterations(trainer):
    """Train to the end behind a progress bar, yielding after every iteration."""
    with tqdm(total=trainer.steps, initial=trainer.step, desc="training", unit="it",
              mininterval=.5) as bar:
        while trainer.step < trainer.steps:
            loss = trainer.advance()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            yield


def run(trainer, out, metadata, save_every):
    """Train to the end, saving `state` every so often and `model` last. Returns the exit code:
    130 after Ctrl-C, which finishes the iteration and saves first."""
    state = Path(out) / "state.safetensors"

    def keep():
        save(state, trainer.state(), metadata | {"step": trainer.step})
    with stop_on_interrupt() as stopped:
        for _ in iterations(trainer):
            if stopped or trainer.step % save_every == 0:
                keep()
            if stopped:
                print(f"\nstopped at iteration {trainer.step}; --resume goes on from {state}")
                return 130
    keep()
    model = Path(out) / "model.safetensors"
    save(model, trainer.average.module.state_dict(), metadata)
    print(f"{model}: {trainer.steps} iterations")
    return 0

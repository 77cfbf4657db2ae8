"""Train one network, sample it with every family, measure, draw."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .families import FAMILIES
from .quality import nearest_distance, svm_accuracy
from .train import Trainer, iterations, save

EVALUATIONS = {"annealed_langevin": 96, "ddim": 40, "pf_ode": 40}  # the others: 80


class NetScore:
    """s(x, sigma) of a network at one noise level for the whole batch; counts its calls."""

    def __init__(self, net):
        self.net, self.evaluations = net, 0

    def __call__(self, x, sigma):
        self.evaluations += 1
        with torch.inference_mode():
            return self.net(x, torch.full((len(x),), float(sigma), device=x.device))


def sample(net, shape, family, n, kernels, evaluations=None, seed=0, device="cpu",
           backend="auto"):
    """States of n samples from one family, as a generator; kernels is minidiff.kernels."""
    z = kernels.normal((n, *shape), device=device, seed=seed, backend=backend)
    op = kernels.Fused(seed, backend=backend)
    yield from FAMILIES[family](net, z, evaluations or EVALUATIONS.get(family, 80), op)


def demo(data, out, kernels, steps=None, n=360, seed=0, device="cpu", backend="auto"):
    """Train, sample, measure and draw; prints the table, writes model.safetensors and demo.png.

    Returns rows: family, evaluations, seconds, accuracy, error, nearest.
    """
    from .plot import picture
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # better now than after training
        pass
    start = time.perf_counter()
    trainer = Trainer(data.train, kernels, steps, seed=seed, device=device, backend=backend)
    for _ in iterations(trainer):
        pass
    net = trainer.average.module.eval().requires_grad_(False)
    save(out / "model.safetensors", net.state_dict(), metadata(data, trainer))
    trained = time.perf_counter() - start
    held = data.held[:n]
    rows, samples, trajectory = [], {}, None
    for family in (bar := tqdm(FAMILIES, desc="sampling", unit="family")):
        bar.set_postfix_str(family)
        score, begun = NetScore(net), time.perf_counter()
        states = sample(score, data.shape, family, n, kernels, None, seed, device, backend)
        first = []
        for x in states:
            first.append(x[0].cpu().numpy())
        seconds = time.perf_counter() - begun
        samples[family] = data.quantize(x.cpu().numpy())
        trajectory = np.stack(first) if family == "reverse_sde_vp" else trajectory
        rows.append((family, score.evaluations, seconds, *svm_accuracy(samples[family], held),
                     nearest_distance(samples[family], data.train)))
    reference = *svm_accuracy(data.train[:n], held), nearest_distance(held, data.train)
    print(table(rows, reference))
    picture(out / "demo.png", data, samples, trajectory)
    print(f"{len(data.train)} training, {n} held-out samples of {data.name}; "
          f"{trainer.steps} iterations\nin {trained:.0f} s, {time.perf_counter() - start:.0f} s in "
          "all\n"
          f"{out / 'demo.png'}  {out / 'model.safetensors'}")
    return rows


def metadata(data, trainer):
    """What a model file says of itself."""
    return {"shape": list(data.shape), "data": data.name, "levels": data.levels,
            "steps": trainer.steps, "seed": trainer.seed}


def table(rows, reference):
    """Evaluations, seconds and quality, a family a line; train against held-out last."""
    lines = [f"{'family':<20}{'evaluations':>12}{'seconds':>9}{'SVM accuracy':>17}"
             f"{'nearest':>9}"]
    lines += [f"{f:<20}{e:>12}{s:>9.1f}{a:>9.3f} +- {d:.3f}{q:>9.2f}"
              for f, e, s, a, d, q in rows]
    a, d, q = reference
    lines += [f"{'train | held-out':<20}{'':>12}{'':>9}{a:>9.3f} +- {d:.3f}{q:>9.2f}",
              "SVM accuracy: telling samples from held-out data, .5 is perfect. nearest: median "
              "distance\nto the closest training sample; far below held-out's (last line) is "
              "memorising."]
    return "\n".join(lines)

"""Train one network, sample it with every family, measure, draw."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import noise
from .data import dequantized
from .families import FAMILIES
from .likelihood import bits_per_dim, log_likelihood, with_trace
from .predictions import rescaled
from .quality import nearest_distance, svm_accuracy
from .sde import VP, prior_std
from .targets import Gaussian
from .train import Trainer, iterations, save

EVALUATIONS = {"annealed_langevin": 96, "ddim": 40, "pf_ode": 40, "pf_ode_adaptive": 40,
               "heun": 39, "dpmpp_2m": 20}
CURVE = 10, 20, 40  # evaluations of the figure, besides the table's


class NetScore:
    """s(x, sigma) of a network at one noise level for the whole batch; counts its calls."""

    def __init__(self, net):
        self.net, self.evaluations = net, 0

    def __call__(self, x, sigma):
        self.evaluations += 1
        return self.net(x, torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device))


def likelihood(net, data, n, seed=0, device="cpu", sde=VP()):  # noqa: B008
    """Prints bits/dim of n held-out samples, of their grey levels or of the density; N(0, I) the
    prior, the trace exact in up to 4 dimensions, else by one Rademacher probe a sample. Returns
    (mean, standard error, evaluations)."""
    score, size = rescaled(NetScore(net), sde.marginal), int(np.prod(data.shape))
    x = dequantized(data.held[:n], data.levels, seed).reshape(-1, size).astype(float)

    def tensor(u):
        return torch.tensor(u, dtype=torch.float32, device=device).reshape(-1, *data.shape)

    def host(u):
        return u.reshape(-1, size).double().cpu().numpy()

    def linearize(x, t):
        s, vjp = torch.func.vjp(lambda x: score(x, t), tensor(x))
        return host(s), lambda v: host(vjp(tensor(v))[0])

    probes = np.eye(size) if size <= 4 else [noise.rademacher(x.shape, seed, tag=noise.PROBE)]
    log_p, _, evaluations = log_likelihood(with_trace(linearize, probes), x, sde, Gaussian(
        np.zeros(size), prior_std(sde)**2).log_density)
    bits = bits_per_dim(log_p, size, data.levels or 2)
    mean, error = bits.mean(), bits.std(ddof=1) / len(bits)**.5
    uniform = f", log2({data.levels}) = {np.log2(data.levels):.2f}" if data.levels else ""
    print(f"bits/dim {mean:.3f} +- {error:.3f} on {len(x)} held-out samples{uniform}; "
          f"{evaluations} evaluations")
    return mean, error, evaluations


def sample(net, shape, family, n, kernels, evaluations=None, seed=0, device="cpu",
           backend="auto"):
    """States of n samples from one family, as a generator; kernels is minidiff.kernels."""
    z = kernels.normal((n, *shape), device=device, seed=seed, backend=backend)
    op = kernels.Fused(seed, backend=backend)
    yield from FAMILIES[family](net, z, evaluations or EVALUATIONS.get(family, 80), op)


def measure(net, data, family, n, *arguments):
    """((family, evaluations, seconds, SVM accuracy, its error, nearest), samples, the states of
    the first one); arguments as in `sample`, from kernels on."""
    score, begun, first = NetScore(net), time.perf_counter(), []
    for x in sample(score, data.shape, family, n, *arguments):
        first.append(x[0].cpu().numpy())
    seconds, x = time.perf_counter() - begun, data.quantize(x.cpu().numpy())
    if not np.isfinite(x).all():
        raise FloatingPointError(f"{family}: samples are not finite")
    return (family, score.evaluations, seconds, *svm_accuracy(x, data.held[:n]),
            nearest_distance(x, data.train)), x, np.stack(first)


def demo(data, out, kernels, steps=None, n=360, seed=0, device="cpu", backend="auto"):
    """Train, sample, measure and draw; prints the table, writes model.safetensors, demo.png and
    evaluations.png. Returns rows as `measure`'s."""
    from .plot import curves, picture
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # better now than after training
        pass
    if (out / "state.safetensors").exists():
        raise ValueError(f"{out} holds a training run: choose another --out")
    start = time.perf_counter()
    trainer = Trainer(data.train, kernels, steps, seed=seed, device=device, backend=backend,
                      levels=data.levels)
    for _ in iterations(trainer):
        pass
    net = trainer.average.module.eval().requires_grad_(False)
    save(out / "model.safetensors", net.state_dict(), metadata(data, trainer))
    trained = time.perf_counter() - start
    rows, fewer, samples, trajectory = [], {}, {}, None
    for family in (bar := tqdm(FAMILIES, desc="sampling", unit="family")):
        bar.set_postfix_str(family)
        row, samples[family], states = measure(net, data, family, n, kernels, None, seed, device,
                                               backend)
        rows.append(row)
        trajectory = states if family == "reverse_sde_vp" else trajectory
        fewest = 0
        for k in CURVE:
            if fewest + 1 < k < row[1]:  # some families take a least number of steps
                less, *_ = measure(net, data, family, n, kernels, k, seed, device, backend)
                fewest = less[1]
                fewer[family, fewest] = less
    held = data.held[:n]
    reference = *svm_accuracy(data.train[:n], held), nearest_distance(held, data.train)
    print(table(rows, reference))
    likelihood(net, data, n, seed, device)
    picture(out / "demo.png", data, samples, trajectory)
    curves(out / "evaluations.png", [*rows, *fewer.values()], reference[0])
    print(f"{len(data.train)} training, {n} held-out samples of {data.name}; "
          f"{trainer.steps} iterations\nin {trained:.0f} s, {time.perf_counter() - start:.0f} s in "
          f"all\n{out / 'demo.png'}  {out / 'evaluations.png'}  {out / 'model.safetensors'}")
    return rows


def metadata(data, trainer):
    """What a model file says of itself."""
    return {"shape": list(data.shape), "data": data.name, "levels": data.levels,
            "ends": list(data.ends), "steps": trainer.steps, "seed": trainer.seed}


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

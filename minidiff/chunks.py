"""Any number of samples, in chunks of one size, by any number of processes.

A network's bits may depend on how many rows it is given, so every chunk has the same
number, the last one too. Then sample 17 is the same sample, however many are drawn, and
memory is that of a chunk for each process. A family that is coupled by the batch is so
within a chunk.
"""

from math import ceil, prod

import torch
from tqdm import tqdm

from .families import FAMILIES
from .processes import ALONE

EVALUATIONS = {"annealed_langevin": 96, "ddim": 40, "pf_ode": 40, "pf_ode_adaptive": 40,
               "flow_matching": 40, "heun": 39, "dpmpp_2m": 20}
POINTS = 1024  # a chunk of points
NUMBERS = 1 << 20  # of these at most, so that fewer are a chunk where they have many axes
IMAGES = 120  # a chunk of images: three are what the demo measures
PIXELS = 1 << 17  # of these at most


class NetScore:
    """s(x, sigma) of a network at one noise level for the whole batch; counts its calls."""

    def __init__(self, net):
        self.net = net
        self.evaluations = 0

    def __call__(self, x, sigma, label=None):
        """label: the class of each sample, (B,); None tells none."""
        self.evaluations += 1
        level = torch.full((1,), float(sigma), dtype=x.dtype, device=x.device)
        if label is None:
            return self.net(x, level)
        return self.net(x, level, torch.as_tensor(label, device=x.device))


def chunk_size(shape):
    """How many samples of this shape are a chunk."""
    if len(shape) == 1:
        return max(1, min(POINTS, NUMBERS // shape[0]))
    return max(1, min(IMAGES, PIXELS // prod(shape[1:])))


def in_chunks(chunk, n, size, processes=ALONE, *, desc="sampling", show=True):
    """n rows in all as arrays, in order, from chunk(first), the `size` rows from first on.

    What of the last chunk lies after row n is dropped. Processes take turns, and the first
    is given everything; the others get nothing. show: whether there is a progress bar.
    """
    rounds = range(0, n, size * processes.size)
    with tqdm(total=n, desc=desc, unit="sample", disable=not show) as bar:
        for start in rounds:
            own = start + size * processes.rank
            found = processes.gather(chunk(own) if own < n else None)
            for k, x in enumerate(found):
                left = n - start - k * size
                if left > 0:
                    yield x[:left]
                    bar.update(min(size, left))


def states(score, shape, family, first, rows, kernels, *, evaluations=None, seed=0,
           device="cpu", backend="auto", conditions=None):
    """The states of a family's samples, from the id `first` on: tensors (rows, *shape).

    score: s(x, sigma); kernels: minidiff.kernels; evaluations: about how many steps' worth
    to make, by default the family's in EVALUATIONS. seed: a number, or a list with one for
    each sample of all chunks; the last then fills its own up. conditions: what is asked of
    the samples, a `conditions.Conditions`; score then takes a label too.
    """
    sample = first
    if not isinstance(seed, int):
        seed = (seed[first:first + rows] + seed[-1:] * rows)[:rows]
        sample = 0
    z = kernels.normal((rows, *shape), device=device, seed=seed, sample=sample,
                       backend=backend)
    engine = kernels.Fused(seed, sample, backend=backend)
    if conditions:
        score, engine = conditions(score, engine, first, rows)
    evaluations = evaluations or EVALUATIONS.get(family, 80)
    yield from FAMILIES[family](score, z, evaluations, engine)


def samples(score, shape, family, n, kernels, evaluations=None, *, processes=ALONE,
            show=True, kept=None, **options):
    """n samples of a family, a chunk after the other: arrays (rows, *shape).

    kept: a list, to which the states of the first sample are added; options: seed, device,
    backend and conditions. The others are as in `states` and `in_chunks`.
    """
    rows = chunk_size(shape)

    def chunk(first):
        for x in states(score, shape, family, first, rows, kernels,
                        evaluations=evaluations, **options):
            if kept is not None and first == 0:
                kept.append(x[0].cpu().numpy())
        return x.cpu().numpy()

    return in_chunks(chunk, n, rows, processes, show=show)


def evaluations_of(score, shape, n, processes=ALONE):
    """How many evaluations a chunk took, of n samples that are drawn."""
    chunks = ceil(n / (chunk_size(shape) * processes.size))  # of this process
    return round(score.evaluations / chunks)


def compile_first(shape, families, kernels, seed=0, **options):
    """Have all kernels of these families compiled, before the network is asked anything.

    What cannot be compiled is known now, and not minutes later. Two samples of each family
    are made from a score of 0. seed, options: as in `states`.
    """
    def zero(x, sigma, label=None):
        return torch.zeros_like(x)

    for family in families:
        for _ in states(zero, shape, family, 0, 2, kernels, seed=seed, **options):
            pass

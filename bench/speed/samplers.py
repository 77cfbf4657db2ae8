"""Whole samplers, milliseconds a step, against the same loop in diffusers.

Both loops call the same network on the same tensors: "null" returns a fixed tensor, so that
what is timed is the loop alone; "lean" is minidiff's own, untrained.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch

from ... import ddpm, samplers
from ...kernels import Fused
from ...kernels.check import device_of
from ...kernels.check.compare import same_bits
from ...langevin import noise_levels
from ...solvers import rho_levels
from ..peers import why_not_diffusers
from ..peers.schedulers import scheduler
from .clock import is_cuda, once, summary, waiter
from .rows import add_speedups, measured, not_measured, over, row_of, size
from .run import candidates

SECONDS = .2  # a repeat's share for either loop, about
REPEATS = 7
POINTS, IMAGES = (2,), (3, 64, 64)
GRID = [("null", POINTS, 1), ("null", POINTS, 4096), ("null", IMAGES, 1),
        ("null", IMAGES, 64), ("lean", POINTS, 1), ("lean", POINTS, 4096), ("lean", IMAGES, 1)]
GPU_GRID = [*GRID, ("null", IMAGES, 4096), ("lean", IMAGES, 64)]


def stepped(name, net, x, n, **config):
    """A scheduler's loop, as its users write it."""
    s = scheduler(name, n, **config)
    for t in s.timesteps.tolist():
        x = s.step(net(x, t), t, x, return_dict=False)[0]
        yield x


def _diffusers_heun(net, x, n):
    """Two of its steps make one, and the last stands alone."""
    states = stepped("HeunDiscreteScheduler", net, x, n, use_karras_sigmas=True)
    for k, state in enumerate(states, 1):
        if k % 2 == 0 or k == 2 * n - 1:
            yield state


def _diffusers_langevin(net, x, n):
    """Its step size follows the norms, as SDE Alg. 5."""
    s = scheduler("ScoreSdeVeScheduler", n // 100, x.device)
    s.set_sigmas(n // 100)
    for t in s.timesteps:
        for _ in range(100):
            x = s.step_correct(net(x, t), x, return_dict=False)[0]
            yield x


def _edm_levels(n):
    return rho_levels(n, 80., .002)


def _langevin_levels(n):
    return noise_levels(n // 100)


@dataclass(frozen=True)
class Sampler:
    """steps; grid(n): what the loop of that name in minidiff.samplers goes through, with
    its other options; theirs(net, x, n): diffusers' loop. Both are generators of a state a
    step."""

    steps: int
    grid: Callable
    theirs: Callable
    options: dict = field(default_factory=dict)


SAMPLERS = {
    "ancestral": Sampler(1000, ddpm.linear_betas,
                         partial(stepped, "DDPMScheduler", clip_sample=False)),
    "annealed_langevin": Sampler(1000, _langevin_levels, _diffusers_langevin,
                                 {"n_steps": 100}),
    "edm": Sampler(18, _edm_levels, _diffusers_heun),
    "dpmpp_2m": Sampler(20, _edm_levels, partial(
        stepped, "DPMSolverMultistepScheduler", use_karras_sigmas=True))}


def network(kind, x):
    """net(x, level): a fixed tensor, or the lean network at sigma = 1."""
    s = torch.randn_like(x)
    if kind == "null":
        return lambda x, level: s
    from ...net import ScoreNet
    net = ScoreNet(x.shape[1:]).to(x.device).eval().requires_grad_(False)
    sigma = torch.ones(len(x), device=x.device)
    return lambda x, level: net(x, sigma)


def states(name, backend, net, x, steps=None, engine=None):
    """The sampler's loop on one of our backends, or diffusers'."""
    sampler = SAMPLERS[name]
    n = steps or sampler.steps
    if backend == "diffusers":
        return sampler.theirs(net, x, n)
    engine = engine or Fused(backend=backend)
    return getattr(samplers, name)(net, x, sampler.grid(n), engine, **sampler.options)


def gate(name, backend):
    """RuntimeError unless the loop's states are the float32 oracle's, bit for bit."""
    x = torch.randn(3, 5)
    score = lambda x, level: -x
    pairs = zip(states(name, backend, score, x.to(device_of(backend))),
                states(name, "numpy", score, x))
    for a, b in islice(pairs, 30):
        if not same_bits(a.cpu(), b):
            raise RuntimeError(f"{name}: {backend} does not return the reference's states; nothing "
                               "was timed")


def eager(make, n, wait):
    """(seconds to the first state, the loop's set-up included; seconds a step after it)."""
    loop = make()
    step = partial(next, loop)
    return once(step, wait), once(step, wait, n)


def captured(make, engine, n, wait):
    """A function that returns as `eager`, of n steps in one CUDA graph; make(engine=...) is the
    loop.

    A copy of an engine that has run has its schedules on the device. RuntimeError unless the
    graph leaves the bits of the loop uncaptured.
    """
    loop, graph = make(engine=engine), torch.cuda.CUDAGraph()
    first = once(partial(next, loop), wait)
    *_, want = islice(loop, n - 1)
    with torch.cuda.graph(graph):
        *_, last = islice(make(engine=copy(engine)), n)
    graph.replay()
    # a network nobody trained may blow up
    if not torch.allclose(last, want, rtol=0., atol=0., equal_nan=True):
        raise RuntimeError("a CUDA graph leaves another state than its loop; nothing was timed")
    return lambda: (first, once(graph.replay, wait) / n)


def bench_cell(name, kind, shape, batch, ours, peers, device):
    """Rows of one sampler, network, shape and batch: repeats in turn, fewer steps than the
    sampler's where those take long. On a GPU also ours as a CUDA graph."""
    steps, wait = SAMPLERS[name].steps, waiter(device)
    with torch.no_grad():
        x = torch.randn((batch, *shape), device=device)
        net = network(kind, x)
        makes = {b: partial(states, name, b, net, x) for b in (ours, *peers)}
        slowest = max(eager(make, 2, wait)[1] for make in makes.values())
        n = max(3, min(steps - 4, int(SECONDS / slowest)))
        repeats = {b: partial(eager, make, n, wait) for b, make in makes.items()}
        if x.is_cuda:
            engine = Fused(backend=ours)
            repeats[f"{ours}_graph"] = captured(makes[ours], engine, n, wait)
        rounds = [{b: repeat() for b, repeat in repeats.items()} for _ in range(REPEATS)]
    rows = []
    for b in repeats:
        first, later = zip(*(times[b] for times in rounds))
        rows.append(row_of(
            name, b, "float32", x.shape, kind="sampler", network=kind, batch=batch,
            steps=steps, steps_timed=n, **summary(later), times=later,
            first_seconds=summary(first)["seconds"],
            matches_reference=None if b in peers else True))
    return add_speedups(rows)


def bench_samplers(device, grid=None):
    """Rows, one by one, of every sampler; without diffusers also the reason."""
    ours, *_ = candidates(None, device)
    reason = why_not_diffusers()
    peers = [] if reason else ["diffusers"]
    for name in SAMPLERS:
        gate(name, ours)
        for kind, shape, batch in grid or (GPU_GRID if is_cuda(device) else GRID):
            yield from bench_cell(name, kind, shape, batch, ours, peers, device)
            if reason:
                yield row_of(name, "diffusers", "float32", (batch, *shape), kind="sampler",
                             reason=reason)


def show_samplers(rows):
    """ms a step and the whole sampler's seconds, to the first state and then at the median,
    one line a loop."""
    lines = [f"{'sampler':<19}{'network':<9}{'batch x shape':<16}{'backend':<14}{'ms/step':>9}"
             f"{'whole s':>9}{'timed':>7}  speedup over"]
    for r in measured(rows):
        whole = r["first_seconds"] + (r["steps"] - 1) * r["seconds"]
        lines.append(f"{r['op']:<19}{r['network']:<9}{size(r):<16}{r['backend']:<14}"
                     f"{r['seconds'] * 1e3:>9.3f}{whole:>9.2f}{r['steps_timed']:>7}  {over(r)}"
                     .rstrip())
    return "\n".join(lines + not_measured(rows, "op", "backend"))

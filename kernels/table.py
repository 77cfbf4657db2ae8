"""One row an op. Kernels, checks, tests and benchmarks are generated from these rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from .. import ddpm, guidance, langevin, noise, predictions, sde, solvers
from ..affine import coefficient_row, operands
from ..sde import EDM, VE, VP, FlowMatching, SubVP
from .arguments import in_float32


def white(z, /):
    """z ~ N(0, I) itself: an update with no operand."""
    return z


# what a step draws for, where it is not a sampler's: streams of one run stay apart
TAGS = {white: noise.PRIOR, sde.perturb: noise.PERTURBATION,
        sde.forward_sde_step: noise.FORWARD, ddpm.forward_step: noise.FORWARD}


@dataclass(frozen=True)
class Op:
    """A step of the reference and where to try it: parameter -> (low, high) or a choice.

    denoise(x, s) is clipped and takes s's place in the step. Operands and noise are read
    off the step's signature.
    """

    name: str
    step: Callable
    tried: dict = field(default_factory=dict)
    denoise: Callable | None = None

    @cached_property
    def operands(self):
        """Names of the operands, without z."""
        names = operands(self.step)
        if self.denoise:
            names = operands(self.denoise) + names[2:]
        return tuple(u for u in names if u != "z")

    @cached_property
    def noise(self):
        """Whether the step draws z."""
        return "z" in operands(self.step)

    def require(self, u):
        """TypeError unless u are as many operands as the step takes, z apart."""
        if len(u) != len(self.operands):
            raise TypeError(
                f"{self.name} takes {', '.join(self.operands) or 'no operand'}, got "
                f"{len(u)} operands")

    @cached_property
    def tag(self):
        """The noise's tag unless a caller names one."""
        return TAGS.get(self.step, noise.PREDICTOR)

    def parameters(self, rng, batch=None):
        """Random parameters within `tried`; with a batch, one value a sample."""
        def draw(tried):
            if isinstance(tried, list):
                return tried[rng.integers(len(tried))]
            low, high = tried
            drawn = rng.integers if isinstance(low, int) else rng.uniform
            return drawn(low, high, batch)
        return {name: draw(tried) for name, tried in self.tried.items()}

    def coefficients(self, clip=None, **parameters):
        """coef of `update`, as `affine.coefficient_row` says."""
        return coefficient_row(self.step, self.denoise, clip, **parameters)


# ---- where each row is tried ----

SDES = [VE(), VP(), SubVP(), FlowMatching()]
IN_TIME = {"sde": SDES, "t": (1e-3, FlowMatching.T), "dt": (1e-4, 1e-2)}
IN_CHAIN = {"i": (0, 100), "n": [100]}
BETA = {"beta": (1e-4, .02)}
ALPHA_BARS = {"alpha_bar": (1e-4, .5), "alpha_bar_prev": (.5, 1.)}
GUIDANCE = {"w": (-1., 8.)}

OPS = {op.name: op for op in (
    Op("normal", white),
    Op("perturb", sde.perturb, {"a": (.01, 1.), "sigma": (.01, 50.)}),
    Op("langevin", langevin.langevin_step, {"eps": (1e-5, .1)}),
    Op("ddpm_forward", ddpm.forward_step, BETA),
    Op("ddpm_ancestral", ddpm.ancestral_step, BETA | {"variance": (0., .02)}),
    Op("ddpm_clipped", ddpm.posterior_step, ALPHA_BARS | {"variance": (0., .5)},
       denoise=ddpm.predicted_x0),
    Op("ddim", ddpm.ddim_step, ALPHA_BARS | {"eta": (0., 1.)}),
    Op("forward_sde", sde.forward_sde_step, IN_TIME),
    Op("reverse_sde", sde.reverse_sde_step, IN_TIME),
    Op("reverse_diffusion", sde.reverse_diffusion_step, {"sde": SDES} | IN_CHAIN),
    Op("ancestral_sde", sde.ancestral_step, {"sde": [VE(), VP()]} | IN_CHAIN),
    Op("pf_ode", sde.pf_ode_step, IN_TIME),
    Op("heun", sde.heun_step,
       IN_TIME | {"sde": [EDM(1.), *SDES], "t": (.02, FlowMatching.T)}),
    Op("dpmpp_2m", solvers.dpmpp_2m_step,
       {"sigma_prev": (10., 20.), "sigma": (1., 10.), "sigma_next": (.1, 1.)}),
    Op("posterior_mean", predictions.posterior_mean,
       {"a": (.1, 1.), "sigma": (.01, 2.)}),
    Op("guided", guidance.guided, GUIDANCE),
    Op("guided_reverse_sde", guidance.guided_reverse_sde_step, IN_TIME | GUIDANCE),
)}


ROWS = {op.step: op.name for op in OPS.values() if not op.denoise}


def lookup(op, denoise=None):
    """An Op by its name, or made of a step function. ValueError lists the names."""
    if isinstance(op, Op):
        return op
    if callable(op):
        return Op(op.__name__, op, denoise=denoise)
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op {op!r} is none of {', '.join(OPS)}")
    return OPS[op]


# ---- coefficients that were seen before ----

# an SDE is what its numbers are
NUMBERS = {int, float, np.float64, VE, VP, SubVP, EDM, FlowMatching}
KEPT = 256


@lru_cache(KEPT, typed=True)  # 1 equals 1.0, which is no index; -0.0 and 0.0 give one row
def _kept(name, parameters, *values):
    given = dict(zip(parameters, values))
    return in_float32(OPS[name].coefficients(**given))


def seen(op, clip, parameters):
    """`op.coefficients`, kept where they follow from numbers alone and the op is a row's.

    The key is the row's name, never a function: that would keep alive whatever it holds.
    """
    name = ROWS.get(op.step)
    values = parameters.values()
    simple = NUMBERS.issuperset(map(type, values))
    if name is None or op.denoise or clip is not None or not simple:
        return op.coefficients(clip, **parameters)
    return _kept(name, tuple(parameters), *values)

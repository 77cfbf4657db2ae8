"""One row an op. Kernels, checks, tests and benchmarks are generated from these rows."""

from collections.abc import Callable
from dataclasses import dataclass, field

from .. import ddpm, langevin, noise, predictions, sde, solvers
from ..affine import coefficient_row, operands
from ..sde import EDM, VE, VP, SubVP


def white(z, /):
    """z ~ N(0, I) itself: an update with no operand."""
    return z


# what a step draws for, where it is not a sampler's: streams that meet in one run stay apart
TAGS = {white: noise.PRIOR, sde.perturb: noise.PERTURBATION,
        sde.forward_sde_step: noise.FORWARD, ddpm.forward_step: noise.FORWARD}


@dataclass(frozen=True)
class Op:
    """A step of the reference and where to try it: parameter -> (low, high) or a choice.

    denoise(x, s) is clipped and takes s's place in the step. Operands and noise are read off
    the step's signature.
    """

    name: str
    step: Callable
    tried: dict = field(default_factory=dict)
    denoise: Callable | None = None

    @property
    def operands(self):
        """Names of the operands, without z."""
        names = operands(self.step)
        if self.denoise:
            names = operands(self.denoise) + names[2:]
        return tuple(u for u in names if u != "z")

    @property
    def noise(self):
        """Whether the step draws z."""
        return "z" in operands(self.step)

    @property
    def tag(self):
        """The noise's tag unless a caller names one."""
        return TAGS.get(self.step, noise.PREDICTOR)

    def parameters(self, rng, batch=None):
        """Random parameters within `tried`; with a batch, one value a sample."""
        def draw(low, high):
            if isinstance(low, int):
                return rng.integers(low, high, batch)
            return rng.uniform(low, high, batch)
        return {name: draw(*v) if isinstance(v, tuple) else v[rng.integers(len(v))]
                for name, v in self.tried.items()}

    def coefficients(self, clip=None, **parameters):
        """coef of `update`, as `affine.coefficient_row` says."""
        return coefficient_row(self.step, self.denoise, clip, **parameters)


_SDE = {"sde": [VE(), VP(), SubVP()], "t": (1e-3, 1.), "dt": (1e-4, 1e-2)}
_CHAIN = {"i": (0, 100), "n": [100]}
_DDIM = {"alpha_bar": (1e-4, .5), "alpha_bar_prev": (.5, 1.)}
OPS = {op.name: op for op in (
    Op("normal", white),
    Op("perturb", sde.perturb, {"a": (.01, 1.), "sigma": (.01, 50.)}),
    Op("langevin", langevin.langevin_step, {"eps": (1e-5, .1)}),
    Op("ddpm_forward", ddpm.forward_step, {"beta": (1e-4, .02)}),
    Op("ddpm_ancestral", ddpm.ancestral_step, {"beta": (1e-4, .02), "variance": (0., .02)}),
    Op("ddpm_clipped", ddpm.posterior_step, {**_DDIM, "variance": (0., .5)},
       denoise=ddpm.predicted_x0),
    Op("ddim", ddpm.ddim_step, {**_DDIM, "eta": (0., 1.)}),
    Op("forward_sde", sde.forward_sde_step, _SDE),
    Op("reverse_sde", sde.reverse_sde_step, _SDE),
    Op("reverse_diffusion", sde.reverse_diffusion_step, {"sde": [VE(), VP(), SubVP()], **_CHAIN}),
    Op("ancestral_sde", sde.ancestral_step, {"sde": [VE(), VP()], **_CHAIN}),
    Op("pf_ode", sde.pf_ode_step, _SDE),
    Op("heun", sde.heun_step, {**_SDE, "sde": [EDM(1.), VE(), VP(), SubVP()], "t": (.02, 1.)}),
    Op("dpmpp_2m", solvers.dpmpp_2m_step,
       {"sigma_prev": (10., 20.), "sigma": (1., 10.), "sigma_next": (.1, 1.)}),
    Op("posterior_mean", predictions.posterior_mean, {"a": (.1, 1.), "sigma": (.01, 2.)}),
)}


def lookup(op, denoise=None):
    """An Op by its name, or made of a step function. ValueError lists the names."""
    if isinstance(op, str) and op not in OPS:
        raise ValueError(f"op {op!r} is none of {', '.join(OPS)}")
    if callable(op):
        return Op(op.__name__, op, denoise=denoise)
    return OPS[op] if isinstance(op, str) else op

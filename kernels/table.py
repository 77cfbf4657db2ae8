"""One row an op. Kernels, checks, tests and benchmarks are generated from these rows."""

from collections.abc import Callable
from dataclasses import dataclass, field

from .. import ddpm, langevin, sde
from ..affine import operands
from ..sde import VE, VP, SubVP


def white(z, /):
    """z ~ N(0, I) itself: an update with no operand."""
    return z


@dataclass(frozen=True)
class Op:
    """A step of the reference and where to try it: parameter -> (low, high) or a choice.

    operands and noise are read off the step's signature.
    """

    name: str
    step: Callable
    tried: dict = field(default_factory=dict)

    @property
    def operands(self):
        """Names of the operands, without z."""
        return tuple(u for u in operands(self.step) if u != "z")

    @property
    def noise(self):
        """Whether the step draws z."""
        return "z" in operands(self.step)

    def parameters(self, rng, batch=None):
        """Random parameters within `tried`; with a batch, one value a sample."""
        def draw(low, high):
            if isinstance(low, int):
                return rng.integers(low, high, batch)
            return rng.uniform(low, high, batch)
        return {name: draw(*v) if isinstance(v, tuple) else v[rng.integers(len(v))]
                for name, v in self.tried.items()}


_SDE = {"sde": [VE(), VP(), SubVP()], "t": (1e-3, 1.), "dt": (1e-4, 1e-2)}
OPS = {op.name: op for op in (
    Op("normal", white),
    Op("perturb", sde.perturb, {"a": (.01, 1.), "sigma": (.01, 50.)}),
    Op("langevin", langevin.langevin_step, {"eps": (1e-5, .1)}),
    Op("ddpm_forward", ddpm.forward_step, {"beta": (1e-4, .02)}),
    Op("ddpm_ancestral", ddpm.ancestral_step, {"beta": (1e-4, .02), "variance": (0., .02)}),
    Op("ddim", ddpm.ddim_step, {"alpha_bar": (1e-4, .5), "alpha_bar_prev": (.5, 1.),
                                "eta": (0., 1.)}),
    Op("forward_sde", sde.forward_sde_step, _SDE),
    Op("reverse_sde", sde.reverse_sde_step, _SDE),
    Op("reverse_diffusion", sde.reverse_diffusion_step,
       {"sde": [VE(), VP(), SubVP()], "i": (0, 100), "n": [100]}),
    Op("pf_ode", sde.pf_ode_step, _SDE),
)}


def lookup(op):
    """An Op by its name; an Op or a step function passes through. ValueError lists the names."""
    if isinstance(op, str) and op not in OPS:
        raise ValueError(f"op {op!r} is none of {', '.join(OPS)}")
    return OPS[op] if isinstance(op, str) else op

"""minidiff: score-based generative modelling from scratch, in the order of its ideas.

    noise            counter-based randomness: the bit contract every backend keeps
    targets          distributions whose score is known exactly, at every noise level
    score_matching   explicit, implicit, sliced and denoising objectives
    langevin         Langevin dynamics and its annealed form (SMLD)
    ddpm             denoising diffusion: forward, ancestral and implicit (DDIM) steps
    sde              VE, VP and sub-VP SDEs, their reversal and probability-flow ODE
    solvers          Heun, DPM-Solver++(2M), the corrector's step size
    affine           a step's coefficients, read off the step itself
    sample           the sampling loops; families: each of them from one score
    likelihood       log p(x) by the probability-flow ODE, bits/dim

These need NumPy alone, RK45 SciPy. `minidiff.kernels` runs the same steps fused, bit for bit.
"""

__version__ = "0.2.0"

from . import _rooms  # noqa: E402, F401

"""minidiff: score-based generative modelling from scratch, in the order of its ideas.

    targets          distributions whose score is known exactly, at every noise level
    score_matching   explicit, implicit, sliced and denoising objectives
    predictions      what a network may return instead of the score
    langevin         Langevin dynamics and its annealed form (SMLD)
    ddpm             denoising diffusion: forward, ancestral and implicit (DDIM) steps
    sde              VE, VP, sub-VP and flow matching, their reversal and probability flow
    solvers          DPM-Solver++(2M), EDM's levels and churn, the corrector's step size
    samplers         the sampling loops; families: each of them from one score
    likelihood       log p(x) by the probability flow, DDPM's bound, bits/dim
    guidance         conditions: labels and classifier-free guidance, known parts

and what carries them:

    noise            counter-based randomness: the bit contract every backend keeps
    affine           a step's coefficients, read off the step itself
    engine           a run: its seed, and which of its steps have been drawn
    arguments        what a caller may pass, checked

These need NumPy alone; RK45 needs SciPy. `minidiff.kernels` runs the same steps fused, bit
for bit.
"""

__version__ = "0.8.0"

from . import _rooms  # noqa: E402, F401

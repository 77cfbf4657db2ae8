"""What adds up squares: norms of arrays and of noise, the denoising loss."""

from ..noise import PERTURBATION, PREDICTOR
from .arguments import (
    Rows,
    accept,
    as_given,
    noise_step,
    not_compiled,
    require_writable,
    rows_of,
    tell_autograd,
)
from .launch import Result, launched

LOSS = {2: (True, False)}  # noise, and a weight


def _ones(like, terms=1):
    """Coefficients 1, made where `like` is: nothing is copied there, nothing waits."""
    import torch
    return like.new_ones((1, terms), dtype=torch.float32)


def _roots(squares):
    """Their roots in float64, rounded to float32: one launch on a GPU."""
    import torch
    return torch.sqrt(squares, out=squares.new_empty(squares.shape, dtype=torch.float32))


@not_compiled
def norms(x, *, backend="auto"):
    """|x_b| of each sample, float32 (batch,); quads in float32 are added in float64.

    x: as an operand of `update`.

    Example:
        >>> import numpy as np
        >>> print(norms(np.float32([[3, 4], [0, 1]])))
        [5. 1.]
    """
    (u,), prepare = accept([x], ["x"], backend)
    rows = Rows(_ones(u), "all", draws=False)
    run = launched(prepare, u, [u], rows, (0, 0, 0, 0), Result.SQUARES)
    return as_given(x, _roots(run(0)))


@not_compiled
def noise_norms(like, *, seed=0, sample=0, step=0, tag=PREDICTOR, out=None, backend="auto"):
    """|z_b| of the noise an update of `like`'s shape draws, float32 (batch,).

    z itself goes to `out`, if given, and else nowhere. seed, sample, step: as in `update`.

    Example:
        >>> import numpy as np
        >>> z = np.empty((2, 4), np.float32)
        >>> print((noise_norms(z, seed=1, out=z) == norms(z)).all())
        True
    """
    given = [like] if out is None else [like, out]
    tensors, prepare = accept(given, ["like", "out"], backend)
    if out is not None:
        require_writable(out, tensors[1], (), ())
    rows = Rows(_ones(tensors[0]), "all", draws=True)
    result = Result.SQUARES if out is None else Result.BOTH
    run = launched(prepare, tensors[-1], [], rows, (seed, sample, tag, 0), result)
    squares = run(noise_step(step, tensors[0]))
    tell_autograd(out)
    return as_given(like, _roots(squares))


@not_compiled
def both_norms(x, *, seed=0, sample=0, step=0, tag=PREDICTOR, backend="auto"):
    """(|z_b|, |x_b|), `noise_norms` and `norms` of x in one pass over it.

    From these two follows a corrector's step size, where x is its score.

    Example:
        >>> import numpy as np
        >>> of_z, of_x = both_norms(np.ones((2, 4), np.float32), seed=1)
        >>> print(of_x, np.allclose(of_z, noise_norms(np.ones((2, 4), np.float32), seed=1)))
        [2. 2.] True
    """
    (u,), prepare = accept([x], ["x"], backend)
    rows = Rows(_ones(u, terms=2), "all", draws=True)
    run = launched(prepare, u, [u], rows, (seed, sample, tag, 0), Result.TERMS)
    of_x, of_z = _roots(run(noise_step(step, u))).unbind(1)
    return as_given(x, of_z), as_given(x, of_x)


@not_compiled
def dsm_loss(s, coef, *, seed=0, sample=0, step=0, tag=PERTURBATION, backend="auto"):
    """Denoising score matching, value and gradient in one pass, its noise drawn again.

        e = c0*s + cz*z,  value = sum_b w_b |e_b|^2,  gradient = ((2*w)*e)*c0

    s: (batch, ...), the network's output; coef: rows (c0, cz, w), (batch, 3) or (3,). With
    (c0, cz) = coefficients(score_matching.residual, sigma=sigma) and w = weight / (2 batch)
    the value is score_matching.denoising. The noise is that of apply("perturb", ...) with
    the same seed, sample, step and tag. Returns (float32 scalar, gradient of s's dtype).

    Example:
        >>> import numpy as np
        >>> s = np.zeros((4, 2), np.float32)  # with e = z, the loss is the noise's own
        >>> value, gradient = dsm_loss(s, [1., 1., 1 / 8], seed=1)
        >>> print(np.allclose(value, noise_norms(s, seed=1, tag=PERTURBATION) @
        ...                   noise_norms(s, seed=1, tag=PERTURBATION) / 8))
        True
    """
    (u,), prepare = accept([s], ["s"], backend)
    gradient = u.new_empty(u.shape)
    step = noise_step(step, u)
    rows = rows_of(coef, 1, LOSS, u)
    run = launched(prepare, gradient, [u], rows, (seed, sample, tag, 0), Result.GRADIENT)
    w = rows.coef[:, 2]
    value = (w * run(step)).sum().float()  # w becomes float64 in the product
    return as_given(s, value)[()], as_given(s, gradient)

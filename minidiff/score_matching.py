"""How a model s(x) is fitted to the score grad_x log p(x), from samples of p alone.

What one would like to minimise is the mean square error, E |s(x) - grad log p(x)|^2 / 2:
explicit score matching. But nobody has grad log p. Three ways around it:

    implicit    integrate by parts: the error is E [tr grad s + |s|^2 / 2] plus
                E |grad log p|^2 / 2, which no model changes. (p s must vanish far out.) It
                asks for the trace of the model's Jacobian.
    sliced      the same along random directions v, called probes: one product with the
                Jacobian each, instead of a trace.
    denoising   add noise first, x~ = a x + sigma z with z ~ N(0, I), and learn the score of
                the noisy x~. Given x, x~ is N(a x, sigma^2 I), whose score at x~ is
                -(x~ - a x) / sigma^2 = -z / sigma, and z we drew ourselves. Least squares
                on a random target finds its mean, given x~, and that is the score of x~:

                    grad p(x~) = E_x[grad p(x~ | x)] = E_x[p(x~ | x) (-z / sigma)],

                and dividing by p(x~), grad log p(x~) = E[-z / sigma | x~]. It takes no
                derivative of the model. The networks here are trained so.

On one distribution all have one minimiser, its score (the tour draws it). Denoising gives
the score of the noisy data, another one at each noise level, and a model of many levels is
told which: `langevin` says why noise is welcome.

An objective is a mean over a batch, weighted by `weight`, a scalar or (B,). Points, scores
and probes are (B, D), arrays or tensors; other shapes raise ValueError. An objective that
needs the model's Jacobian takes it as an argument: its trace (B,), or its product with a
probe, (B, D). What stands in square brackets is a source, listed in minidiff/README.md.
Next: `predictions`, what a network may return instead of the score.
"""

from .arguments import require_shape


def expectation(values, weight=1.):
    """E [weight value], the mean over a batch, a scalar.

    ValueError unless values are (B,), weight a scalar or (B,).

    Example:
        >>> print(expectation(np.array([1., 3.]), weight=2.))
        4.0
    """
    if values.ndim != 1 or getattr(weight, "shape", ()) not in ((), values.shape):
        raise ValueError("s must be (B, D), weight a scalar or one a sample: got values of "
                         f"shape {values.shape}")
    return (weight * values).mean()


def half_square(e):
    """1/2 |e|^2 of each sample: e (B, D), the result (B,).

    Example:
        >>> print(half_square(np.array([[3., 4.]])))
        [12.5]
    """
    return .5 * (e * e).sum(-1)


def explicit(s, score, weight=1.):
    """Explicit score matching: the error itself, for a score that is known. [Hyvarinen]

        J = 1/2 E |s(x) - grad log p(x)|^2,   a scalar

    s, score: (B, D), the model's and the true score at samples x.

    Example:
        >>> x = np.array([[1.], [-2.]])  # of N(0, 1), whose score is -x
        >>> print(explicit(-x, score=-x), explicit(-.5 * x, score=-x))
        0.0 0.3125
    """
    error = s - require_shape(s, score)
    return expectation(half_square(error), weight)


def implicit(s, trace, weight=1.):
    """Implicit score matching: no score of the data, a derivative of the model instead.
    [Hyvarinen eq. 4]

        J = E [tr(grad s(x)) + 1/2 |s(x)|^2] = explicit - 1/2 E |grad log p|^2

    s (B, D); trace (B,), of grad s(x). The constant does not depend on the model, so that
    the minimiser is the same. A weight may depend on the noise level, not on x: by parts it
    would add a term with its gradient.

    Example:
        >>> x = np.array([[1.], [-1.]])  # of N(0, 1); the model s = -c x has trace -c
        >>> print([float(implicit(-c * x, np.full(2, -c))) for c in (.5, 1., 2.)])
        [-0.375, -0.5, 0.0]
    """
    square = half_square(s)
    require_shape(square, trace, "trace")
    return expectation(trace + square, weight)


def sliced(s, v, jacobian_v, weight=1.):
    """Sliced score matching: the implicit objective along random directions. [SSM]

        J = E [v . (grad s) v + 1/2 (v . s)^2]

    s, v, jacobian_v: (B, D). v: a random direction for each sample, the probe; jacobian_v:
    (grad s) v or v^T grad s, one product instead of D. On average over probes with
    E v v^T = I this is the implicit objective; a v of unit norm scales it by 1/D.

    Example:
        >>> x = np.array([[1., 2.]])
        >>> v = np.array([[1., -1.]])
        >>> print(sliced(-x, v, jacobian_v=-v))  # the model s = -x
        -1.5
    """
    require_shape(s, v, "v")
    require_shape(s, jacobian_v, "jacobian_v")
    curvature = (v * jacobian_v).sum(-1)
    return expectation(curvature + .5 * (v * s).sum(-1)**2, weight)


def sliced_vr(s, v, jacobian_v, weight=1.):
    """Sliced score matching with less variance. [SMLD eq. 3]

        J = E [v . (grad s) v + 1/2 |s|^2]

    The mean of (v . s)^2 over probes is |s|^2, so it need not be sampled. Arguments as in
    `sliced`; v is normal or Rademacher (-1 or 1, with equal odds). A v of unit norm would
    move the minimiser.

    Example:
        >>> x = np.array([[1., 2.]])
        >>> v = np.array([[1., -1.]])
        >>> print(sliced_vr(-x, v, jacobian_v=-v))
        0.5
    """
    require_shape(s, v, "v")
    require_shape(s, jacobian_v, "jacobian_v")
    return implicit(s, (v * jacobian_v).sum(-1), weight)


def residual(s, z, /, sigma):
    """e = s + z / sigma: the model's score less that of x~ given x. [Vincent]

    Given x, x~ = a x + sigma z is N(a x, sigma^2 I), whose score at x~ is -z / sigma. s, z:
    of one shape. The residual is affine in both, so that a kernel can compute the loss.

    Example:
        >>> print(residual(1., 2., sigma=.5))
        5.0
    """
    return s + z / sigma


def denoising(s, z, sigma, weight=1.):
    """Denoising score matching: a regression on noise that we drew. [Vincent; SMLD eq. 2]

        J = 1/2 E w |s(x~) + z / sigma|^2,   x~ = a x + sigma z

    s (B, D), the model's score at x~; z (B, D), the noise in it; sigma > 0, a scalar or
    (B, 1), else ValueError.

    The weights w > 0 may depend on the noise level. They say where a model that cannot be
    right everywhere should be right; they do not move the minimiser, the score of x~ at
    every level. w = sigma^2 is SMLD's [SMLD eq. 6]: then J = 1/2 E |z - eps|^2 with
    eps = -sigma s, the noise that a network predicts, and twice that is DDPM's plain loss.
    With w = g^2, g of a diffusion in `sde`, the mean of J over t, times T, plus a constant
    that no model changes, bounds the mean of -log p from above [ScoreFlow].

    J does not fall to 0, because x~ does not determine z. With the exact score, call it s*,
    it is 1/2 E w (D / sigma^2 - |s*|^2); any other model's J is that plus its explicit
    objective on x~, with the same w. So a model whose loss no longer falls may be as good
    as it gets: `demo --data mixture`, where s* is known, prints the loss beside this floor.
    Where s* is unknown, the losses of two models still differ by what their errors do.

    Example:
        >>> x, z = np.array([[0.], [0.]]), np.array([[1.], [-2.]])
        >>> x_noised = x + .5 * z
        >>> print(denoising(-x_noised / .5**2, z, .5))  # all data at 0: nothing to guess
        0.0
    """
    if getattr(sigma, "shape", ()) not in ((), (len(s), 1)):
        raise ValueError("sigma must be a scalar or (B, 1)")
    require_shape(s, z, "z")
    return expectation(half_square(residual(s, z, sigma)), weight)

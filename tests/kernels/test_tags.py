"""What is drawn for different purposes is different, by its tag."""


import numpy as np
import torch

from minidiff import kernels, noise, samplers, sde
from minidiff.kernels import OPS, update
from minidiff.samplers import Reference


def test_default_tags():
    """Each op's draw is that of its purpose; the streams that meet in one run have other tags."""
    x = np.zeros((5, 7), np.float32)
    tags = {"normal": noise.PRIOR, "perturb": noise.PERTURBATION, "forward_sde": noise.FORWARD,
            "ddpm_forward": noise.FORWARD}
    rng = np.random.default_rng(0)
    for op in OPS.values():
        if op.noise:
            coef, u = op.coefficients(**op.parameters(rng)), [x] * len(op.operands)
            how = {"backend": "numpy"} | ({} if u else {"out": x.copy()})
            tag = tags.get(op.name, noise.PREDICTOR)
            want = update(u, coef, tag=tag, **how)
            for named in (op.name, op, *([] if op.denoise else [op.step])):
                p = op.parameters(np.random.default_rng(1))
                got = kernels.apply(named, *u, **p, **how)
                want = update(u, op.coefficients(**p), tag=tag, **how)
                assert np.array_equal(got, want), op.name
    plain = {kernels.normal: noise.PRIOR, noise.normal: noise.PRIOR, noise.uniform: noise.TIME,
             noise.rademacher: noise.PROBE}
    for f, tag in plain.items():
        assert np.array_equal(f((4, 6), seed=3), f((4, 6), seed=3, tag=tag))
    for f in (kernels.update, kernels.noise_norms):
        arguments = ([x], [0., 1.]) if f is kernels.update else (x,)
        assert np.array_equal(f(*arguments), f(*arguments, tag=noise.PREDICTOR))
    assert len({noise.PRIOR, noise.PERTURBATION, noise.PREDICTOR, noise.TIME, noise.PROBE,
                noise.FORWARD, noise.CORRECTOR, noise.KNOWN, noise.LABEL}) == 9


def test_the_losss_noise_is_the_perturbations(place):
    """By default as well: at s = -z the residual s + z / 1 is 0."""
    backend, device = place
    zero = torch.zeros(6, 9, device=device)
    z = kernels.apply("perturb", zero, a=1., sigma=1., seed=3, step=4, backend=backend)
    value, _ = kernels.dsm_loss(-z, [1., 1., 1.], seed=3, step=4, backend=backend)
    assert value == 0


def test_noise_of_one_seed_is_used_once():
    """What is drawn, noised and brought back with one seed has the variance of fresh noise, to six
    standard errors of n squares; the same noise twice gave 1.98 and 1.64 where 1 is right. Euler's
    step of beta dt = b, either way, makes of a variance v (1 - b / 2)^2 v + b."""
    n = 1 << 14
    z = kernels.normal((n, 1), seed=0)
    x = kernels.apply("perturb", z, a=.6, sigma=.8, seed=0)
    op, vp, up = Reference(0), sde.VP(), np.linspace(1e-3, .3, 101)
    *_, xt = samplers.forward_sde(z.astype(float), vp, up, op)
    *_, y = samplers.reverse_sde(lambda x, t: -x, xt, vp, up[::-1], op)
    v, dt = 1., np.diff(up)
    for b in (*vp.beta(up[:-1]) * dt, *(vp.beta(up[1:]) * dt)[::-1]):
        v = (1 - b / 2)**2 * v + b
    assert abs(x.var() - 1) < 6 * (2 / n)**.5
    assert abs(y.var() - v) < 6 * v * (2 / n)**.5

"""Bad input raises at the front door, in one clear line; odd input works."""

import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from minidiff import ddpm, kernels, langevin, noise, sample, sde, solvers, targets
from minidiff.kernels import (
    Fused,
    apply,
    coefficients,
    normal,
    on_cupy,
    on_host,
    on_torch,
    update,
)

X = np.arange(6, dtype=np.float32).reshape(2, 3)
T = torch.from_numpy(X.copy())
CPU = [name for name in ("numpy", "host") if kernels.missing(name) is None]
MISSING = [name for name in kernels.BACKENDS if kernels.missing(name)]


def named(value):
    """A case's name without an address, the same in every process."""
    return getattr(value, "__name__", str(value))


# ---- arrays ----

@pytest.mark.parametrize("x, words", [
    ([1., 2.], "operands.0.*list"), (3., "operands.0.*float"), (None, "operands.0.*NoneType"),
    (X.astype(np.int32), "operands.0.*int32"), (X.astype(complex), "operands.0.*complex128"),
    (X.astype(np.float64), "operands.0.*float64"), (X.astype(">f4"), "operands.0.*>f4"),
    (T.long(), "operands.0.*int64"), (T.bool(), "operands.0.*bool"),
    (T.cfloat(), "operands.0.*complex64")], ids=str)
def test_what_is_no_float_array_is_a_type_error(x, words):
    with pytest.raises(TypeError, match=words):
        update([x], [1.])


@pytest.mark.parametrize("s, words", [
    (X.astype(np.float16), "s is a.* float16, x a.* float32"), (T, "s is a Tensor.*x a ndarray"),
    ([[1.] * 3] * 2, "s must be .* got list"), (X.astype(int), "s must be .* got int64")], ids=str)
def test_operands_of_two_kinds_are_a_type_error(s, words):
    with pytest.raises(TypeError, match=words):
        apply("langevin", X, s, eps=.1)


def test_out_of_another_kind_is_a_type_error():
    for out in (X.astype(np.float16), T.clone(), "out"):
        with pytest.raises(TypeError, match="out"):
            update([X], [1.], out=out)


def test_shapes_that_differ():
    for u, kw in (([X, X[:1]], {}), ([X, X.T], {}), ([X, X], {"out": np.empty_like(X[0])})):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            update(u, [1., 1.], **kw)
    with pytest.raises(ValueError, match="first axis"):
        update([np.array(1, np.float32)], [1.])


def test_devices_that_differ():
    with pytest.raises(TypeError, match="s must be a real dense .*, got .* on meta"):
        apply("langevin", T, T.to("meta"), eps=.1)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="s is on cuda:0, x on cpu"):
            apply("langevin", T, T.to("cuda"), eps=.1)


@pytest.mark.parametrize("name", ["auto", *kernels.BACKENDS])
def test_tensors_without_memory_never_crash(name):
    with pytest.raises((TypeError, ValueError, RuntimeError), match="meta|backend"):
        update([T.to("meta")], [1.], backend=name)
    with pytest.raises(TypeError, match="dense"):
        update([T.to_sparse()], [1.], backend="auto")
    with FakeTensorMode(), pytest.raises(TypeError, match="no memory"):
        update([torch.ones(2, 3)], [1.], backend="auto")


def test_a_negated_view_is_its_values():
    for backend in ("numpy", "torch", "host"):
        assert (update([torch._neg_view(torch.ones(2, 3))], [2.], backend=backend) == -2).all()


def test_the_losss_rows_are_samples_never_steps():
    with pytest.raises(ValueError, match="step counter must be a 0-d int64"):
        kernels.noise_norms(T, step=torch.tensor(7.5))
    s, coef = torch.randn(4, 3), torch.rand(4, 3)
    want = kernels.dsm_loss(s, coef, step=1)[0]
    assert torch.equal(kernels.dsm_loss(s, coef, step=torch.tensor(1))[0], want)


def test_number_of_operands():
    with pytest.raises(ValueError, match="at most 4 operands, got 5"):
        update([X] * 5, [1.] * 5)
    with pytest.raises(ValueError, match="out is needed"):
        update([], [1.])
    with pytest.raises(TypeError, match="langevin takes x, s, got 1"):
        apply("langevin", X, eps=.1)
    with pytest.raises(TypeError, match="normal takes no operand, got 1"):
        apply("normal", X)


def test_requires_grad_raises():
    leaf = T.clone().requires_grad_()
    for operands, out in (([leaf], None), ([T, leaf], None), ([T], leaf), ([leaf * 2], None)):
        with pytest.raises(RuntimeError, match="requires grad"):
            update(operands, [1.] * len(operands), out=out)
    for call in (kernels.norms, kernels.noise_norms, lambda s: kernels.dsm_loss(s, [1., 1., 1.])):
        with pytest.raises(RuntimeError, match="requires grad"):
            call(leaf)
    with torch.no_grad():
        assert not update([leaf.detach()], [1.]).requires_grad


def test_out_must_be_contiguous():
    for name in CPU:
        for out in (np.zeros((2, 6), np.float32)[:, ::2], np.zeros((3, 2), np.float32).T):
            with pytest.raises(ValueError, match="out must be contiguous"):
                update([X], [1.], out=out, backend=name)
            with pytest.raises(ValueError, match="out must be contiguous"):
                update([out], [1.], out=out, backend=name)
            assert not out.any()
    with pytest.raises(ValueError, match="out must be contiguous"):
        update([T], [1.], out=torch.zeros(3, 2).T)


def test_out_must_be_writeable():
    for name in CPU:
        out = np.zeros((2, 3), np.float32)
        out.setflags(write=False)
        with pytest.raises(ValueError, match="out.*read-only|out.*writeable"):
            update([X], [1.], out=out, backend=name)
        assert not out.any()


def test_strided_and_misaligned_inputs_work():
    bytes_ = np.zeros(25, np.uint8)
    odd = bytes_[1:].view(np.float32).reshape(2, 3)
    odd[:] = X
    for name in CPU:
        for u in (np.repeat(X, 2, 1)[:, ::2], X[::-1, ::-1][::-1, ::-1], X.T.copy().T, odd,
                  np.broadcast_to(X[0] * 0 + X[1], (2, 3))):
            assert np.array_equal(update([u], [2.], backend=name), 2 * u)


def test_partial_overlap_raises_and_the_array_itself_works():
    for buffer in (np.ones(12, np.float32), torch.ones(12)):
        a, b, c = buffer[:6].reshape(2, 3), buffer[3:9].reshape(2, 3), buffer[6:].reshape(2, 3)
        for operands, out in (([a], b), ([b], a), ([c, a], b), ([c, b], c)):
            with pytest.raises(ValueError, match="overlaps.*in part"):
                update(operands, [1.] * len(operands), out=out)
        assert (buffer == 1).all()
        assert update([a, c], [2., 3.], out=c) is c and (c == 5).all() and (buffer[:6] == 1).all()
        same = buffer[:6].reshape(2, 3)  # another view of the same elements
        assert update([a], [7.], out=same) is same and (a == 7).all()


def test_empty_arrays(place):
    backend, device = place
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 4)):
        u = [torch.empty(shape, device=device) for _ in range(2)]
        for coef in ([1., 2., 3.], np.ones((shape[0], 3))):
            for clip in ([], [1., 1., -1., 1.]):
                rows = np.concatenate((coef, np.broadcast_to(clip, (*np.shape(coef)[:-1],
                                                                    len(clip)))), -1)
                assert update(u, rows, backend=backend).shape == shape
        for op in kernels.OPS.values():
            for batch in (None, shape[0]):
                p = op.parameters(np.random.default_rng(0), batch)
                operands = [torch.empty(shape, device=device) for _ in op.operands]
                got = apply(op, *operands, **p, backend=backend, out=u[0])
                assert got.shape == shape
        assert kernels.norms(u[0], backend=backend).tolist() == [0.] * shape[0]
        assert kernels.noise_norms(u[0], backend=backend).tolist() == [0.] * shape[0]
        value, gradient = kernels.dsm_loss(u[0], [1., 1., 1.], backend=backend)
        assert value == 0 and gradient.shape == shape
    assert normal((0, 3)).shape == (0, 3)


def test_an_empty_batch_launches_nothing(monkeypatch):
    for name in CPU:
        monkeypatch.setattr(kernels.backend(name), "bind" if name == "host" else "update", None)
        assert update([X[:0]], [1., 1.], backend=name).shape == (0, 3)


def test_bound_calls_are_updates_of_the_same_arrays(place):
    backend, device = place
    x, table = torch.ones(3, 5, device=device), np.arange(8.).reshape(4, 2)
    again = kernels.bind([x], [1., 2.], seed=1, out=x, backend=backend)
    want = update([update([x.clone()], [1., 2.], seed=1, step=2**32 + 3)], [1., 2.], seed=1, step=4)
    assert again(2**32 + 3) is x and again(4) is x and torch.equal(x, want)
    counter = torch.tensor(0, device=device)
    walk = kernels.bind([x.clone()], table, step=counter, rows="step", backend=backend)
    for k in range(5):
        got = walk(counter.fill_(k)).clone()
        assert torch.equal(got, update([want], table[min(k, 3)], step=k))


def test_nan_and_infinity_propagate(place):
    backend, device = place
    s = torch.tensor([[1., torch.nan, torch.inf], [-torch.inf, 1., 1.]], device=device)
    got = update([T.to(device), s], [1., 1., 1.], backend=backend)
    assert torch.equal(got.isnan(), s.isnan()) and torch.equal(got.isinf(), s.isinf())
    clipped = update([T.to(device), s], [0., 1., 0., 1., -1., 1.], backend=backend)
    assert clipped.tolist()[1] == [-1, 1, 1] and clipped[0, 1].isnan() and clipped[0, 2] == 1


# ---- backends ----

def test_a_backend_misspelt():
    for name in ("triron", "", "cuda", None):
        with pytest.raises(ValueError, match="is none of auto, numpy, torch, host, triton, cupy"):
            update([X], [1.], backend=name)
        with pytest.raises(ValueError, match="is none of auto"):
            kernels.missing(name)


def test_the_hosts_cache_is_mended_or_done_without(monkeypatch, tmp_path):
    """A damaged library is built again; a folder that cannot be written is replaced."""
    def forget(*more):
        for part in (on_host.library, on_host._function, *more):
            part.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(on_host._folder)
    assert on_host._folder() == tmp_path / "minidiff"
    assert np.array_equal(update([X], [2.], backend="host"), 2 * X)
    built, = (tmp_path / "minidiff").glob("*.so")
    built.rename(built.with_suffix(".whole"))  # the loaded file stays as it is
    built.write_bytes(b"not a library")
    forget()
    assert np.array_equal(update([X], [2.], backend="host"), 2 * X)
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", "/proc/none"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        forget(on_host._folder)
        assert np.array_equal(update([X], [2.], backend="host"), 2 * X)
    forget(on_host._folder)


@pytest.mark.skipif(not MISSING, reason="every backend can run here")
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_backend_named_never_falls_back(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}'.*(no CUDA|not installed|install)"):
        update([T], [1.], backend=name)


def test_a_package_that_is_not_there_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(on_cupy, "missing", on_cupy.missing.__wrapped__)  # not the cached answer
    monkeypatch.setattr(on_torch, "torch", None)
    for name, line in (("cupy", r"pip install -e '\.\[cuda13\]'"), ("torch", "pip install torch")):
        with pytest.raises(RuntimeError, match=f"backend '{name}'.*{line}"):
            update([T], [1.], backend=name)


def test_no_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(on_host, "compiler", lambda: None)
    monkeypatch.setattr(on_host, "missing", on_host.missing.__wrapped__)
    with pytest.raises(RuntimeError, match="no C.. compiler found: install g.. or clang"):
        update([T], [1.], backend="host")
    with pytest.warns(UserWarning, match="'torch' instead of host: no C.. compiler"):
        assert kernels.backend("auto").NAME == "torch"
    with pytest.warns(UserWarning):
        assert np.array_equal(update([X], [2.]), 2 * X)


def test_numpy_arrays_are_refused_where_they_cannot_go():
    with pytest.raises((ValueError, RuntimeError), match="backend 'cupy'"):
        update([X], [1.], backend="cupy")


# ---- coefficients, counters, parameters ----

def test_coefficients_of_the_wrong_width():
    for coef in (1., [], [1.] * 4, np.ones((2, 4)), np.ones((2, 1))):
        with pytest.raises(ValueError, match="coef has shape.*its last axis must be 2 .*3"):
            update([X, X], coef)
    for coef in (1., [1.] * 2, np.ones((2, 4))):
        with pytest.raises(ValueError, match="coef has shape.*its last axis must be 3"):
            kernels.dsm_loss(X, coef)


def test_coefficients_a_sample_that_are_not_the_batch():
    for operands in ([X], []):
        for rows in (1, 3):
            with pytest.raises(ValueError, match=rf"\({rows}, 1\).*2 rows.*\(2, 3\)"):
                update(operands, np.ones((rows, 1)), out=np.empty_like(X))
    with pytest.raises(ValueError, match=r"\(3, 2\).*2 rows.*\(2, 3\)"):
        apply("perturb", X, a=np.full(3, .5), sigma=1.)
    with pytest.raises(ValueError, match=r"\(3, 3\).*2 rows.*\(2, 3\)"):
        kernels.dsm_loss(X, np.ones((3, 3)))
    with pytest.raises(ValueError):
        apply("perturb", X, a=np.full(3, .5), sigma=np.ones(2))


def test_coefficients_that_are_no_numbers():
    for coef in (["a"], [None], [1j]):
        with pytest.raises((TypeError, ValueError)):
            update([X], coef)


def test_clip_needs_x_s_and_four_numbers():
    for operands, width in (([X], 5), ([X], 6), ([X, X], 4), ([X, X], 5), ([X, X], 8)):
        with pytest.raises(ValueError, match=f"coef has shape.*{width}"):
            update(operands, [1.] * width)
    for clip in (1., (1.,), (1., -1.), (0., 1., 2.)):
        with pytest.raises(ValueError, match="clip must be .lo, hi."):
            apply("ddpm_clipped", X, X, clip=clip, alpha_bar=.3, alpha_bar_prev=.6, variance=.1)
    with pytest.raises(ValueError, match="langevin_step has no denoise stage"):
        apply("langevin", X, X, clip=(-1., 1.), eps=.1)


@pytest.mark.parametrize("step, coef", [
    (np.array(0, np.int32), np.ones((2, 2))), (np.array(0.), np.ones((2, 2))),
    (torch.tensor(0, dtype=torch.int32), np.ones((2, 2))), (np.array([0]), np.ones((2, 2))),
    (torch.tensor([1]), np.ones(2)), (torch.tensor(0, device="meta"), np.ones((2, 2)))], ids=repr)
def test_a_step_counter_is_one_int64(step, coef):
    with pytest.raises(ValueError, match="step counter must be a 0-d int64"):
        update([X], coef, step=step)


def test_a_counter_beside_one_row(place):
    backend, device = place
    x, step = T.to(device), torch.tensor(3, device=device)
    want = update([T], [2., 1.], step=3, backend="numpy")
    assert torch.equal(update([x], [2., 1.], step=step, backend=backend).cpu(), want)
    move = Fused(backend=backend)(langevin.langevin_step, 2, eps=.1)
    assert torch.equal(move(step, x, x), move(3, x, x))


def test_a_bound_call_takes_the_kind_of_step_it_was_bound_with():
    by_counter = kernels.bind([T], [1.], step=torch.tensor(0))
    for f, step in ((by_counter, 1), (kernels.bind([T], [1.]), torch.tensor(1))):
        with pytest.raises(ValueError, match="f takes numbers; with a counter, counters"):
            f(step)


def test_what_would_be_copied_cannot_be_bound():
    still = X.copy()
    still.setflags(write=False)
    for x in (X.T, T.T, torch._neg_view(T), still):
        with pytest.raises(ValueError, match="operands.0. must be contiguous"):
            kernels.bind([x], [1.])
    coef = torch.ones(1)
    again = kernels.bind([T], coef)
    coef += 1
    assert torch.equal(again(0), T)


def test_coefficients_that_are_no_plain_tensors():
    with FakeTensorMode():
        fake = torch.ones(1)
    freed = torch.ones(1)
    freed.untyped_storage().resize_(0)
    for coef, error in ((fake, TypeError), (freed, TypeError), (torch.ones(1, dtype=torch.cfloat),
                        TypeError), (torch.ones(1).to_sparse(), TypeError),
                        (torch.ones(1, device="meta"), TypeError),
                        (torch.ones(1, requires_grad=True), RuntimeError)):
        with pytest.raises(error, match="coef"):
            update([T], coef)
        with pytest.raises(error, match="coef"):
            kernels.dsm_loss(T, coef.expand(3) if error is RuntimeError else coef)
    empty = torch.ones(2, 3)
    empty.untyped_storage().resize_(0)
    for operands, out in (([empty], None), ([T], empty)):
        with pytest.raises(TypeError, match="has no memory"):
            update(operands, [1.], out=out)


def test_a_step_counter_is_of_the_operands_kind():
    """A NumPy counter beside tensors, or a tensor beside arrays: works or says so."""
    want = update([X], [3., 4.], step=1, backend="numpy")
    for u, step in ((X, torch.tensor(1)), (T, np.array(1))):
        for name in ("auto", *(n for n in kernels.BACKENDS if kernels.missing(n) is None)):
            try:
                got = np.asarray(update([u], [[1., 2.], [3., 4.]], step=step, rows="step",
                                        backend=name))
            except ValueError as e:
                assert "step counter" in str(e) or "backend" in str(e)
            else:
                assert np.array_equal(got, want), name


def test_counter_words_are_integers():
    for word in ("seed", "sample", "step", "tag"):
        with pytest.raises(TypeError):
            normal((2, 3), **{word: 1.5}, backend="numpy")


@pytest.mark.parametrize("step, parameters, words", [
    (langevin.langevin_step, {"eps": 0.}, "eps"), (langevin.langevin_step, {"eps": -1.}, "eps"),
    (langevin.langevin_step, {"eps": np.nan}, "eps"),
    (langevin.langevin_step, {"eps": np.inf}, "eps"),
    (langevin.langevin_step, {"eps": np.array([.1, -.1])}, "eps.*got -0.1"),
    (sde.perturb, {"a": .5, "sigma": 0.}, "sigma"), (sde.perturb, {"a": 0., "sigma": 1.}, "a must"),
    (ddpm.forward_step, {"beta": 0.}, "beta"), (ddpm.forward_step, {"beta": 1.}, "beta"),
    (ddpm.ancestral_step, {"beta": .1, "variance": -1e-9}, "variance"),
    (ddpm.ddim_step, {"alpha_bar": 1., "alpha_bar_prev": 1., "eta": 0.}, "alpha_bar must"),
    (ddpm.ddim_step, {"alpha_bar": .5, "alpha_bar_prev": 1.1, "eta": 0.}, "alpha_bar_prev must"),
    (ddpm.ddim_step, {"alpha_bar": .5, "alpha_bar_prev": .6, "eta": 1.5}, "eta must"),
    (sde.forward_sde_step, {"sde": sde.VP(), "t": -.1, "dt": .1}, "t must"),
    (sde.reverse_sde_step, {"sde": sde.VP(), "t": 1.1, "dt": .1}, "t must"),
    (sde.pf_ode_step, {"sde": sde.VE(), "t": np.nan, "dt": .1}, "t must"),
    (sde.reverse_sde_step, {"sde": sde.SubVP(), "t": .5, "dt": 0.}, "dt must")], ids=named)
def test_parameters_out_of_their_range(step, parameters, words):
    with pytest.raises(ValueError, match=words):
        coefficients(step, **parameters)
    with pytest.raises(ValueError, match=words):
        Fused()(step, noise.PREDICTOR, **parameters)
    with pytest.raises(ValueError, match=words):
        sample.Reference()(step, noise.PREDICTOR, **parameters)


@pytest.mark.parametrize("op", [Fused(), sample.Reference()], ids=lambda op: type(op).__name__)
def test_the_reference_refuses_what_a_kernel_does(op):
    chain = {"alpha_bar": .3, "alpha_bar_prev": .6, "variance": .2}
    for step, more, error, words in (
            (langevin.langevin_step, {"eps": .1, "eta": 1.}, TypeError, "no parameter 'eta'"),
            (langevin.langevin_step, {"eps": .1, "clip": (0, 1)}, ValueError, "no denoise stage"),
            (ddpm.posterior_step, chain | {"denoise": ddpm.predicted_x0, "clip": (1, -1)},
             ValueError, r"clip must be \(lo, hi\)"),
            (ddpm.posterior_step, chain | {"denoise": ddpm.predicted_x0, "alpha_bar": 1.2},
             ValueError, "alpha_bar must")):
        with pytest.raises(error, match=words):
            op(step, noise.PREDICTOR, **more)


@pytest.mark.parametrize("f, arguments, words", [
    (sde.importance_times, (sde.VP(), 1.5), "u must"),
    (sde.importance_times, (sde.VP(), .5, 0.), "t_min must"),
    (sde.importance_times, (sde.VP(), .5, 2.), "t must"),
    (solvers.churn, (np.array([2., 1.]), -1.), "s_churn >= 0"),
    (solvers.churn, (np.array([2., 1.]), np.nan), "s_churn >= 0"),
    (solvers.churn, (np.array([2., 1.]), 1., 3., 2.), "s_min <= s_max"),
    (langevin.rho_levels, (5, 2., 1., -7.), "rho must"),
    (langevin.rho_levels, (5, 2., 1., np.nan), "rho must"),
    (langevin.step_sizes, ([2., 1.], -1.), "eps must"),
    (ddpm.cosine_betas, (0,), "n must"), (ddpm.cosine_betas, (10, 1.), "beta must")], ids=named)
def test_schedules_out_of_their_range(f, arguments, words):
    with pytest.raises(ValueError, match=words):
        f(*arguments)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_that_is_not_linear():
    for step in (lambda x, /: x**2, lambda x, s, /: x * s, lambda x, z, /: x + z + 1):
        with pytest.raises(ValueError, match="not linear in its operands"):
            apply(step, *[X] * (2 if "s" in step.__code__.co_varnames else 1))


def test_coefficients_that_are_not_finite():
    with pytest.raises(ValueError, match="alpha_bar must be smaller than alpha_bar_prev"):
        coefficients(ddpm.ddim_step, alpha_bar=.9, alpha_bar_prev=.1, eta=1.)
    with pytest.raises(ValueError, match="sigma_next must be smaller than sigma"):
        coefficients(solvers.dpmpp_2m_step, sigma_prev=2., sigma=.1, sigma_next=1.)
    with pytest.raises(ValueError, match="reverse_diffusion_step: a coefficient is not finite"):
        coefficients(sde.reverse_diffusion_step, sde=sde.VP(), i=4, n=5)  # beta / n > 1


# ---- parameters in any precision, ends of a process ----

@pytest.mark.parametrize("op", kernels.OPS.values(), ids=kernels.OPS)
@pytest.mark.parametrize("kind", ["float32", "float16", "longdouble", "0-d", "small integers"])
def test_parameters_of_any_kind_are_computed_in_float64(op, kind):
    """A number, a NumPy number, a 0-d array, one a sample: the coefficients are those of the same
    number in float64, and the reference's step is the one that they belong to."""
    rng, x = np.random.default_rng(5), np.linspace(-1, 1, 24).reshape(8, 3)
    u = [x + k for k in range(len(op.operands))]
    for batch in (None, 8):
        p = op.parameters(rng, batch)
        given = {name: narrow(v, kind) for name, v in p.items()}
        wide = {name: widened(v) for name, v in given.items()}
        want = op.coefficients(**wide)
        got = op.coefficients(**given)
        assert got.dtype == np.float64 and np.array_equal(got, want)
        if batch is None and op.operands:
            z = lambda shape, k, tag: noise.normal(shape, k).astype(float)
            steps = [sample.Reference(normal=z)(op.step, 2, denoise=op.denoise, **each)
                     for each in (given, wide)]
            assert np.array_equal(steps[0](0, *u), steps[1](0, *u))
            given, wide = (apply(op, *(v.astype(np.float32) for v in u), **each)
                           for each in (given, wide))
            assert np.array_equal(given, wide)


def narrow(v, kind):
    """A parameter in fewer bits, or as a 0-d array; what is no number as it is."""
    v = np.asarray(v)
    if v.dtype.kind == "i" and kind == "small integers":
        return v.astype(np.uint8)[()]
    if v.dtype.kind == "f" and kind in ("float32", "float16", "longdouble"):
        return v.astype(kind)[()]
    return v if kind == "0-d" and v.dtype.kind in "fi" else v[()]


def widened(v):
    """The same numbers in float64 or int64; a single one as Python's."""
    if not isinstance(v, (np.generic, np.ndarray)) or v.dtype.kind not in "iuf":
        return v
    v = v.astype(float if v.dtype.kind == "f" else int)
    return v if v.ndim else v.item()


VP, TWO = sde.VP(np.float32(.1), np.float32(20.)), np.array([.3, .7], np.float32)


@pytest.mark.parametrize("f, arguments", [
    (lambda low, high: ddpm.linear_betas(10, low, high), (1e-4, .02)),
    (lambda high: ddpm.cosine_betas(10, high), (.998,)), (ddpm.alpha_bars, (TWO,)),
    (lambda high, low: langevin.noise_levels(10, high, low), (20., .1)),
    (lambda *p: langevin.rho_levels(10, *p), (80., .002, 7.1)),
    (langevin.step_sizes, (TWO[::-1], .013)),
    (lambda *p: solvers.churn(TWO[::-1], *p), (.3, .1, .9, 1.003)),
    (lambda *p: sde.importance_times(sde.VP(), *p), (TWO, 1e-4)),
    (lambda *p: sde.VE(*p).marginal(.3), (.013, 47.)), (lambda *p: sde.VE(*p).time(1.1), (.1, 9.)),
    (lambda *p: sde.VE(*p).diffusion(.3), (.013, 47.)), (sde.VE().time, (TWO,)),
    (sde.EDM().marginal, (TWO,)), (sde.EDM().time, (TWO,)), (sde.EDM().diffusion, (TWO,)),
    (lambda *p: sde.VP(*p).marginal(.3), (.13, 19.)), (sde.VP().marginal, (TWO,)),
    (lambda *p: sde.SubVP(*p).marginal(.3), (.13, 19.)), (sde.SubVP().time, (TWO,)),
    (lambda *p: targets.Gaussian([0.], 1.).at(*p).variances, (.3, .7))], ids=str)
def test_functions_of_numbers_compute_in_float64(f, arguments):
    given = [np.float32(v) if np.ndim(v) == 0 else v for v in arguments]
    wide = [np.float64(v) if np.ndim(v) == 0 else v.astype(float) for v in given]
    together = [v if isinstance(v, tuple) else (v,) for v in (f(*given), f(*wide))]
    for got, want in zip(*together, strict=True):
        assert np.asarray(got).dtype == np.float64 and np.array_equal(got, want)


def test_levels_return_their_ends_exactly():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = np.exp(np.sort(rng.uniform(-7, 6, 2)))
        n = int(rng.integers(2, 60))
        for levels in (langevin.rho_levels(n, high, low, rng.uniform(1, 12)),
                       langevin.noise_levels(n, high, low)):
            assert levels[0] == high and levels[-1] == low and (np.diff(levels) < 0).all()
        betas = ddpm.linear_betas(n, low / 1e3, high / 1e3)
        assert betas[0] == low / 1e3 and betas[-1] == high / 1e3


def processes():
    """SDEs whose ends no formula meets exactly."""
    rng = np.random.default_rng(1)
    for _ in range(60):
        low = np.exp(rng.uniform(-4, 0))
        high = low * np.exp(rng.uniform(1, 8))  # t is ln sigma over ln of that ratio
        yield from (sde.EDM(high), sde.VE(low, high), sde.VP(low / 20, 1 + high / 50),
                    sde.SubVP(low / 20, 1 + high / 50))


def ratios(process, n=9):
    """sigma / a from a process's end down, by EDM's rule."""
    a, sigma = map(float, process.marginal(process.T))
    low = getattr(process, "sigma_min", sigma / a / 50)
    return langevin.rho_levels(n, sigma / a, low)


def test_a_process_takes_its_own_levels():
    """Whether they came from our rule, or from its formula in float32 or float64; rounding above T
    or below 0 is on the end, so that no root of a negative number is taken."""
    score = lambda x, t: -x
    for process in processes():
        exact = ratios(process)
        rule = np.linspace(exact[0]**(1 / 7), exact[-1]**(1 / 7), 9)**7
        single = np.linspace(np.float32(exact[0])**np.float32(1 / 7),
                             np.float32(exact[-1])**np.float32(1 / 7), 9, dtype=np.float32)**7
        for levels in (exact, rule, single.astype(np.float32)):
            times = process.time(levels)
            for loop in (sample.heun, sample.reverse_sde, sample.pf_ode):
                *_, x = loop(score, np.ones((2, 1)), process, times, sample.Reference())
                assert np.isfinite(x).all(), process


@pytest.mark.parametrize("process", [sde.VE(), sde.VP(), sde.SubVP()], ids=str)
def test_a_chains_times_may_be_rounded(process):
    """An index is the whole number that its time is, but for rounding."""
    exact = np.linspace(1, 0, 201)
    chains = exact, exact.astype(np.float32), exact * (1 - 1e-16), np.append(1 - 1e-16, exact[1:])
    states = [list(sample.reverse_diffusion(lambda x, t: -x, np.ones((1, 2)), process, times,
                                            sample.Reference()))[-1] for times in chains]
    assert all(np.array_equal(states[0], other) for other in states[1:])
    with pytest.raises(ValueError, match="one an index"):
        list(sample.reverse_diffusion(lambda x, t: -x, np.ones((1, 2)), process, exact * .9998,
                                      sample.Reference()))


def test_a_number_in_is_a_number_out():
    """So that a marginal meets tensors, and an SDE is a key."""
    for process in (sde.VE(), sde.VP(), sde.SubVP(), sde.EDM(np.array(10.))):
        assert hash(process)
        a, sigma = process.marginal(.5)
        assert np.ndim(process.time(.5)) == 0
        assert (a * torch.ones(2) + sigma * torch.ones(2)).shape == (2,)
    for bad in (("1", "2"), ([1.], [2.])):
        with pytest.raises(TypeError, match="must be a number or a NumPy array"):
            sde.VE(*bad)


@pytest.mark.parametrize("process", [sde.VE(), sde.VP(), sde.SubVP(), sde.EDM(80.)], ids=str)
def test_rounding_beyond_an_end_is_the_end(process):
    T, step = process.T, sde.reverse_sde_step
    at = lambda t: coefficients(step, sde=process, t=t, dt=.01)
    for miss in (1e-16, 1e-9, 8e-7):
        assert np.array_equal(at(T * (1 + miss)), at(T)) and np.array_equal(at(-miss * T), at(0.))
        assert np.array_equal(at(np.array([T * (1 + miss), -miss * T])), at(np.array([T, 0.])))
    for t in (T * (1 + 2e-6), -2e-6 * T, T + 1, np.nan):
        with pytest.raises(ValueError, match="t must be in"):
            at(t)
    with pytest.raises(ValueError, match=rf"t must be in \[0, {T:g}\], got {T * 1.00001}"):
        at(T * 1.00001)  # in all its digits, as five would print T


def test_rounding_beyond_other_closed_ends_is_the_end():
    ddim = lambda **p: coefficients(ddpm.ddim_step, **{"alpha_bar": .3, "alpha_bar_prev": .6,
                                                       "eta": .5} | p)
    for name in ("eta", "alpha_bar_prev"):
        assert np.array_equal(ddim(**{name: 1 + 1e-9}), ddim(**{name: 1.}))
    assert np.array_equal(ddim(eta=-1e-9), ddim(eta=0.))
    for bad in ({"eta": 1.00001}, {"alpha_bar_prev": 1.00001}, {"eta": -1e-5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be in"):
            ddim(**bad)
    with pytest.raises(ValueError, match="i must be in"):  # a whole number is not rounded
        coefficients(sde.reverse_diffusion_step, sde=sde.VE(), i=3_000_000, n=3_000_000)


# ---- what a user has set: defaults, modes, a fork ----

def everything(backend, device):
    """What each primitive returns, as CPU tensors."""
    rng = np.random.default_rng(3)
    x, s = (torch.from_numpy(rng.standard_normal((5, 33), np.float32)).to(device) for _ in "xs")
    half, kw = x.half(), {"seed": 4, "backend": backend}
    counter = torch.from_numpy(np.array(1)).to(device)
    table = rng.standard_normal((3, 3))
    again = kernels.bind([x, s], table[0], **kw)
    found = [
        update([x, s], table[0], step=2, **kw), update([half], [.5, .3], **kw), again(3),
        update([x, s], table, step=counter, rows="step", **kw),
        update([x, s], [.5, .2, .1, 1., .5, -1., 1.], **kw),
        apply("perturb", x, a=.5, sigma=np.linspace(.1, 1, 5), **kw),
        normal((5, 9), device=device, **kw), kernels.norms(x, backend=backend),
        kernels.noise_norms(x, **kw), *kernels.dsm_loss(s, rng.uniform(.1, 1, (5, 3)), **kw),
        Fused(**kw).correct(langevin.langevin_step, solvers.snr_step_size, x.clone(), s, 0, 16),
        Fused(**kw)(langevin.langevin_step, 2, eps=np.array([.1, .2]))(counter, x, s)]
    if device == "cpu" and backend != "triton":  # NumPy arrays as well, with a NumPy counter
        found.append(torch.from_numpy(update([x.numpy()], table[:, :2], step=np.array(2),
                                             rows="step", **kw)))
    return [v.cpu() for v in found]


@pytest.mark.parametrize("mode", [
    lambda device: torch.device("meta"), lambda device: torch.autocast(device, torch.bfloat16),
    lambda device: torch.inference_mode(), lambda device: torch.no_grad(),
    lambda device: default_dtype(torch.float64), lambda device: default_dtype(torch.float16)],
    ids=["default device", "autocast", "inference", "no grad", "float64", "float16"])
def test_what_a_user_has_set_changes_no_bit(place, mode):
    backend, device = place
    if backend == "cupy" and device == "cpu":
        pytest.skip("the emulator's own tensors are made on the default device")
    want = everything(backend, device)
    with mode(device):
        got = everything(backend, device)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def default_dtype(dtype):
    """torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


WOKEN_BY_TORCH = """
import multiprocessing as mp
import numpy as np
import torch
from minidiff import kernels
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)   # torch's own, and none of ours
x = np.ones((64, 4096), np.float32)
child = mp.get_context("fork").Process(target=lambda: kernels.update([x], [1.], backend="host"))
child.start()
child.join(60)
print(child.exitcode)
child.kill()
"""

FORKED = """
import multiprocessing as mp
import numpy as np
import torch
from minidiff import kernels, langevin, solvers
torch.set_num_threads(2)
x = torch.ones(70_000, 3)   # so many rows that torch's own sums over them take threads
wide = np.ones((64, 4096), np.float32)
bound = kernels.bind([wide], [1., .3], backend="host")
def work(send):
    rows = torch.ones(70_000, 3, dtype=torch.float64)
    engine = kernels.Fused()
    send([kernels.update([wide], [1., .3], backend="host"), bound(0), kernels.norms(x).numpy(),
          kernels.noise_norms(x).numpy(), kernels.dsm_loss(x, rows)[1].numpy(),
          kernels.update([x.T], rows[:3, :2], backend="host").numpy(),
          engine.correct(langevin.langevin_step, solvers.snr_step_size, x.clone(), -x, 0,
                         16).numpy(), torch.get_num_threads()])
mine = []
work(mine.extend)
here, there = mp.Pipe()
child = mp.get_context("fork").Process(target=work, args=(there.send,))
child.start()
assert here.poll(60), "the child hangs"
theirs = here.recv()
child.join(60)
assert child.exitcode == 0
assert all(np.array_equal(a, b) for a, b in zip(mine[:-1], theirs[:-1], strict=True))
print("same", mine[-1], theirs[-1])
"""


@pytest.mark.skipif(not hasattr(os, "fork") or kernels.missing("host") is not None,
                    reason="needs fork and a C++ compiler")
def test_a_forked_child_returns_the_same_bits():
    """OpenMP's threads stay behind: a child that called on them would wait for ever."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True,
                          timeout=200, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout.strip() == "same 2 1", done.stderr
    done = subprocess.run([sys.executable, "-c", WOKEN_BY_TORCH], capture_output=True, text=True,
                          timeout=200, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout.strip() == "0", done.stderr


def test_an_unknown_op_or_parameter():
    with pytest.raises(TypeError, match="eps must be a number or a NumPy array"):
        apply("langevin", X, X, eps=torch.ones(len(X)))
    with pytest.raises(ValueError, match="op 'langevan' is none of normal, perturb"):
        apply("langevan", X, X, eps=.1)
    with pytest.raises(TypeError, match="eta"):
        apply("langevin", X, X, eta=.1)
    with pytest.raises(TypeError, match="eps"):
        apply("langevin", X, X)

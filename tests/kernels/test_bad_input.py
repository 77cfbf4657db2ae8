"""Bad input raises at the front door, in one clear line; odd input works."""

import inspect
import sys
from inspect import signature

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from minidiff import ddpm, kernels, langevin, noise, samplers, sde, solvers
from minidiff.kernels import (
    Fused,
    apply,
    normal,
    on_cupy,
    on_torch,
    update,
)

X = np.arange(6, dtype=np.float32).reshape(2, 3)
T = torch.from_numpy(X.copy())
CPU = [name for name in ("numpy", "host") if kernels.why_not(name) is None]
MISSING = [name for name in kernels.BACKENDS if kernels.why_not(name)]


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


@pytest.mark.parametrize("operands", [X, T, 1., None], ids=["array", "tensor", "number", "None"])
def test_operands_are_a_list(operands):
    """Of one array the rows would be taken for operands."""
    for call in (update, kernels.bind):
        with pytest.raises(TypeError, match=r"operands must be a list of arrays, got a \w+: \[x\]"):
            call(operands, [1., .5])
    assert update((u for u in (X, X)), [1., .5]).shape == X.shape


class Quantity(np.ndarray):
    """As of a package of units."""


PLAIN = "must be a plain NumPy array, got a {}, of which more than the numbers would be lost"


@pytest.mark.parametrize("subclass", [
    lambda u: np.ma.masked_array(u, u == u.flat[0]), lambda u: u.view(Quantity)],
    ids=["masked", "units"])
def test_what_says_more_than_its_numbers_is_refused(subclass):
    """A mask would be lost, in silence, wherever an array is taken."""
    other, two = subclass(X), np.array([.1, .2])
    words = PLAIN.format(type(other).__name__)
    for name, call in {
            r"operands\[0\]": lambda: update([other], [1.]),
            r"operands\[1\]": lambda: update([X, other], [1., 1.]),
            "out": lambda: update([X], [1.], out=other),
            "x": lambda: kernels.norms(other), "s": lambda: kernels.dsm_loss(other, [1.] * 3),
            "like": lambda: kernels.noise_norms(other),
            "coef": lambda: update([X], subclass(two)),
            r"apply\('langevin'\): eps": lambda: apply("langevin", X, X, eps=subclass(two)),
            "betas": lambda: ddpm.alpha_bars(subclass(two)),
            "sigmas": lambda: solvers.churn(subclass(two)),
            "step": lambda: update([X], [1., 1.], step=subclass(np.array([3]))[0:1].reshape(())),
            "seed": lambda: update([X], [1., 1.], seed=subclass(np.array([3, 4])))}.items():
        with pytest.raises(TypeError, match=f"^{name} {words}"):
            call()


def test_a_file_in_memory_is_a_plain_array(tmp_path):
    u = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    u[:] = X
    assert np.array_equal(update([u], [2.]), 2 * X)


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
        with pytest.raises(RuntimeError, match="requires grad.*detached"):
            update(operands, [1.] * len(operands), out=out)
    for call in (kernels.norms, kernels.noise_norms, lambda s: kernels.dsm_loss(s, [1., 1., 1.])):
        with pytest.raises(RuntimeError, match="requires grad.*detached"):
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
        monkeypatch.setattr(kernels.backend(name), "prepare" if name == "host" else "update", None)
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
            kernels.why_not(name)


@pytest.mark.skipif(not MISSING, reason="every backend can run here")
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_backend_named_never_falls_back(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}'.*(no CUDA|not installed|install)"):
        update([T], [1.], backend=name)


def test_a_package_that_is_not_there_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(on_cupy, "why_not", on_cupy.why_not.__wrapped__)  # not the cached answer
    monkeypatch.setattr(on_torch, "torch", None)
    for name, line in (("cupy", r"pip install -e '\.\[cuda13\]'"), ("torch", "pip install torch")):
        with pytest.raises(RuntimeError, match=f"backend '{name}'.*{line}"):
            update([T], [1.], backend=name)


def test_numpy_arrays_are_refused_where_they_cannot_go(monkeypatch):
    """Also by a backend that could run."""
    monkeypatch.setattr(on_cupy, "why_not", lambda: None)
    with pytest.raises(ValueError, match="backend 'cupy' takes arrays on cuda, not cpu"):
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


@pytest.mark.parametrize("coef", [
    [1e39], np.array([[1.], [-1e39]]), torch.tensor([1e39], dtype=torch.float64)],
    ids=["list", "array", "tensor"])
def test_coefficients_beyond_float32_are_refused(coef):
    """Silently they were infinite. What is infinite by itself is passed on."""
    with pytest.raises(ValueError, match="coef holds -?1e.39, which is beyond float32"):
        update([X], coef)
    with pytest.raises(ValueError, match="coef holds 1e.39, which is beyond float32"):
        apply("perturb", X, a=1., sigma=1e39)
    with pytest.raises(ValueError, match="coef holds 1e.39, which is beyond float32"):
        Fused()(sde.perturb, 1, a=1., sigma=np.array([1e39]))(0, X)
    assert (update([np.ones_like(X)], [np.inf]) == np.inf).all()
    largest = float(np.finfo(np.float32).max)
    assert update([np.ones_like(X)], [largest])[0, 0] == np.float32(largest)


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


def test_a_step_counter_may_be_of_either_kind():
    """A NumPy counter beside CPU tensors, or a CPU tensor beside arrays, is the same counter."""
    want = update([X], [3., 4.], step=1, backend="numpy")
    for u, step in ((X, torch.tensor(1)), (T, np.array(1))):
        for name in ("torch", *CPU):
            got = update([u], [[1., 2.], [3., 4.]], step=step, rows="step", backend=name)
            assert np.array_equal(np.asarray(got), want), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_counter_is_on_the_operands_device():
    for step in (np.array(1), torch.tensor(1)):
        with pytest.raises(ValueError, match="step counter must be .* on the operands' device"):
            update([T.to("cuda")], [[1., 2.], [3., 4.]], step=step, rows="step")


def test_counter_words_are_integers():
    for word in ("seed", "sample", "step", "tag"):
        with pytest.raises(TypeError):
            normal((2, 3), **{word: 1.5}, backend="numpy")


@pytest.mark.parametrize("given", [1.5, "1", b"1", np.float32(1)], ids=str)
@pytest.mark.parametrize("name", ["seed", "sample", "step", "tag"])
def test_a_word_of_the_counter_that_is_no_integer_is_named(name, given):
    word = {name: given}
    for call in (lambda: update([X], [1., .1], **word), lambda: kernels.bind([X], [1.], **word),
                 lambda: normal((2, 3), **word), lambda: noise.normal((2, 3), **word),
                 lambda: apply("langevin", X, X, eps=.1, **word),
                 lambda: kernels.noise_norms(X, **word),
                 lambda: kernels.dsm_loss(X, [1.] * 3, **word)):
        with pytest.raises(TypeError, match=f"^{name} must be an integer.* got "):
            call()
    for f in (update, kernels.bind):
        with pytest.raises(TypeError, match="^first_step must be an integer, got "):
            f([X], [1., .1], first_step=given)


@pytest.mark.parametrize("f", [update, kernels.bind, normal, kernels.norms, kernels.noise_norms,
                               kernels.dsm_loss], ids=lambda f: f.__name__)
def test_a_wrong_keyword_names_what_was_called(f):
    with pytest.raises(TypeError, match=rf"^{f.__name__}\(\) got an unexpected keyword .*'sed'"):
        f([X], [1.], sed=1) if f in (update, kernels.bind) else f(X, sed=1)
    parameters = signature(f).parameters.values()
    assert not [p for p in parameters if p.kind is p.VAR_KEYWORD]
    assert inspect.getdoc(f)


def test_parameters_are_named_where_one_is_wrong_or_missing():
    for call, words in (
            (lambda: apply("langevin", X, X, eps=.1, sed=1),
             r"^apply\('langevin'\): langevin_step has no parameter 'sed': it takes eps$"),
            (lambda: apply("langevin", X, X), r"^apply\('langevin'\): langevin_step needs eps$"),
            (lambda: samplers.Reference(sed=1), r"^Reference.__init__\(\) got an unexpected"),
            (lambda: Fused(sed=1), r"^Fused.__init__\(\) got an unexpected"),
            (lambda: apply("ddim", X, X, eta=0.), "ddim_step needs alpha_bar, alpha_bar_prev"),
            (lambda: apply("ddpm_clipped", X, X, alpha_bar=.5),
             "posterior_step needs alpha_bar_prev, variance"),
            (lambda: kernels.coefficients(lambda x: x), "has no operands: they come first")):
        with pytest.raises(TypeError, match=words):
            call()
    for op in ([], None, 3):
        with pytest.raises(ValueError, match="is none of normal, perturb"):
            apply(op, X)

    def usual(x, s, z, /, eps, scale=2., **_):
        return x + eps * scale * s + 0 * z
    assert np.array_equal(apply(usual, X, X, eps=.5), 2 * X)  # neither scale nor _ is missing


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16"), torch.float16],
                         ids=str)
def test_a_dtype_may_be_said_in_any_way(dtype):
    assert normal((2, 3), dtype).dtype == np.float16
    assert normal((2, 3), dtype, "cpu").dtype == torch.float16
    assert normal((2, 3), dtype, torch.device("cpu")).dtype == torch.float16
    assert normal(3, dtype).shape == (3,)


@pytest.mark.parametrize("arguments, error, words", [
    (((2, 3), "bfloat16"), TypeError, "dtype bfloat16 is torch's alone: name a device"),
    (((2, 3), np.float64), TypeError, "dtype must be one of float32, .* got float64"),
    (((2, 3), float, "cpu"), TypeError, "dtype must be one of .* got float"),
    (((2, 3), "float33"), TypeError, "dtype must be one of .* got float33"),
    (((2, 3), "float32", "hpu"), ValueError, "device must be cpu, cuda or cuda:N, got 'hpu'"),
    (((2, 3), "float32", "meta"), ValueError, "device must be cpu, cuda or cuda:N, got 'meta'"),
    (((2, 3), "float32", "none"), ValueError, "device must be cpu, cuda or cuda:N, got 'none'"),
    (((2., 3),), TypeError, r"shape must be whole numbers, samples first, got \(2.0, 3\)"),
    (("ab",), TypeError, "shape must be whole numbers"), ((None,), TypeError, "shape must be"),
    (((),), ValueError, r"shape must begin with the samples and .* got \(\)"),
    (((2, 3), [1]), TypeError, r"dtype must be one of .* got \[1\]"),
    (((2, 3), "float32", [1]), ValueError, r"device must be cpu, cuda or cuda:N, got \[1\]"),
    (((2, 3), "float32", 1.5), ValueError, "device must be cpu, cuda or cuda:N, got 1.5"),
    (((2, 3), "float32", "cuda:99"), ValueError, "device cuda:99: torch .*finds"),
    (((-1, 2),), ValueError, r"shape .* no negative size, got \(-1, 2\)")], ids=str)
def test_what_normal_cannot_make_is_named(arguments, error, words):
    """The reference's too, whose shapes are the same."""
    with pytest.raises(error, match=words):
        normal(*arguments)
    if words.startswith("shape"):
        for draw in (noise.normal, noise.uniform, noise.rademacher):
            with pytest.raises(error, match=words):
                draw(*arguments)
    assert noise.normal(3).shape == (3,)


def test_an_unknown_op_or_parameter():
    with pytest.raises(TypeError, match="eps must be a number or a NumPy array"):
        apply("langevin", X, X, eps=torch.ones(len(X)))
    with pytest.raises(ValueError, match="op 'langevan' is none of normal, perturb"):
        apply("langevan", X, X, eps=.1)
    with pytest.raises(TypeError, match="eta"):
        apply("langevin", X, X, eta=.1)
    with pytest.raises(TypeError, match="eps"):
        apply("langevin", X, X)


def test_names_that_are_too_few_drop_no_operand():
    for names in ((), None, ["a"], ("a", "b", "c")):
        assert np.array_equal(update([X, X], [1., 2.], names=names), 3 * X)


def test_coefficients_of_every_kind_are_read_or_refused():
    two = np.array([1., 2.])
    for coef in (memoryview(two), two.tolist(), tuple(two), torch.tensor(two), two[::-1][::-1]):
        assert np.array_equal(update([X, X], coef), 3 * X)
    for coef in (np.float64(2.), 2., torch.tensor(2.)):
        with pytest.raises(ValueError, match=r"coef has shape \(\): its last axis must be"):
            update([X, X], coef)


def test_an_empty_batch_checks_its_counter():
    for counter in ({"seed": "a"}, {"seed": 1.5}, {"sample": None}, {"tag": 2.}):
        with pytest.raises(TypeError):
            update([X[:0]], [1.], **counter)


def test_the_coefficient_one_is_made_where_it_is_needed(monkeypatch):
    """On a GPU a copy of it would wait, and could not be captured in a graph."""
    monkeypatch.setattr(torch, "from_numpy", None)
    for f in (kernels.norms, kernels.noise_norms):
        assert f(T, backend="torch").shape == T.shape[:1]

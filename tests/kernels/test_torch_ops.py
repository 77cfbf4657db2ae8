"""torch.ops.minidiff: registration, compile, export and gradients."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.library import opcheck

from minidiff import kernels
from minidiff.kernels import torch_ops
from minidiff.kernels.check.compare import as_tuple
from minidiff.langevin import langevin_step

DRAW = None, 3, 0, 2, 1  # keys, seed, sample, step, tag
KEYS = torch.tensor([[-1, 0], [2**40 + 3, 1], [3, 2**32 - 1], [1, 7], [4, 7], [3, 0]])
KEYED = KEYS, 0, 0, 2, 1
OPS = torch.ops.minidiff


def tensors(*shapes, grad=True):
    torch.manual_seed(0)
    return [torch.randn(s, requires_grad=grad) for s in shapes]


def calls():
    """Every public op with arguments, by name."""
    x, s = tensors((6, 10), (6, 10))
    per_call, per_sample = torch.tensor([.9, .2, .1]), torch.rand(6, 3)
    table, counter = torch.rand(4, 3), torch.tensor(7)  # beyond the last row
    clipped = torch.cat([per_sample, torch.tensor([1., .5, -1., 1.]).expand(6, 4)], 1)
    return {
        "update": (OPS.update, ([x, s], per_call, None, *DRAW)),
        "update, a row a sample": (OPS.update, ([x, s], per_sample, None, *DRAW)),
        "update, a table": (OPS.update, ([x, s], table, counter, *DRAW, "step")),
        "update, a row a sample beside a counter": (
            OPS.update, ([x, s], per_sample, counter, *DRAW, "sample")),
        "update, a row by a number": (OPS.update, ([x, s], table, None, *DRAW, "step")),
        "update, clipped": (OPS.update, ([x, s], clipped, None, *DRAW)),
        "update, four": (OPS.update, ([x, s, x, s], torch.rand(5), None, *DRAW)),
        "normal": (OPS.normal, (x.detach(), *DRAW)),
        "norms": (OPS.norms, (x,)),
        "noise_norms": (OPS.noise_norms, (x.detach(), *DRAW)),
        "dsm_loss": (OPS.dsm_loss, (x, per_sample, *DRAW)),
        "update, keys": (OPS.update, ([x, s], per_sample, None, *KEYED)),
        "update, a table and keys": (OPS.update, ([x, s], table, counter, *KEYED, "step")),
        "normal, keys": (OPS.normal, (x.detach(), *KEYED)),
        "noise_norms, keys": (OPS.noise_norms, (x.detach(), *KEYED)),
        "dsm_loss, keys": (OPS.dsm_loss, (x, per_sample, *KEYED))}


def first(result):
    return result[0] if isinstance(result, tuple) else result


def test_every_registered_op_is_called_here():
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("minidiff::")}
    assert registered == {op.default.name() for op, _ in calls().values()} and torch_ops.LIB


@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    op, arguments = calls()[name]
    assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", calls())
def test_compile_without_a_graph_break(name):
    torch._dynamo.reset()  # one lambda serves all: more than eight forms would be too many
    op, arguments = calls()[name]
    compiled = torch.compile(lambda *a: first(op(*a)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), first(op(*arguments)) * 2)


@pytest.mark.parametrize("name", calls())
def test_export(name):
    op, arguments = calls()[name]

    class Module(torch.nn.Module):
        def forward(self, *given):
            return first(op(*given))
    given = [[u.detach() for u in a] if isinstance(a, list) else
             a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    program = torch.export.export(Module(), tuple(given))
    assert torch.equal(program.module()(*given), first(op(*given)))


def test_keys_are_a_seed_and_an_id_a_row():
    x, coef = torch.randn(6, 10), torch.rand(6, 3)
    draw = {"seed": KEYS[:, 0], "sample": KEYS[:, 1], "step": 2, "tag": 1}
    want = kernels.normal(x.shape, device="cpu", **draw)
    assert torch.equal(OPS.normal(x, *KEYED), want)
    assert torch.equal(OPS.normal(x, KEYS.T.contiguous().T, *KEYED[1:]), want)  # as it is laid out
    assert torch.equal(OPS.noise_norms(x, *KEYED), kernels.noise_norms(x, **draw))
    for got, exact in zip(OPS.dsm_loss(x, coef, *KEYED), kernels.dsm_loss(x, coef, **draw)):
        assert torch.equal(got, exact)
    got = OPS.update([x], coef[:, :2], torch.tensor(7), KEYS, 0, 0, 5, 1, "sample")
    assert torch.equal(got, kernels.update([x], coef[:, :2], **draw | {"step": 12}))


@pytest.mark.parametrize("keys, more, words", [
    (KEYS[:5], (0, 0), "seed and sample have 5 rows, not 6"),
    (KEYS.int(), (0, 0), "keys must be int64"),
    (KEYS[:, 0], (0, 0), "keys must be int64"), (KEYS, (3, 0), "pass 0 beside them"),
    (KEYS, (0, 3), "pass 0 beside them")])
def test_keys_that_are_none_are_refused_in_words(keys, more, words):
    with pytest.raises(ValueError, match=words):
        OPS.normal(torch.randn(6, 10), keys, *more, 2, 1)


def test_the_functions_are_the_operators_and_the_launchers():
    x, s, coef = torch.randn(6, 10), torch.randn(6, 10), torch.rand(6, 3)
    draw = {"seed": 3, "sample": 5, "step": 2, "tag": 1}
    assert torch.equal(torch_ops.update([x, s], coef, **draw),
                       kernels.update([x, s], coef, **draw))
    assert torch.equal(torch_ops.update([x], coef[:, :2], keys=KEYS, step=2, tag=1),
                       OPS.update([x], coef[:, :2], None, *KEYED))
    counter = torch.tensor(7)
    got = torch_ops.update([x, s], coef, counter=counter, rows="step", step=1)
    assert torch.equal(got, kernels.update([x, s], coef, step=counter, rows="step", first_step=1))
    for name, given in (("normal", (x,)), ("noise_norms", (x,)), ("norms", (x,)),
                        ("dsm_loss", (x, coef))):
        f, of = getattr(torch_ops, name), getattr(OPS, name)
        more = () if name == "norms" else (None, 3, 5, 2, 1)
        got = f(*given, **draw) if more else f(*given)
        for a, b in zip(as_tuple(got), as_tuple(of(*given, *more))):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["update", "normal", "noise_norms", "dsm_loss"])
@pytest.mark.parametrize("word", ["seed", "sample", "step"])
def test_words_beyond_2_63_are_the_launchers(name, word):
    """An operator's integers have 64 bits and a sign; a seed has 64 and none."""
    x = torch.zeros(2, 4)
    given = {"update": ([x], torch.ones(2)), "dsm_loss": (x, torch.ones(3))}.get(name, (x,))
    for value in (2**63 - 1, 2**63, 2**64 - 1, 2**64 + 5, -1, -2**63 - 1):
        got = as_tuple(getattr(torch_ops, name)(*given, tag=2, **{word: value}))
        if name == "normal":
            want = [kernels.normal(x.shape, device="cpu", tag=2, **{word: value})]
        else:
            want = as_tuple(getattr(kernels, name)(*given, tag=2, **{word: value}))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("call, words", [
    (lambda x: torch_ops.update(x, x), "operands must be a list of arrays, got a Tensor"),
    (lambda x: torch_ops.update([], x), "operands must be one tensor at least"),
    (lambda x: torch_ops.update([x], [1., 2.]), "coef must be a tensor, got a list"),
    (lambda x: torch_ops.update([x, 1.], x[0]), r"operands\[1\] must be a tensor, got a float"),
    (lambda x: torch_ops.dsm_loss(x.numpy(), x[0]), "s must be a tensor, got a ndarray"),
    (lambda x: torch_ops.norms([1.]), "x must be a tensor, got a list"),
    (lambda x: torch_ops.normal(x, keys=[3]), "keys must be a tensor, got a list"),
    (lambda x: torch_ops.normal((2, 3)), "like must be a tensor, got a tuple"),
    *[(lambda x, word=word, given=given: torch_ops.noise_norms(x, **{word: given}),
       f"{word} must be an integer, got ")
      for word in ("seed", "sample", "step", "tag") for given in (1.5, "1", [3, 4], None)]])
def test_what_the_functions_cannot_take_is_named(call, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        call(torch.ones(2, 3))


def test_a_seed_of_numpys_is_its_bits():
    x = torch.zeros(2, 4)
    want = kernels.normal(x.shape, device="cpu", seed=2**64 - 1)
    assert torch.equal(torch_ops.normal(x, seed=np.uint64(2**64 - 1)), want)


def test_transforms_of_the_operators_are_refused_in_one_line():
    """vmap would draw the same noise in every lane."""
    x, coef = torch.randn(5, 2, 3), torch.ones(3)
    for f in (torch_ops.norms, torch_ops.normal, torch_ops.noise_norms,
              lambda x: torch_ops.update([x], coef[:2]), lambda x: torch_ops.dsm_loss(x, coef)[0]):
        with pytest.raises(RuntimeError, match="^torch.ops.minidiff.* not for torch.func.vmap: .*"):
            torch.func.vmap(f, randomness="different")(x)
    for f in (lambda x: torch_ops.norms(x).sum(), lambda x: torch_ops.dsm_loss(x, coef)[0],
              lambda x: torch_ops.update([x], coef[:2]).sum()):
        with pytest.raises(RuntimeError, match="none by torch.func: take torch.autograd"):
            torch.func.grad(f)(x)


def test_a_seed_may_be_symbolic():
    x = torch.zeros(2, 4)
    f = torch.compile(lambda x, seed: torch_ops.normal(x, seed=seed) + 1, backend="aot_eager",
                      fullgraph=True, dynamic=True)
    for seed in (1, 2, 3):
        assert torch.equal(f(x, seed), kernels.normal((2, 4), device="cpu", seed=seed) + 1)


def test_inductor_compiles_the_update_whole():
    x, s = tensors((8, 16), (8, 16), grad=False)
    coef = torch.tensor([.9, .2, .1])
    step = torch.compile(lambda x, s: OPS.update([x, s], coef, None, *DRAW) + 1, fullgraph=True)
    want = kernels.update([x, s], coef, seed=3, step=2, tag=1) + 1
    assert torch.equal(step(x, s), want)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("counter", [None, torch.tensor(9)], ids=["rows", "counter"])
def test_update_gradients_are_those_of_the_composed_form(clip, counter):
    """By ==: c_k g is one product, and the clip passes or stops it whole."""
    x, s = tensors((6, 10), (6, 10))
    coef, g = torch.rand(6, 7), torch.randn(6, 10)
    coef[:, 5:] = torch.tensor([-1., 1.])
    rows = None if counter is None else "step"
    got = torch.autograd.grad(
        OPS.update([x, s], coef if clip else coef[:, :3], counter, *DRAW, rows), (x, s), g)
    c = (coef if counter is None else coef[5].expand(6, 7))[:, :, None].unbind(1)
    z = kernels.normal((6, 10), device="cpu", seed=3, step=2 if counter is None else 9, tag=1)
    d = (c[3] * x + c[4] * s).clamp(-1., 1.) if clip else s
    want = torch.autograd.grad(c[0] * x + c[1] * d + c[2] * z, (x, s), g)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_gradients_against_differences():
    """Central differences of the float32 kernels, by steps of 1: affine and quadratic forms have
    no truncation error at any step, so only rounding is left.

    Let u = 2^-24 and `size` be the form of all moduli, |x| + 1 for x. The affine form rounds
    x + e, a term's product and two sums, the weight's product and 20 sums of 21 elements: 25 u
    of size. The quadratic form rounds x + e and the residual's three, twice as they are squared,
    the square, the quad's two sums and the result: 12 u. Half the difference of two such values
    keeps that, and rounds once more. The gradient rounds c e once, or 2 w e c in five steps, of
    at most 2 size: 10 u. So 27 u and 23 u.
    """
    x, s = tensors((3, 7), (3, 7))
    coef, weights, rows = torch.tensor([.9, .2, .1]), torch.randn(3, 7), torch.rand(3, 3)
    z = kernels.normal((3, 7), device="cpu", seed=3, step=2, tag=1).abs()

    def update(x):
        return (OPS.update([x, s.detach()], coef, None, *DRAW) * weights).sum()

    def loss(x):
        return OPS.dsm_loss(x, rows, *DRAW)[0]
    with torch.no_grad():
        terms = coef[0] * (x.abs() + 1) + coef[1] * s.abs() + coef[2] * z
        residual = rows[:, :1] * (x.abs() + 1) + rows[:, 1:2] * z
        sizes = (terms * weights.abs()).sum(), (rows[:, 2:] * residual.square()).sum()
    for f, size in zip((update, loss), sizes):
        gradient, = torch.autograd.grad(f(x), x)
        with torch.no_grad():
            for i in range(3):
                e = torch.zeros(3, 7)
                e[i, i] = 1.
                difference = (f(x + e) - f(x - e)) / 2
                assert abs(difference - gradient[i, i]) <= 27.01 * 2**-24 * size


def test_a_changing_step_compiles_once():
    x, coef = torch.ones(3, 5), torch.tensor([.5, 1.])
    torch._dynamo.reset()
    step = torch.compile(lambda x, k: OPS.update([x], coef, None, None, 0, 0, k, 0) * 1,
                         fullgraph=True, backend="aot_eager")
    for k in range(20):
        assert torch.equal(step(x, k), kernels.update([x], coef, step=k, tag=0))


def test_a_gradient_that_is_not_defined_is_refused():
    x, = tensors((4, 5), grad=False)
    coef = torch.rand(4, 3, requires_grad=True)
    x.requires_grad_()
    for call in (lambda: OPS.update([x], coef[:, :2], None, *DRAW),
                 lambda: OPS.dsm_loss(x, coef, *DRAW)):
        with pytest.raises(RuntimeError, match="coef requires grad"):
            call()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(OPS.dsm_loss(x, coef.detach(), *DRAW)[0], x, create_graph=True)


def test_norm_gradient_is_the_direction():
    """x / |x|. The norm is within 2.5 of 2^-24 (tests/kernels/test_sums.py); then a quotient and
    a product are rounded."""
    zero = torch.zeros(2, 3, requires_grad=True)
    OPS.norms(zero).sum().backward()
    assert (zero.grad == 0).all()
    x, = tensors((4, 5))
    gradient, = torch.autograd.grad(OPS.norms(x).sum(), x)
    exact = x.double() / x.double().norm(dim=1, keepdim=True)
    assert torch.allclose(gradient.double(), exact, rtol=4.51 * 2**-24, atol=0)


def test_the_loss_trains_through_autograd():
    x, = tensors((4, 5))
    value, gradient = OPS.dsm_loss(x, torch.rand(4, 3), *DRAW)
    (4 * value).backward()
    assert torch.equal(x.grad, 4 * gradient) and not gradient.requires_grad


@pytest.mark.parametrize("counter, step, rows, row", [
    (torch.tensor(1), 0, "step", 1), (torch.tensor(9), 0, "step", 3), (None, 2, "step", 2),
    (None, 9, "step", 3), (torch.tensor(1), 0, "sample", slice(4)), (None, 1, None, slice(4))])
def test_gradients_follow_what_rows_are_said_to_be(counter, step, rows, row):
    x, = tensors((4, 5))
    coef = torch.rand(4, 2)
    out = OPS.update([x], coef, counter, None, 0, 0, step, 0, rows)
    gradient, = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, coef[row, 0].reshape(-1, 1).expand(4, 5))
    if rows and counter is not None:
        with pytest.raises(ValueError, match='say rows="step".*rows="sample"'):
            OPS.update([x], coef, counter, None, 0, 0, step, 0)


def forward_modes(f, x):
    """The ways that torch has of a forward-mode derivative, each as a call."""
    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    return (dual, lambda: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
            lambda: torch.func.jacfwd(f)(x),
            lambda: jacobian(f, x, strategy="forward-mode", vectorize=True))


def test_a_forward_mode_derivative_is_refused_never_zero():
    x, s = tensors((2, 3), (2, 3), grad=False)
    coef, loss = torch.rand(3), torch.rand(3)
    for f, u in ((lambda a: OPS.update([a, s], coef, None, *DRAW), x),
                 (lambda a: OPS.update([s, a], coef, None, *DRAW), x),
                 (lambda a: OPS.update([x, s], a, None, *DRAW), coef), (OPS.norms, x),
                 (lambda a: OPS.dsm_loss(a, loss, *DRAW)[0], x),
                 (lambda a: OPS.dsm_loss(x, a, *DRAW)[0], loss)):
        for derivative in forward_modes(f, u):
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                derivative()
    assert torch.equal(jacobian(lambda a: OPS.update([a, s], coef, None, *DRAW), x),
                       coef[0] * torch.eye(6).reshape(2, 3, 2, 3))  # in reverse mode


def test_noise_has_no_derivative():
    """It is a constant in every mode, as torch.randn_like's is: only x's shape is read."""
    x, = tensors((2, 3))
    for f in (lambda a: a * OPS.normal(a, *DRAW), lambda a: a * OPS.noise_norms(a, *DRAW)[:, None]):
        gradient, = torch.autograd.grad(f(x).sum(), x)
        want = f(torch.ones(2, 3))
        assert torch.equal(gradient, want)
        assert not OPS.normal(x, *DRAW).requires_grad
        tangent = torch.func.jvp(f, (x.detach(),), (torch.ones(2, 3),))[1]
        assert torch.equal(tangent, want)


def test_launchers_refuse_a_tangent():
    x = torch.ones(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.clone())
        for f in (lambda: kernels.update([dual], [1.]), lambda: kernels.update([x], [1.], out=dual),
                  lambda: kernels.bind([x, dual], [1., 1.]), lambda: kernels.norms(dual),
                  lambda: kernels.update([x], forward_ad.make_dual(x[0, :1], x[0, :1].clone())),
                  lambda: kernels.noise_norms(dual), lambda: kernels.dsm_loss(dual, torch.ones(3))):
            with pytest.raises(RuntimeError, match="forward-mode tangent.*detached"):
                f()


# ---- what is written in place ----

def writers(backend):
    """Every way to write into x that the kernels have."""
    def bound(x):
        kernels.bind([x], [.5], out=x, backend=backend)(0)

    def bound_without_out(x):
        again = kernels.bind([x], [.5], backend=backend)
        before = (kept := again(0))._version
        again(1)
        assert kept._version > before
        x.mul_(1.)  # as what this writes is not x

    def corrected(x):
        rule = lambda z_norm, s_norm: 1e-3 * z_norm
        kernels.Fused(backend=backend).corrector(langevin_step, rule, 16)(0, x, -x)
    return {"update": lambda x: kernels.update([x], [.5, 1.], out=x, backend=backend),
            "normal": lambda x: kernels.normal(x.shape, out=x, backend=backend),
            "apply": lambda x: kernels.apply("perturb", x, a=1., sigma=1., out=x, backend=backend),
            "noise_norms": lambda x: kernels.noise_norms(x, out=x, backend=backend),
            "bind": bound, "bind without out": bound_without_out, "correct": corrected}


@pytest.mark.parametrize("way", writers("auto"))
def test_a_gradient_whose_saved_tensor_was_written_is_refused(place, way):
    """By every backend: torch refuses it after its own in-place forms, and silence would leave a
    gradient of the new numbers."""
    backend, device = place
    x = torch.randn(3, 4, device=device)
    weight = torch.randn(4, 4, device=device, requires_grad=True)
    loss = (x @ weight).square().sum()
    writers(backend)[way](x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_only_read_or_new_keeps_its_gradient(place):
    backend, device = place
    x = torch.randn(3, 4, device=device)
    weight = torch.randn(4, 4, device=device, requires_grad=True)
    loss = (x @ weight).square().sum()
    for f in (lambda: kernels.update([x], [.5, 1.], backend=backend), lambda: kernels.norms(
            x, backend=backend), lambda: kernels.noise_norms(x, backend=backend),
            lambda: kernels.dsm_loss(x, [1., 1., 1.], backend=backend)):
        f()
    loss.backward()
    with torch.inference_mode():  # tensors without a version
        kernels.normal((2, 3), out=torch.ones(2, 3, device=device), backend=backend)

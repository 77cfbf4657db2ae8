"""torch.ops.minidiff: registration, compile, export and gradients."""

import pytest
import torch
from torch.library import opcheck

from minidiff import kernels
from minidiff.kernels import torch_ops

DRAW = 3, 0, 2, 1
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
        "update, a table": (OPS.update, ([x, s], table, counter, *DRAW)),
        "update, clipped": (OPS.update, ([x, s], clipped, None, *DRAW)),
        "update, four": (OPS.update, ([x, s, x, s], torch.rand(5), None, *DRAW)),
        "normal": (OPS.normal, (x.detach(), *DRAW)),
        "norms": (OPS.norms, (x,)),
        "noise_norms": (OPS.noise_norms, (x.detach(), *DRAW)),
        "dsm_loss": (OPS.dsm_loss, (x, per_sample, *DRAW))}


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
    got = torch.autograd.grad(OPS.update([x, s], coef if clip else coef[:, :3], counter, *DRAW),
                              (x, s), g)
    c = (coef if counter is None else coef[5].expand(6, 7))[:, :, None].unbind(1)
    z = kernels.normal((6, 10), device="cpu", seed=3, step=2 if counter is None else 9, tag=1)
    d = (c[3] * x + c[4] * s).clamp(-1., 1.) if clip else s
    want = torch.autograd.grad(c[0] * x + c[1] * d + c[2] * z, (x, s), g)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_gradients_against_differences():
    """Central differences of the float32 kernels: affine and quadratic forms have no truncation
    error at any step, so a step of 1 leaves only rounding, 2^-24 of the values."""
    x, s = tensors((3, 7), (3, 7))
    coef, weights = torch.tensor([.9, .2, .1]), torch.randn(3, 7)

    def update(x):
        return (OPS.update([x, s.detach()], coef, None, *DRAW) * weights).sum()

    def loss(x):
        return OPS.dsm_loss(x, torch.rand(3, 3, generator=torch.Generator().manual_seed(1)),
                            *DRAW)[0]
    for f in (update, loss):
        gradient, = torch.autograd.grad(f(x), x)
        with torch.no_grad():
            for i in range(3):
                e = torch.zeros(3, 7)
                e[i, i] = 1.
                difference = (f(x + e) - f(x - e)) / 2
                bound = 64 * 2**-24 * (f(x.abs() + 1).abs() + weights.abs().sum() * 4)
                assert abs(difference - gradient[i, i]) <= bound


def test_a_changing_step_compiles_once():
    x, coef = torch.ones(3, 5), torch.tensor([.5, 1.])
    torch._dynamo.reset()
    step = torch.compile(lambda x, k: OPS.update([x], coef, None, 0, 0, k, 0) * 1,
                         fullgraph=True, backend="aot_eager")
    for k in range(20):
        assert torch.equal(step(x, k), kernels.update([x], coef, step=k))


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
    zero = torch.zeros(2, 3, requires_grad=True)
    OPS.norms(zero).sum().backward()
    assert (zero.grad == 0).all()
    x, = tensors((4, 5))
    gradient, = torch.autograd.grad(OPS.norms(x).sum(), x)
    assert torch.allclose(gradient, x / x.norm(dim=1, keepdim=True), rtol=4 * 2**-23, atol=0)


def test_the_loss_trains_through_autograd():
    x, = tensors((4, 5))
    value, gradient = OPS.dsm_loss(x, torch.rand(4, 3), *DRAW)
    (4 * value).backward()
    assert torch.equal(x.grad, 4 * gradient) and not gradient.requires_grad


def test_launchers_refuse_what_the_operators_record():
    x, s = tensors((4, 5), (4, 5))
    for f in (lambda: kernels.update([x, s], [1., 1.]), lambda: kernels.norms(x),
              lambda: kernels.dsm_loss(x, torch.ones(3)), lambda: kernels.noise_norms(x),
              lambda: kernels.update([s.detach()], [1.], out=x)):
        with pytest.raises(RuntimeError, match="requires grad.*detached"):
            f()

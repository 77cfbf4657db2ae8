"""The kernels as torch operators, with their fake forms and gradients.

`update`, `normal`, `noise_norms`, `norms` and `dsm_loss` below return what the launchers of
minidiff.kernels return, and may stand in what torch.compile and torch.export look at: each
is one opaque operator, torch.ops.minidiff.*, and carries its gradient. For loops and CUDA
graphs the launchers cost less a call.

A gradient with respect to coefficients is not defined; that of an update's operand k is
c_k. Forward-mode derivatives are refused: what computes below autograd would lose a tangent
unseen.
"""

from functools import partial

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_leaves

from ..noise import PERTURBATION, PREDICTOR, PRIOR, integer, signed
from . import sums, updates
from .arguments import has_tangent, listed
from .launch import Keys
from .on_torch import chosen

COUNTER = "Tensor? keys, SymInt seed, SymInt sample, SymInt step, SymInt tag"
LIB = torch.library.Library("minidiff", "DEF")


def register(name, signature, run, fake, backward=None, save=None):
    """Define an operator with its CPU and CUDA form, fake and autograd."""
    LIB.define(name + signature)
    for device in ("CPU", "CUDA"):
        LIB.impl(name, run, device)
    torch.library.register_fake(f"minidiff::{name}", fake, lib=LIB)
    LIB.impl(name, partial(_no_vmap, name), "FuncTorchBatched")
    if not backward:  # no derivative: the result is a constant, as of torch.randn_like
        LIB.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return
    # What torch.library.register_autograd registers, of torch's own functions in 2.11 to
    # 2.14, behind a look at tangents: below, none is seen.
    operator = getattr(torch.ops.minidiff, name).default
    recorded = make_autograd_impl(operator, Info(backward, save))

    def reverse_mode(keys, *inputs):
        _no_tangent(name, inputs)
        return recorded(keys, *inputs)
    LIB.impl(name, reverse_mode, "Autograd", with_keyset=True)


def _no_tangent(name, inputs):
    """RuntimeError where an input is a dual number of torch.func.jvp or forward_ad, or one
    of torch.func.grad."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    for u in tree_leaves(inputs):
        if isinstance(u, torch.Tensor) and (has_tangent(u) or wrapped(u)):
            raise RuntimeError(
                f"torch.ops.minidiff.{name} has no forward-mode derivative, and none by "
                "torch.func: take torch.autograd.grad, or the reference's own derivative")


def _no_vmap(name, *_):
    """RuntimeError: a lane of torch.func.vmap has no noise of its own."""
    raise RuntimeError(
        f"torch.ops.minidiff.{name} is not for torch.func.vmap: its rows are a batch "
        "already, keys give each its own noise")


def _dense(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _a_number_a_sample(x, *_):
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _along_rows(v, like):
    """v, one number a sample or one for all, to be multiplied with `like`."""
    others = like.dim() - 1
    return v.reshape(-1, *[1] * others)


def _refuse_gradient(coef):
    if coef.requires_grad:
        raise RuntimeError("coef requires grad, which is not defined: pass it detached")


def _drawn(device, keys, seed, sample, step, tag):
    """The noise's counter, as keywords; keys (batch, 2) stand for seed and sample."""
    if keys is not None:
        if seed or sample:
            raise ValueError("keys hold every row's seed and sample: pass 0 beside them")
        if keys.dim() != 2 or keys.shape[1] != 2 or keys.dtype != torch.int64:
            raise ValueError("keys must be int64 (batch, 2), a seed and an id a row, got "
                             f"{keys.dtype} {tuple(keys.shape)}")
        seed = Keys(keys.to(device).contiguous())
    return {"seed": seed, "sample": sample, "step": step, "tag": tag}


# ---- update ----

def _update(operands, coef, counter, keys, seed, sample, step, tag, rows=None):
    operands = [u.detach() for u in operands]
    draw = _drawn(operands[0].device, keys, seed, sample, step, tag)
    if counter is not None:
        draw |= {"step": counter, "first_step": step}
    return updates.update(operands, coef.detach(), rows=rows, **draw)


def _update_fake(operands, *_):
    return _dense(operands[0])


def _update_save(ctx, inputs, output):
    operands, coef, counter, _, _, _, step, _, rows = inputs
    _refuse_gradient(coef)
    ctx.operands = len(operands)
    clips = coef.shape[-1] - ctx.operands > 3  # p0, p1, lo, hi; a SymInt is no key of HOLDS
    if rows == "step" and coef.dim() == 2:
        step = max(0, min(step, len(coef) - 1))
        coef = coef[step] if counter is None else chosen(coef, counter)
    ctx.save_for_backward(coef, *(operands[:2] if clips else []))


def _update_backward(ctx, g):
    coef, *clipped = ctx.saved_tensors
    c = [_along_rows(c_k, g) for c_k in coef.to(g.device).float().unbind(-1)]
    gradients = [c_k * g for c_k in c[:ctx.operands]]
    if clipped:  # u1 = clip(p0 x + p1 s): what passes the clip goes on to x and s
        x, s = clipped
        p0, p1, low, high = c[-4:]
        d = p0 * x + p1 * s
        inside = gradients[1] * ((d >= low) & (d <= high))
        gradients[0] = gradients[0] + p0 * inside
        gradients[1] = p1 * inside
    gradients = [v.to(g.dtype) for v in gradients]
    return gradients, *[None] * (len(ctx.needs_input_grad) - 1)


register(
    "update", f"(Tensor[] operands, Tensor coef, Tensor? counter, {COUNTER}, "
    "str? rows=None) -> Tensor",
    _update, _update_fake, _update_backward, _update_save)


# ---- noise ----

def _normal(like, *draw):
    return updates.update([], [1.], out=_dense(like), **_drawn(like.device, *draw))


def _noise_norms(like, *draw):
    return sums.noise_norms(like.detach(), **_drawn(like.device, *draw))


LIKE = f"(Tensor like, {COUNTER}) -> Tensor"
register("normal", LIKE, _normal, _dense)
register("noise_norms", LIKE, _noise_norms, _a_number_a_sample)


# ---- norms ----

def _norms(x):
    return sums.norms(x.detach())


def _norms_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _norms_backward(ctx, g):
    x, norm = ctx.saved_tensors
    g = g / norm.masked_fill(norm == 0, torch.inf)  # 0 there, as torch's
    return x * _along_rows(g, x).to(x.dtype)


register("norms", "(Tensor x) -> Tensor", _norms, _a_number_a_sample, _norms_backward,
         _norms_save)


# ---- the loss, whose gradient comes with it ----

def _loss(s, coef, *draw):
    return sums.dsm_loss(s.detach(), coef.detach(), **_drawn(s.device, *draw))


def _loss_fake(s, *_):
    return s.new_empty((), dtype=torch.float32), _dense(s)


def _loss_save(ctx, inputs, output):
    _refuse_gradient(inputs[1])
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)


def _loss_backward(ctx, g, _):
    gradient, = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "dsm_loss has no second derivative: backward without create_graph")
    return g.to(gradient.dtype) * gradient, *[None] * 6


register(
    "dsm_loss", f"(Tensor s, Tensor coef, {COUNTER}) -> (Tensor, Tensor)",
    _loss, _loss_fake, _loss_backward, _loss_save)


# ---- the operators as functions ----

def _int64(name, word):
    """An integer as an operator takes it: of a seed or a step beyond 2^63 the same bits."""
    if not isinstance(word, (int, torch.SymInt)):
        word = integer(name, word)
    return word if -1 << 63 <= word < 1 << 63 else signed(word, 64)


def _counter(keys, **words):
    """The noise's counter as an operator takes it. TypeError names a wrong part."""
    if keys is not None:
        _require_tensors(keys=keys)
    return keys, *(_int64(name, word) for name, word in words.items())


def _require_tensors(**given):
    """TypeError for what is no tensor."""
    for name, u in given.items():
        if not isinstance(u, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(u).__name__}")


def update(operands, coef, *, counter=None, keys=None, seed=0, sample=0, step=0,
           tag=PREDICTOR, rows=None):
    """`minidiff.kernels.update` of tensors as one operator, with the operands' gradients.

    operands: a list of K tensors; coef: a tensor, as there. Its gradient is not defined.
    counter: a step counter, 0-d int64 on the operands' device, to which step is added for
      the noise; None where step is the number itself. keys: int64 (batch, 2), a seed and an
      id a row, in place of seed and sample. rows: as there.
    Returns a new tensor. RuntimeError for what requires a gradient that is not defined.

    Example:
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> y = update([x], torch.tensor([2., .1]), seed=1)
        >>> print(torch.autograd.grad(y.sum(), x)[0][0])
        tensor([2., 2., 2.])
    """
    operands = listed(operands)
    if not operands:
        raise ValueError("operands must be one tensor at least; `normal` is noise alone")
    _require_tensors(coef=coef, **{f"operands[{k}]": u for k, u in enumerate(operands)})
    draw = _counter(keys, seed=seed, sample=sample, step=step, tag=tag)
    return torch.ops.minidiff.update(operands, coef, counter, *draw, rows)


def normal(like, *, keys=None, seed=0, sample=0, step=0, tag=PRIOR):
    """z ~ N(0, I) of like's shape, dtype and device: a constant, without a gradient.

    keys, seed, sample, step, tag: as in `update`.

    Example:
        >>> print(normal(torch.ones(2, 3), seed=1).shape)
        torch.Size([2, 3])
    """
    _require_tensors(like=like)
    draw = _counter(keys, seed=seed, sample=sample, step=step, tag=tag)
    return torch.ops.minidiff.normal(like, *draw)


def noise_norms(like, *, keys=None, seed=0, sample=0, step=0, tag=PREDICTOR):
    """|z_b| of the noise that `update` draws for like's shape, float32 (batch,).

    A constant, without a gradient.

    keys, seed, sample, step, tag: as in `update`.

    Example:
        >>> print(noise_norms(torch.ones(2, 3), seed=1).shape)
        torch.Size([2])
    """
    _require_tensors(like=like)
    draw = _counter(keys, seed=seed, sample=sample, step=step, tag=tag)
    return torch.ops.minidiff.noise_norms(like, *draw)


def norms(x):
    """|x_b| of each sample, float32 (batch,), with its gradient, which is 0 at 0.

    Example:
        >>> print(norms(torch.tensor([[3., 4.], [0., 0.]])))
        tensor([5., 0.])
    """
    _require_tensors(x=x)
    return torch.ops.minidiff.norms(x)


def dsm_loss(s, coef, *, keys=None, seed=0, sample=0, step=0, tag=PERTURBATION):
    """(value, gradient) of `minidiff.kernels.dsm_loss`, value.backward() being the second.

    s: (batch, ...); coef: a tensor (batch, 3) or (3,), rows (c0, cz, w). There is no second
    derivative. keys, seed, sample, step, tag: as in `update`.

    Example:
        >>> s = torch.zeros(2, 3, requires_grad=True)
        >>> value, gradient = dsm_loss(s, torch.tensor([1., 1., .5]), seed=1)
        >>> value.backward()
        >>> print(torch.equal(s.grad, gradient))
        True
    """
    _require_tensors(s=s, coef=coef)
    draw = _counter(keys, seed=seed, sample=sample, step=step, tag=tag)
    return torch.ops.minidiff.dsm_loss(s, coef, *draw)

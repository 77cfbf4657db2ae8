"""The kernels as torch operators, torch.ops.minidiff.*: opaque to torch.compile and export, with
fake and autograd. For loops and CUDA graphs the launchers of minidiff.kernels cost less a call.

A gradient with respect to coefficients is not defined; that of an update's operand k is c_k.
Forward-mode derivatives are refused: what computes below autograd would lose a tangent unseen.
"""

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import dsm_loss, noise_norms, norms, update

DRAW = "seed", "sample", "step", "tag"
COUNTER = ", ".join(f"SymInt {word}" for word in DRAW)
LIB = torch.library.Library("minidiff", "DEF")


def register(name, signature, run, fake, backward=None, save=None):
    """Define an operator with its CPU and CUDA form, fake and autograd."""
    LIB.define(name + signature)
    for device in ("CPU", "CUDA"):
        LIB.impl(name, run, device)
    torch.library.register_fake(f"minidiff::{name}", fake, lib=LIB)
    if not backward:  # no derivative: the result is a constant, as of torch.randn_like
        LIB.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return
    # What torch.library.register_autograd registers (of torch's own functions, in 2.11 to 2.13),
    # behind a look at tangents: below, none is seen.
    recorded = make_autograd_impl(getattr(torch.ops.minidiff, name).default, Info(backward, save))

    def reverse_mode(keys, *inputs):
        _no_tangent(name, inputs)
        return recorded(keys, *inputs)
    LIB.impl(name, reverse_mode, "Autograd", with_keyset=True)


def _no_tangent(name, inputs):
    """RuntimeError where an input is a dual number of torch.func.jvp or forward_ad."""
    tensors = [u for v in inputs for u in (v if isinstance(v, (list, tuple)) else [v])]
    if forward_ad._current_level >= 0 and any(
            isinstance(u, torch.Tensor) and forward_ad.unpack_dual(u).tangent is not None
            for u in tensors):
        raise RuntimeError(f"torch.ops.minidiff.{name} has no forward-mode derivative: take "
                           "torch.autograd.grad, or the derivative of the reference's step")


def _dense(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x, *_):
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _update(operands, coef, counter, seed, sample, step, tag, rows=None):
    step = step if counter is None else counter
    return update([u.detach() for u in operands], coef.detach(), seed=seed, sample=sample,
                  step=step, tag=tag, rows=rows)


def _constant(coef):
    if coef.requires_grad:
        raise RuntimeError("coef requires grad, which is not defined: pass it detached")


def _update_save(ctx, inputs, output):
    operands, coef, counter, _, _, step, _, rows = inputs
    _constant(coef)
    ctx.n, clipped = len(operands), coef.shape[-1] - len(operands) > 3
    ctx.step, ctx.chooses = step, rows == "step" and coef.dim() == 2
    ctx.save_for_backward(coef, counter, *(operands[:2] if clipped else ()))


def _update_backward(ctx, g):
    coef, counter, *clipped = ctx.saved_tensors
    if ctx.chooses and counter is None:
        coef = coef[max(0, min(ctx.step, len(coef) - 1))]
    elif ctx.chooses:
        coef = coef.index_select(0, counter.clamp(0, len(coef) - 1).reshape(1))
    c = [c_k.reshape(-1, *[1] * (g.dim() - 1)) for c_k in coef.to(g.device).float().unbind(-1)]
    gradients = [c_k * g for c_k in c[:ctx.n]]
    if clipped:  # u1 = clip(p0 x + p1 s): what passes the clip goes on to x and s
        (x, s), (p0, p1, lo, hi) = clipped, c[-4:]
        d = p0 * x + p1 * s
        inside = gradients[1] * ((d >= lo) & (d <= hi))
        gradients[:2] = gradients[0] + p0 * inside, p1 * inside
    return [v.to(g.dtype) for v in gradients], *[None] * (len(ctx.needs_input_grad) - 1)


def _norms_backward(ctx, g):
    x, norm = ctx.saved_tensors
    g = g / norm.masked_fill(norm == 0, torch.inf)  # 0 there, as torch's
    return x * g.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def _loss_save(ctx, inputs, output):
    _constant(inputs[1])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _loss_backward(ctx, g, _):
    gradient, = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("dsm_loss has no second derivative: backward without create_graph")
    return g.to(gradient.dtype) * gradient, *[None] * 5


register("update", f"(Tensor[] operands, Tensor coef, Tensor? counter, {COUNTER}, str? rows=None)"
         " -> Tensor",
         _update, lambda operands, *_: _dense(operands[0]), _update_backward, _update_save)
register("normal", f"(Tensor like, {COUNTER}) -> Tensor", lambda like, *draw: update(
    [], [1.], out=_dense(like), **dict(zip(DRAW, draw))), _dense)
register("norms", "(Tensor x) -> Tensor", lambda x: norms(x.detach()), _rows, _norms_backward,
         lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output))
register("noise_norms", f"(Tensor like, {COUNTER}) -> Tensor",
         lambda like, *draw: noise_norms(like.detach(), **dict(zip(DRAW, draw))), _rows)
register("dsm_loss", f"(Tensor s, Tensor coef, {COUNTER}) -> (Tensor, Tensor)",
         lambda s, coef, *draw: dsm_loss(s.detach(), coef.detach(), **dict(zip(DRAW, draw))),
         lambda s, *_: (s.new_empty((), dtype=torch.float32), _dense(s)),
         _loss_backward, _loss_save)

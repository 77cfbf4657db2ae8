"""The kernels as torch operators, torch.ops.minidiff.*: opaque to torch.compile and export, with
fake and autograd. For loops and CUDA graphs the launchers of minidiff.kernels cost less a call.

A gradient with respect to coefficients is not defined; that of an update's operand k is c_k.
"""

import torch

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
    if backward:
        torch.library.register_autograd(f"minidiff::{name}", backward, setup_context=save, lib=LIB)


def _dense(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x, *_):
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _update(operands, coef, counter, *draw):
    draw = dict(zip(DRAW, draw)) | ({} if counter is None else {"step": counter})
    return update([u.detach() for u in operands], coef.detach(), **draw)


def _constant(coef):
    if coef.requires_grad:
        raise RuntimeError("coef requires grad, which is not defined: pass it detached")


def _update_save(ctx, inputs, output):
    operands, coef, counter, *_ = inputs
    _constant(coef)
    ctx.n, clipped = len(operands), coef.shape[-1] - len(operands) > 3
    ctx.save_for_backward(coef, counter, *(operands[:2] if clipped else ()))


def _update_backward(ctx, g):
    coef, counter, *clipped = ctx.saved_tensors
    if counter is not None and coef.dim() == 2:
        coef = coef.index_select(0, counter.clamp(0, len(coef) - 1).reshape(1))
    c = [c_k.reshape(-1, *[1] * (g.dim() - 1)) for c_k in coef.to(g.device).float().unbind(-1)]
    gradients = [c_k * g for c_k in c[:ctx.n]]
    if clipped:  # u1 = clip(p0 x + p1 s): what passes the clip goes on to x and s
        (x, s), (p0, p1, lo, hi) = clipped, c[-4:]
        d = p0 * x + p1 * s
        inside = gradients[1] * ((d >= lo) & (d <= hi))
        gradients[:2] = gradients[0] + p0 * inside, p1 * inside
    return [v.to(g.dtype) for v in gradients], *[None] * 6


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


register("update", f"(Tensor[] operands, Tensor coef, Tensor? counter, {COUNTER}) -> Tensor",
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

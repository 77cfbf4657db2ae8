"""The kernels as torch operators, torch.ops.minidiff.*: opaque to torch.compile and export, with
fake and autograd. For loops and CUDA graphs the launchers of minidiff.kernels cost less a call.

A gradient with respect to coefficients is not defined; that of an update's operand k is c_k.
"""

import torch

from . import dsm_loss, noise_norms, norms, update

COUNTER = "int seed, int sample, int step, int tag"
LIB = torch.library.Library("minidiff", "DEF")


def register(name, signature, run, fake, backward, save):
    """Define an operator with its CPU and CUDA form, fake and autograd."""
    LIB.define(f"{name}({signature}")
    for device in ("CPU", "CUDA"):
        LIB.impl(name, run, device)
    torch.library.register_fake(f"minidiff::{name}", fake, lib=LIB)
    if backward:
        torch.library.register_autograd(f"minidiff::{name}", backward, setup_context=save, lib=LIB)


def _update(operands, coef, clip, counter, seed, sample, step, tag):
    return update([u.detach() for u in operands], coef, clip=clip, seed=seed, sample=sample,
                  step=step if counter is None else counter, tag=tag)


def _update_save(ctx, inputs, output):
    operands, coef, clip, counter, *ctx.draw = inputs
    ctx.n, ctx.clipped, ctx.counted = len(operands), clip is not None, counter is not None
    kept = [coef] + [counter] * ctx.counted + ([clip, *operands[:2]] if ctx.clipped else [])
    ctx.save_for_backward(*kept)


def _update_backward(ctx, g):
    coef, *kept = ctx.saved_tensors
    counter = kept.pop(0) if ctx.counted else None

    def times(column, g=g):
        return torch.ops.minidiff.update([g], column, None, counter, *ctx.draw)
    gradients = [times(coef[..., k:k + 1]) for k in range(ctx.n)]
    if ctx.clipped:  # u1 = clip(p0 x + p1 s): what passes the clip goes on to x and s
        clip, x, s = kept
        at = torch.ops.minidiff.update([x, s], clip[..., :2], None, counter, *ctx.draw)
        column = [torch.ops.minidiff.update([torch.ones_like(x)], clip[..., k:k + 1], None,
                                            counter, *ctx.draw) for k in (2, 3)]
        inside = gradients[1] * ((at >= column[0]) & (at <= column[1]))
        gradients[0] = gradients[0] + times(clip[..., :1], inside)
        gradients[1] = times(clip[..., 1:2], inside)
    return gradients, None, None, None, None, None, None, None


register("update", f"Tensor[] operands, Tensor coef, Tensor? clip, Tensor? counter, {COUNTER})"
         " -> Tensor", _update, lambda operands, *_: torch.empty_like(
             operands[0], memory_format=torch.contiguous_format), _update_backward, _update_save)


def _normal(like, seed, sample, step, tag):
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    return update([], torch.ones(1), seed=seed, sample=sample, step=step, tag=tag, out=out)


register("normal", f"Tensor like, {COUNTER}) -> Tensor", _normal, lambda like, *_: torch.empty_like(
    like, memory_format=torch.contiguous_format), None, None)


def _rows(x, *_):
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _norms_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _norms_backward(ctx, g):
    x, norm = ctx.saved_tensors
    return x * (g / norm).reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


register("norms", "Tensor x) -> Tensor", lambda x: norms(x.detach()), _rows, _norms_backward,
         _norms_save)
register("noise_norms", f"Tensor like, {COUNTER}) -> Tensor",
         lambda like, seed, sample, step, tag: noise_norms(
             like.detach(), seed=seed, sample=sample, step=step, tag=tag), _rows, None, None)


def _loss_save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


register("dsm_loss", f"Tensor s, Tensor coef, {COUNTER}) -> (Tensor, Tensor)",
         lambda s, coef, seed, sample, step, tag: dsm_loss(
             s.detach(), coef, seed=seed, sample=sample, step=step, tag=tag),
         lambda s, *_: (s.new_empty((), dtype=torch.float32), torch.empty_like(
             s, memory_format=torch.contiguous_format)),
         lambda ctx, g, _: (g.to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0],
                            None, None, None, None, None), _loss_save)

"""What a caller may pass, looked at once: arrays become tensors of the same memory.

What is refused is one clear line that names the argument. torch is imported at the first
call.
"""

import sys
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np

from ..arguments import require_plain
from ..noise import MASK, integer
from .backends import backend, prepared
from .launch import dtype_name
from .threads import exact, flushes

FLOATS = "float32", "bfloat16", "float16"
ROWS = None, "sample", "step"  # what the rows of coef may be said to be
NAMES = "operands[0]", "operands[1]", "operands[2]", "operands[3]"  # four at most
# what a row of coef may hold after one number for each of 0, 1, 2, 3 or 4 operands: how
# many numbers more -> (does it draw, does it clip)
DRAWN = {1: (True, False)}
PLAIN = {0: (False, False)} | DRAWN
CLIPPED = PLAIN | {4: (False, True), 5: (True, True)}  # what is clipped is of two
HOLDS = DRAWN, PLAIN, CLIPPED, CLIPPED, CLIPPED


INSTEAD = "use the functions of minidiff.kernels.torch_ops"


def not_compiled(launcher):
    """A function that torch.compile calls and does not look into; a full graph is refused.

    torch.compiler.disable does it, once the compiler is loaded: nothing is compiled before,
    and torch is not imported for it. The marks, which are its own, are what a full graph
    prints.
    """
    disabled = None

    @wraps(launcher)
    def call(*given, **keywords):
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return launcher(*given, **keywords)
        if disabled is None:
            import torch
            disabled = torch.compiler.disable(launcher)
        return disabled(*given, **keywords)
    call._torchdynamo_disable = True
    call._torchdynamo_disable_msg = f"in a compiled graph {INSTEAD}"
    return call


def as_tensor(name, u):
    """An array or tensor as a dense tensor, a copy only where it must be."""
    import torch
    try:
        if (type(u) is torch.Tensor
                and not u.is_nested
                and torch.autograd.forward_ad._current_level < 0
                and (u.is_cpu or u.is_cuda)
                and u.layout is torch.strided
                and dtype_name(u.dtype) in FLOATS
                and u.ndim
                and u.is_contiguous()
                and u.data_ptr()
                and not u.is_neg()
                and not u.requires_grad):
            return u  # what most calls pass, looked at in a microsecond
    except RuntimeError:
        pass  # no memory, or left over from torch.func: said below
    require_plain(name, u)
    is_array = isinstance(u, np.ndarray)
    if not is_array and not isinstance(u, torch.Tensor):
        raise TypeError(
            f"{name} must be a NumPy array or a torch tensor, got {type(u).__name__}")
    if dtype_name(u.dtype) not in FLOATS:
        raise TypeError(
            f"{name} must be one of {', '.join(FLOATS)}, got {dtype_name(u.dtype)}")
    if not is_array:
        require_real(name, u)
    if not u.ndim:
        raise ValueError(f"{name} needs a first axis, the samples")
    if is_array:
        if not u.flags.carray:
            u = np.require(u, None, "CAW")
        return torch.from_numpy(u)
    if u.is_contiguous() and not u.is_neg():
        return u
    return u.resolve_neg().contiguous()


def has_tangent(u):
    """Whether a tensor is a dual number of torch.func.jvp or forward_ad."""
    from torch.autograd import forward_ad as dual
    return dual._current_level >= 0 and dual.unpack_dual(u).tangent is not None


def require_untraced():
    """TypeError where torch.func, a tracer or FakeTensorMode is at work.

    They do not see what is computed here: a tracer would keep the numbers for constants,
    and new tensors may have no memory.
    """
    import torch
    is_mode = torch._C._len_torch_dispatch_stack()
    inside = torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack()
    if is_mode and not inside:
        kinds = torch._C._TorchDispatchModeKey
        modes = map(torch._C._get_dispatch_mode, (kinds.PROXY, kinds.FAKE))
        inside = any(modes)
    if inside:
        raise TypeError("torch.func, tracers and FakeTensorMode do not see through this: "
                        "call it outside, with a whole batch; where a compiler looks "
                        f"{INSTEAD}")


def require_real(name, u):
    """TypeError or RuntimeError where a tensor has no memory to read, or a gradient."""
    import torch
    if has_tangent(u):
        raise RuntimeError(
            f"{name} carries a forward-mode tangent, which would be lost: pass it "
            "detached, or take the derivative of the reference's step")
    if u.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if not (u.is_cpu or u.is_cuda) or u.layout is not torch.strided or u.is_complex():
        raise TypeError(f"{name} must be a real dense CPU or CUDA tensor, got {u.dtype} on "
                        f"{u.device}, {u.layout}")
    is_fake = isinstance(u, torch._subclasses.FakeTensor)
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(u)
    if is_fake or is_wrapped or u.numel() and not u.data_ptr():
        raise TypeError(
            f"{name} has no memory (a fake or freed tensor); for compilers {INSTEAD}")
    if u.requires_grad:
        raise RuntimeError(
            f"{name} requires grad and this records none: pass it detached, or {INSTEAD}")


def accept(arrays, names, chosen):
    """(tensors, prepare): arrays of one kind, dtype, shape and device.

    prepare(launch) is run(step) of a `launch.Launch` on the backend chosen.
    """
    require_untraced()
    tensors = [as_tensor(name, u) for name, u in zip(names, arrays)]
    first, t0 = arrays[0], tensors[0]
    for name, u, t in zip(names, arrays, tensors):
        if t is t0:
            continue
        if u.dtype != first.dtype:  # NumPy's is not torch's
            raise TypeError(f"{name} is a {type(u).__name__} of {u.dtype}, {names[0]} a "
                            f"{type(first).__name__} of {first.dtype}")
        if t.shape != t0.shape:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, {names[0]} {tuple(t0.shape)}")
        if t.get_device() != t0.get_device():  # -1 for the CPU
            raise ValueError(f"{name} is on {t.device}, {names[0]} on {t0.device}")
    device = "cpu" if t0.is_cpu else "cuda"
    module = backend(chosen, device)
    if device not in module.TAKES:
        raise ValueError(
            f"backend {module.NAME!r} takes arrays on {module.TAKES}, not {device}")
    return tensors, partial(prepared, module, chosen)


def listed(operands):
    """The operands as a list. TypeError for one array: its rows would be the operands."""
    if hasattr(operands, "dtype") or not hasattr(operands, "__iter__"):
        raise TypeError("operands must be a list of arrays, got a "
                        f"{type(operands).__name__}: [x] for one")
    return [*operands]


def accept_update(operands, out, names, chosen):
    """(prepare, operands as tensors, the tensor to write, what is returned)."""
    import torch
    k = len(operands)
    if k > len(NAMES):
        raise ValueError(f"at most {len(NAMES)} operands, got {k}")
    if out is None and not k:
        raise ValueError("out is needed where there is no operand")
    if len(names or ()) < k:
        names = NAMES
    if out is None:
        inputs, prepare = accept(operands, names, chosen)
        target = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        return prepare, inputs, target, as_given(operands[0], target)
    inputs, prepare = accept([*operands, out], [*names[:k], "out"], chosen)
    target = inputs.pop()
    require_writable(out, target, inputs, names)
    return prepare, inputs, target, out


def place(device):
    """A torch.device, of the CPU or of a GPU that is here, or ValueError."""
    import torch
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if not count:
        raise ValueError(f"device {device}: torch {torch.__version__} finds no GPU")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"device {device}: torch finds {count}, from cuda:0 on")
    return found


def is_dense(u, t):
    """Whether a tensor is the very memory of what was given, and not a copy."""
    return u.flags.carray if isinstance(u, np.ndarray) else t is u


def require_writable(out, t, operands, names):
    """ValueError where out is strided, read-only or shares part of an operand's bytes."""
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if not is_dense(out, t):
        raise ValueError("out must be contiguous")
    for name, u in zip(names, operands):
        apart = abs(u.data_ptr() - t.data_ptr())
        if 0 < apart < t.nbytes:
            raise ValueError(
                f"out overlaps {name} in part: pass that array itself or a new one")


def tell_autograd(out):
    """A tensor has been written; arrays and None are none. A graph that had saved it then
    refuses to go back, as after torch's own in-place forms."""
    if hasattr(out, "data_ptr"):
        import torch
        torch.autograd.graph.increment_version(out)


def as_given(given, t):
    """A result in the kind of what was given."""
    return t.numpy() if isinstance(given, np.ndarray) else t


def in_float32(coef, ndmin=0):
    """Coefficients as float32. ValueError for a number that float32 cannot hold."""
    if flushes():
        with exact():
            return in_float32(coef, ndmin)
    if float(np.vdot(coef, coef)) < 1e76:  # none is beyond 1e38
        return np.array(coef, np.float32, order="C", ndmin=ndmin)
    try:
        with np.errstate(over="raise"):
            return np.array(coef, np.float32, order="C", ndmin=ndmin)
    except FloatingPointError:
        finite = coef[np.isfinite(coef)]
        largest = finite[abs(finite).argmax()]
        raise ValueError(f"coef holds {largest:g}, which is beyond float32") from None


def table(coef, like):
    """Coefficients as a dense float32 tensor of two axes or more where `like` is."""
    import torch
    if not isinstance(coef, np.ndarray):
        require_real("coef", coef)
        if coef.is_cpu and coef.dtype == torch.float64:
            coef = torch.from_numpy(in_float32(coef.numpy()))
        coef = coef.to(like.device, torch.float32).contiguous()
        return coef if coef.dim() > 1 else coef.view(1, -1)
    if coef.dtype.kind not in "fiu":
        raise TypeError(f"coef must hold real numbers, got {coef.dtype}")
    coef = torch.from_numpy(in_float32(coef, ndmin=2))
    return coef if like.is_cpu else coef.to(like.device)


class Rows(NamedTuple):
    """Coefficients, float32 (rows, width), and what a row is and holds, as in a Launch."""

    coef: Any
    kind: str
    draws: bool
    clips: bool = False


def rows_of(coef, operands, holds, like, rows=None, step=0):
    """The Rows of an update of so many operands, or ValueError.

    holds: of HOLDS. rows: "step" for a table, of which the step chooses a row; else two
    axes are one row a sample. Beside a step that is a counter it must be said.
    """
    if rows not in ROWS:
        raise ValueError(f"rows must be 'sample' or 'step', got {rows!r}")
    if not hasattr(coef, "data_ptr"):
        require_plain("coef", coef)
        try:
            coef = np.asarray(coef)
        except (ValueError, RuntimeError) as e:  # of several lengths, or with a gradient
            raise ValueError(f"coef is no array: {str(e).splitlines()[0]}") from None
    shape = tuple(coef.shape)
    batch = like.shape[0]  # len() of a tensor takes a microsecond
    if len(shape) == 2 and rows is None and not isinstance(step, int):
        raise ValueError(
            'coef has rows and step is a counter: say rows="step" where it chooses one of '
            'them, rows="sample" where each sample has its own')
    coef = table(coef, like)
    more = shape[-1] - operands if shape else None
    if more not in holds:
        widths = " or ".join(str(operands + known) for known in holds)
        raise ValueError(f"coef has shape {shape}: its last axis must be {widths} long")
    if batch and 0 in shape:
        raise ValueError(f"coef has shape {shape}: it holds no row")
    if len(shape) == 1:
        return Rows(coef, "all", *holds[more])
    if len(shape) > 2 or rows != "step" and shape[0] != batch:
        raise ValueError(f"coef has shape {shape}: one row a sample needs {batch} rows for "
                         f"operands of shape {tuple(like.shape)}")
    return Rows(coef, rows or "sample", *holds[more])


def is_counter(step):
    """Whether a step is counted, a 0-d array or tensor, and not a number."""
    return hasattr(step, "shape") and not isinstance(step, np.generic)


def noise_step(step, like, rows=None, first_step=0):
    """The noise's step as an int; as a tensor, that a launch adds first_step to, a step
    counter and a number that chooses a row."""
    if not is_counter(step):
        step = integer("step", step)
        if rows != "step":
            return step + first_step & MASK
        if abs(step) >> 62:  # beyond int64: as far out, and the same noise
            far = 1 << 62 if step > 0 else -1 << 62
            step = far + (step & MASK)
    import torch
    if isinstance(step, int):
        step = torch.tensor(step, device=like.device)
    elif not isinstance(step, torch.Tensor):
        require_plain("step", step)
        step = torch.from_numpy(step)
    if step.shape or step.dtype != torch.int64 or step.device != like.device:
        raise ValueError(
            "a step counter must be a 0-d int64 array or tensor on the operands' device, "
            f"got {step.dtype} {tuple(step.shape)} on {step.device}")
    return step

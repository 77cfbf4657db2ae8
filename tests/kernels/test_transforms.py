"""What transforms, tracers, fake tensors and compilers pass to a launcher is refused in words."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from minidiff import kernels
from minidiff.kernels import apply, normal, update

X = np.arange(6, dtype=np.float32).reshape(2, 3)
T = torch.from_numpy(X.copy())
INSTEAD = "use the functions of minidiff.kernels.torch_ops"
LAUNCHERS = {
    "update": lambda u: update([u], [1., .5]),
    "apply": lambda u: apply("langevin", u, u, eps=.1),
    "norms": lambda u: kernels.norms(u),
    "noise_norms": lambda u: kernels.noise_norms(u),
    "dsm_loss": lambda u: kernels.dsm_loss(u, [1.] * 3)[0],
    "normal": lambda u: normal(u.shape, out=u)}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_compilers_and_transforms_pass_is_refused_in_words(name):
    """Each in one line that says what to call instead; torch's own words would not."""
    f = LAUNCHERS[name]
    batch = torch.ones(5, 2, 3)
    for call in (lambda: torch.func.vmap(f)(batch),
                 lambda: torch.func.grad(lambda u: f(u).sum())(batch),
                 lambda: torch.func.functionalize(f)(batch),
                 lambda: make_fx(f)(batch),
                 lambda: torch.jit.trace(f, batch, check_trace=False)):
        with pytest.raises(TypeError, match=INSTEAD) as e:
            call()
        assert "\n" not in str(e.value).split("The above operation failed")[0].strip()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"in a compiled graph {INSTEAD}"):
        torch.compile(f, fullgraph=True, backend="eager")(batch)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_compiled_function_calls_a_launcher_as_it_is(name):
    """torch looks at the call, and at nothing below it: no frame of ours but the door's."""
    f, batch = LAUNCHERS[name], torch.ones(5, 2, 3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(torch.compile(f, backend="eager")(batch.clone()), f(batch.clone()))
    assert torch._dynamo.utils.counters["frames"]["total"] <= 4


UNSEEN = """
import numpy as np, torch
from torch._subclasses import FakeTensorMode
from minidiff import kernels as K
x, t = np.ones((2, 3), np.float32), torch.ones(2, 3)
def fake(call):
    with FakeTensorMode():
        return call()
def inside(transform):
    return lambda call: transform(lambda u: (call(), u)[1])(torch.ones(2))
def tangent(call):
    return torch.func.jvp(lambda u: (call(), u)[1], (t,), (t,))
for mode in (fake, inside(torch.func.functionalize), inside(torch.func.vmap), tangent):
    for call in (lambda: K.normal((2, 3), seed=3), lambda: K.update([x], [1., .5]),
                 lambda: K.update([x], [1., .5], out=np.empty_like(x)), lambda: K.norms(x),
                 lambda: K.update([t], [1., .5], seed=torch.arange(2)),
                 lambda: K.update([x], torch.ones(2)), lambda: K.noise_norms(t),
                 lambda: K.bind([t], [1.]), lambda: K.normal((2, 3), device="cpu")):
        try:
            mode(call)
        except TypeError as e:
            print("torch.func, tracers and FakeTensorMode" in str(e))
"""


def test_inside_fake_tensors_and_transforms_nothing_is_computed():
    """Arrays too: their tensors would have no memory there, and the process ended."""
    done = subprocess.run([sys.executable, "-c", UNSEEN], capture_output=True, text=True,
                          timeout=120)
    assert done.stdout.split() == ["True"] * 36 and not done.returncode


def test_a_nested_tensor_is_refused_in_words():
    parts = [torch.ones(2, 3), torch.ones(1, 3)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        with pytest.raises(TypeError, match=r"operands\[0\] must be a dense tensor, got a nested"):
            update([nested], [1.])


def test_tensors_without_memory_never_crash():
    """They are refused before any backend is asked for."""
    with pytest.raises(TypeError, match="dense .* on meta"):
        update([T.to("meta")], [1.])
    with pytest.raises(TypeError, match="dense .* torch.sparse_coo"):
        update([T.to_sparse()], [1.])
    with FakeTensorMode():
        fake = torch.ones(2, 3)
        with pytest.raises(TypeError, match="FakeTensorMode do not see"):
            update([fake], [1.])
    with pytest.raises(TypeError, match="no memory"):
        update([fake], [1.])


def test_a_forward_mode_tangent_is_refused_in_words():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(T, T)
        with pytest.raises(RuntimeError, match="carries a forward-mode tangent"):
            update([dual], [1.])
    with pytest.raises(TypeError, match="torch.func, tracers"):
        torch.func.jvp(lambda x: update([x], [1.]), (T,), (T,))

"""Where the backends run: on the GPU if there is one, else Triton in its interpreter."""

import os
import signal

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from untrained import model  # noqa: E402, F401

from emulator import launch  # noqa: E402
from folded import folded  # noqa: E402, F401
from minidiff import kernels  # noqa: E402
from minidiff.__main__ import main  # noqa: E402
from minidiff.kernels import driver, on_cupy  # noqa: E402

if kernels.why_not("triton") is None and not CUDA:
    from triton.runtime import interpreter

    def patch_a_module_once():
        """Triton's interpreter patches its language at each call inside a kernel.

        That is over half of its time. What is patched stays so until the kernel ends, so
        that once a module is enough.
        """
        plain, patched = interpreter._patch_lang, set()

        def patch(function):
            module = function.__globals__["__name__"]
            if module in patched:
                return None  # a call inside a kernel restores nothing
            patched.add(module)
            return plain(function)

        def run(executor, *arguments, run=interpreter.GridExecutor.__call__, **kw):
            patched.clear()
            return run(executor, *arguments, **kw)
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, run
    if hasattr(interpreter, "_patch_lang"):  # a private name, which another Triton may lack
        patch_a_module_once()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell has its background jobs ignore Ctrl-C, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tensors are small; on a busy machine threads wait for each other

GPU = "cuda" if CUDA else "cpu"
PLACES = [("torch", "cpu"), ("host", "cpu"), ("triton", GPU), ("cupy", GPU)]


@pytest.fixture
def cupy_here(monkeypatch):
    """on_cupy takes CPU tensors, and NumPy runs what NVRTC compiles."""
    if reason := launch.why_not("cupy"):
        pytest.skip(f"cupy: {reason}")
    for name, value in (("TAKES", "cpu"), ("why_not", lambda: None),
                        ("compiled", launch.compiled)):
        monkeypatch.setattr(on_cupy, name, value)
    monkeypatch.setattr(driver, "prepare", launch.prepare)


@pytest.fixture(params=PLACES + [("torch", "cuda")] * CUDA, ids="-".join)
def place(request):
    """(backend, device), for each backend but the oracle."""
    if request.param == ("cupy", "cpu"):
        request.getfixturevalue("cupy_here")
    reason = kernels.why_not(request.param[0])
    if reason:
        pytest.skip(f"{request.param[0]}: {reason}")
    return request.param


@pytest.fixture
def uncompiled(monkeypatch):
    """What torch would compile, which takes seconds, runs as it is."""
    def compile(f=None, **options):
        return f or (lambda f: f)
    monkeypatch.setattr(torch, "compile", compile)


@pytest.fixture
def refused(capsys):
    """refused(*words, argv=): the command ends with 2 and one line that holds the words."""
    def check(*words, argv):
        assert main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and all(w in error for w in words), error
    return check

"""Which backends there are, and which of them runs here."""

import warnings
from functools import cache
from importlib import import_module

BACKENDS = "numpy", "torch", "host", "triton", "cupy"


@cache
def _module(name):
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of auto, {', '.join(BACKENDS)}")
    return import_module(f".on_{name}", __package__)


def why_not(name):
    """Why a backend cannot run on this machine and how to mend it, or None."""
    return _module(name).why_not()


def backend(name="auto", device="cpu"):
    """The backend's module, by name, or the fastest for "cpu" or "cuda".

    A named backend never falls back: RuntimeError says what to install.
    """
    if name != "auto":
        module = _module(name)
        if reason := module.why_not():
            raise RuntimeError(f"backend {name!r}: {reason}")
        return module
    fast = ("triton", "cupy") if device == "cuda" else ("host",)
    for name in fast:
        module = _module(name)
        if not module.why_not():
            return module
    warnings.warn(f"backend 'torch' instead of {fast[0]}: {why_not(fast[0])}", stacklevel=2)
    return backend("torch")  # right, not fast

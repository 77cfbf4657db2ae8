"""Which backends there are, and which of them runs here."""

import sys
import warnings
from functools import cache, partial
from importlib import import_module

from .launch import NotCompiled

BACKENDS = "numpy", "torch", "host", "triton", "cupy"


_module_of = cache(import_module)


def _module(name):
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of auto, {', '.join(BACKENDS)}")
    return _module_of(f".on_{name}", __package__)


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
    instead_of(fast[0], why_not(fast[0]))
    return backend("torch")


def prepared(module, chosen, launch):
    """run(step) of a Launch on a backend's module.

    Where `auto` chose one that cannot compile it, torch's. Where a name did, RuntimeError.
    """
    try:
        if hasattr(module, "prepare"):
            return module.prepare(launch)
    except NotCompiled as e:
        if chosen != "auto":
            raise RuntimeError(f"backend {module.NAME!r}: {e}") from e
        instead_of(module.NAME, e)
        module = _module("torch")
    return partial(module.update, launch)


def instead_of(name, reason):
    """Say that torch computes in place of a backend: right, not fast."""
    warn(f"backend 'torch' instead of {name}: {reason}")


def warn(text):
    """A warning that points at the user's line, the last one outside this package."""
    package = __package__.partition(".")[0]
    ours = f"{package}.", "torch._dynamo."  # the second may stand between two of ours
    frame = sys._getframe(1)
    level = 2
    while frame and f"{frame.f_globals.get('__name__')}.".startswith(ours):
        frame = frame.f_back
        level += 1
    warnings.warn(text, stacklevel=level)

"""The contract composed of torch operations, on any device: correct, not fast.

The noise is minidiff.noise on tensors. Only `*`, `+` and `where` on floats: add(alpha=),
addcmul and lerp contract.
"""

try:
    import torch
except ImportError:
    torch = None

from . import threads
from .on_numpy import composed

NAME = "torch"
TAKES = "cpu, cuda"


def why_not():
    """None, or how to get torch."""
    return None if torch else "torch is not installed: pip install torch"


def chosen(coef, step):
    """The row of a table that a counter chooses, (1, width); coef[step] would wait."""
    row = step.clamp(0, len(coef) - 1)
    return coef.index_select(0, row.reshape(1))


@threads.exact()
def update(launch, step):
    """Run a `launch.Launch`; nothing waits for a step counter's value."""
    coef = chosen(launch.coef, step) if launch.rows == "step" else launch.coef
    u = [v.float() for v in launch.operands]
    e, squares = composed(launch, coef, u, step, torch, launch.out.device)
    if launch.writes():
        launch.out.copy_(e)
    return squares

"""An engine is one run: it draws the noise of a step once.

Noise is a function of seed, sample, step and tag, so whoever asks twice gets the same
numbers twice. Two steps of a chain that share their noise are not independent, and nothing
shows it. So an engine remembers which steps it has drawn, and refuses to draw one again.
Next: `samplers.Reference` and `kernels.Fused`, the two engines.
"""

from threading import Lock

import numpy as np

from .affine import operands
from .noise import CORRECTOR, TAGS, are_numbers, named

LARGEST = float(np.finfo(np.float32).max)  # what a kernel can take


def draws(step, row):
    """Whether a step adds noise: its coefficient of z is not 0 in every row."""
    names = operands(step)
    of_z = row[..., len(names) - 1]
    return names[-1] == "z" and bool(of_z.any())


def tag_name(tag):
    """What a message calls a tag: PREDICTOR, CORRECTOR + 1."""
    if tag > CORRECTOR:
        return f"CORRECTOR + {tag - CORRECTOR}"
    return TAGS.get(tag, f"tag {tag}")


def at(k, parameters):
    """Those of step k: of an array (N,) its own, of a number that."""
    return {name: v[k] if np.ndim(v) else v
            for name, v in parameters.items()}


def usable(eps, xp):
    """Step sizes of a corrector, 0 where a score of 0 makes them infinite.

    There the rule gives no length, and x stays. NaN stays NaN.
    """
    return xp.where(eps > LARGEST, xp.zeros_like(eps), eps)


def overlap(a, b):
    """Whether two ranges have a number in common."""
    return a.start < b.stop and b.start < a.stop


class Engine:
    """The noise of one run, and which of its steps have been drawn.

    seed, sample: numbers, or arrays with an integer a row of x (`noise.keys`); a number
    sample is the id of x's first row. normal(shape, k, tag), if given, is the source of
    noise instead; then nothing is claimed.

    by_row: whether rows have seeds or ids of their own. claimed: {tag: ranges of steps}.
    A loop claims its steps before it draws, so that a second loop does not draw the same
    noise again unseen. A copy has drawn nothing: it is another run of the same noise.
    """

    def __init__(self, seed=0, sample=0, normal=None):
        self.seed, self.sample = named(seed, sample)
        self.normal = normal
        self.by_row = not are_numbers(self.seed, self.sample)
        vars(self).update(self.fresh())

    def fresh(self):
        """What a run starts with: a copy has its own."""
        return {"claimed": {}, "lock": Lock()}

    def __getstate__(self):
        fresh = self.fresh()
        return {name: v for name, v in vars(self).items()
                if name not in fresh}

    def __setstate__(self, state):
        vars(self).update(state | self.fresh())

    def require_one_seed(self, name):
        """ValueError where rows have seeds of their own, and `name` couples them."""
        if self.by_row:
            raise ValueError(
                f"{name} computes with the whole batch, so that no sample follows from its "
                "own seed: give the engine a number for seed and for sample")

    def whole(self, s):
        """The score itself; an engine of `guidance.guide` puts a pair together."""
        return s

    def require_new(self, tags, steps):
        """ValueError where this engine has drawn one of the steps, a range, with a tag."""
        for tag in tags:
            drawn = [s for s in self.claimed.get(tag, [])
                     if overlap(steps, s)]
            if drawn:
                first = min(s.start for s in drawn)
                last = max(s.stop for s in drawn) - 1
                end = max(s.stop for t in tags
                          for s in self.claimed.get(t, []))
                raise ValueError(
                    f"this engine has drawn {tag_name(tag)} steps {first}–{last}. Go on: "
                    f"first_step={end}. Other samples: a new engine with sample= or seed=. "
                    "The same noise again: a new engine.")

    def claim(self, tag, steps):
        """The first of these steps, a range, which are now drawn; 0 where there are none.

        ValueError where this engine has drawn one of them with this tag.
        """
        if not steps:
            return 0
        if not isinstance(steps, range) or steps.step != 1:
            raise ValueError(f"steps must be a range, one after the other, got {steps}")
        first = steps.start
        if first < 0 or steps.stop > 1 << 32:
            raise ValueError(f"first_step: steps are counted from 0 to 2^32 - 1, got "
                             f"{first} to {steps.stop - 1}")
        if self.normal:
            return first
        with self.lock:
            self.require_new([tag], steps)
            drawn = self.claimed.setdefault(tag, [])
            if drawn and drawn[-1].stop == first:
                steps = range(drawn.pop().start, steps.stop)
            drawn.append(steps)
        return first

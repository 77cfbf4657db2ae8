"""Wrong, broken and dishonest kernels: each is refused, and for the right reason."""

import re

import pytest
from kernel_files import HEAD, said, source

from minidiff.kernels.check.yours import apart, host
from minidiff.kernels.check.yours.apart import check

GIVEN, DRAWS = "x, s, z, coef", "x, s, coef, seed, sample, step, tag"
OUT = "x, s, z, coef, out"
DRAWN = "return right(x, s, noise.normal(x.shape, seed, sample, step, tag), coef)"
PAIRS = """
w = noise.words(x.shape, seed, sample, step, tag)
u = (w[..., ::2] + .5) * 2.**-32
angle = w[..., 1::2]
r = noise.radius(w[..., ::2])
r = np.where(angle >> 31 & 1, -r, r)
cos, sin = noise.cos_sin(angle)
LINE
z = np.stack((r * cos, r * sin), -1).reshape(w.shape).astype(np.float32)
return right(x, s, noise.elements(z, x.shape), coef)
"""

# name: (arguments, body, what the first failed row must say)
WRONG = {
    # arithmetic
    "fused": (GIVEN, "a, b, c = columns(x, coef)\n"
              "return noise.fma(c, z, noise.fma(b, s, a * x))", "fused multiply-add gives"),
    "first product fused": (GIVEN, "a, b, c = columns(x, coef)\n"
                            "return noise.fma(a, x, b * s) + c * z", "enable_fp_fusion=False"),
    "float64": (GIVEN, "return right(*(t.astype(float) for t in (x, s, z, coef))).astype('f')",
                "computed in float64"),
    "order": (GIVEN, "a, b, c = columns(x, coef)\nreturn a * x + (b * s + c * z)",
              "another order"),
    "flushed": (GIVEN, "r = right(x, s, z, coef)\nr[abs(r) < 2**-126] *= 0\nreturn r",
                "subnormals flushed"),
    "inputs flushed": (GIVEN, "x, s, z, coef = (np.where(abs(t) < 2**-126, 0 * t, t) "
                       "for t in (x, s, z, coef))\nreturn right(x, s, z, coef)",
                       "subnormals flushed"),
    "minus zero": (GIVEN, "return right(x, s, z, coef) + np.float32(0)", "sign of zero"),
    "zero skipped": (GIVEN, "a, b, c = columns(x, coef)\n"
                     "return np.where(a == 0, 0, a * x) + np.where(b == 0, 0, b * s) + c * z",
                     "NaN lost"),
    # what is read
    "row 0": (GIVEN, "return right(x, s, z, coef.reshape(-1, 3)[:1])" , "row 0's coefficients"),
    "row before": (GIVEN, "return right(x, s, z, np.roll(coef, 1, 0) if coef.ndim > 1 else coef)",
                   "coefficients of the row before"),
    "z alone": ("z", "return z", "elements differ"),
    # the counter
    "high word": (DRAWS, "seed &= 0xFFFFFFFF\n" + DRAWN, "high word of the seed ignored"),
    "int64": (DRAWS, "seed &= ~(1 << 63)\n" + DRAWN, "bit 63 of the seed lost"),
    "no sample": (DRAWS, "sample = 0\n" + DRAWN, "sample ignored"),
    "int32 step": (DRAWS, "step &= ~(1 << 31)\n" + DRAWN, "bit 31 of step lost"),
    "no tag": (DRAWS, "tag = 0\n" + DRAWN, "tag ignored"),
    "exchanged": (DRAWS, "step, tag = tag, step\n" + DRAWN, "step and tag exchanged"),
    "next step": (DRAWS, "step += 1\n" + DRAWN, "step off by one"),
    "hard-coded": ("x, s, coef", "return right(x, s, noise.normal(x.shape, 1, 2, 3, 4), coef)",
                   "cannot be the counter's"),
    "no wrap": (DRAWS, """
if sample + len(x) > 2**32: sample = 2**32 - 1
""" + DRAWN, "elements differ"),
    # the noise's stages
    "cos for sin": (DRAWS, PAIRS.replace("LINE", "cos, sin = sin, cos"), "cos and sin exchanged"),
    "sign": (DRAWS, PAIRS.replace("LINE", "r = abs(r)"), "radius's sign"),
    "radius": (DRAWS, PAIRS.replace("LINE", "r = r / np.float32(2**.5)"), "is the radius"),
    "angle": (DRAWS, PAIRS.replace("LINE", "cos, sin = np.cos(u), np.sin(u)"), "the angle"),
    "words": (DRAWS, PAIRS.replace("step, tag)", "tag ^ step, 77)").replace("LINE", ""),
              "is the words"),
    "library": (DRAWS, PAIRS.replace("LINE", "r = np.sign(r) * np.sqrt(-2 * np.log(u))"),
                "right to about three digits"),
    # where
    "one block": (GIVEN, "r = right(x, s, z, coef)\nr.ravel()[1024:] = 0\nreturn r",
                  "wrong from element 1024 on"),
    "grid": (GIVEN, "r = right(x, s, z, coef)\nr[65535:] = 0\nreturn r", "from element 196605 on"),
    "block": (GIVEN, "r = right(x, s, z, coef)\nr.reshape(len(r), -1)[:, 65536:] = 0\nreturn r",
              "from element 65536 on"),
    "rest": (GIVEN, "r = right(x, s, z, coef)\nn = r.size // 4 * 4\nr.ravel()[n:] = 0\nreturn r",
             "elements differ"),
    "last": (GIVEN, "r = right(x, s, z, coef)\nif r.size > 9: r.flat[5] = 0\nreturn r",
             "element 5 of"),
    # what may not be touched
    "beyond": (OUT, "out[...] = right(x, s, z, coef)\nput(out, out.size, 1e9)",
               "wrote up to 4 bytes beyond the end of out"),
    "before": (OUT, "out[...] = right(x, s, z, coef)\nput(x, -2, 1e9)",
               "wrote from 8 bytes before the start of x"),
    "far": (GIVEN, "put(z, z.size + 30_000, 1e9)\nreturn right(x, s, z, coef)",
            "beyond the end of z"),
    "in place": (OUT, "a, b, c = columns(x, coef)\nnp.multiply(b, s, out=out)\n"
                 "out[...] = (a * x + out) + c * z", "in place: "),
    "x": (GIVEN, "x[...] = right(x, s, z, coef)\nreturn x", "changed x"),
    "s": (GIVEN, "r = right(x, s, z, coef)\ns *= 0\nreturn r", "changed s"),
    "z": (GIVEN, "r = right(x, s, z, coef)\nz += 1\nreturn r", "changed z"),
    "coef": (GIVEN, "r = right(x, s, z, coef)\ncoef += 1\nreturn r", "changed coef"),
    "s in place": (OUT, "r = right(x, s, z, coef)\ns *= 0\nout[...] = r", "changed s"),
    # what is returned
    "stale": (GIVEN, "key = x.shape, coef.shape\nr = right(x, s, z, coef)\n"
              "return kept.setdefault(key, r) if len(x) > 9999 else r", "elements differ"),
    "untouched": (OUT, "return out", "elements differ"),
    "half": (OUT, "out[:1] = right(x, s, z, coef)[:1]", "elements differ"),
    "float64s": (GIVEN, "return right(x, s, z, coef).astype(float)",
                 r"returned float64 \(0, 3\), not float32 \(0, 3\)"),
    "flat": (GIVEN, "return right(x, s, z, coef).ravel()",
             r"returned float32 \(0,\), not float32 \(0, 3\)"),
    "nothing": (GIVEN, "right(x, s, z, coef)", "returned a NoneType"),
    "two": (GIVEN, "return [right(x, s, z, coef)] * 2, 0", "returned 2 results, not 1"),
    "a list": (GIVEN, "return right(x, s, z, coef).tolist()", "returned a list"),
    "lucky": (GIVEN, "r = right(x, s, z, coef)\nif r.size: r.flat[0] += np.random.rand()\n"
              "return r", "elements differ"),
    "another": (GIVEN, "global calls\ncalls += 1\nr = right(x, s, z, coef)\n"
                "return r + 1 if calls % 2 == 0 else r", "called again"),
    "late": (GIVEN, "global calls\ncalls += 1\n"
             "return right(x, s, z, coef) if calls < 150 else x", "many small ones"),
    # how it ends
    "raises": (GIVEN, "return 1 / 0", r"ZeroDivisionError: division by zero \(.*wrong.py, line"),
    "exits": (GIVEN, "sys.exit(0)", r"SystemExit: 0 \(.*wrong.py, line"),
    "interrupts": (GIVEN, "raise KeyboardInterrupt", "KeyboardInterrupt"),
    "leaves": (GIVEN, "os._exit(0)", "ended its process with exit status 0, called with x, s, z"),
    "crashes": (GIVEN, "ctypes.string_at(0)", r"crashed in .*wrong.py, line \d+ \(SIGSEGV\)"),
    "aborts": (GIVEN, "os.abort()", r"crashed in .*wrong.py, line \d+ \(SIGABRT\)"),
    "harms and crashes": (GIVEN, "put(s, s.size, 1e9)\nctypes.string_at(0)",
                          r"crashed.*, after it wrote up to 4 bytes beyond the end of s"),
    "killed": (GIVEN, "os.kill(os.getpid(), signal.SIGKILL)", "was killed"),
    "later": (GIVEN, "threading.Timer(.01, os._exit, [0]).start()\ntime.sleep(.02)\n"
              "return right(x, s, z, coef)", "ended its process with exit status 0"),
    "silent": (GIVEN, "os.closerange(3, 500)\ntime.sleep(60)", "answered no more|SIGKILL|ended"),
    "sleeps": (GIVEN, "time.sleep(60)", "takes more than 5 s"),
    "everyday seed": (DRAWS, "seed |= 1 << 63\n" + DRAWN, "elements differ"),
    "everyday step": (DRAWS, "step |= 1 << 31\n" + DRAWN, "elements differ"),
    "seed or": (DRAWS, "seed = seed or 12345\n" + DRAWN, "elements differ"),
    "out is x": (OUT, "r = right(x, s, z, coef)\nout[...] = r * 0 if out is x else r",
                 "in place: .*elements differ"),
    "operands": ("x, s, z, coef", "return right(s, x, z, coef)", "operands, or their coefficients"),
    "coefficients": (GIVEN, "return right(x, s, z, coef[..., [1, 0, 2]])",
                     "operands, or their coefficients"),
    "masked": (GIVEN, "return np.ma.masked_all_like(right(x, s, z, coef))",
               "returned a MaskedArray"),
    "second crash": (GIVEN, "global calls\ncalls += 1\nif calls > 1: ctypes.string_at(0)\n"
                     "return right(x, s, z, coef)",
                     r"\(SIGSEGV\), called with x, s, z, coef; None"),
    "half an answer": (GIVEN, "for fd in range(3, 500):\n"
                       "    try: os.write(fd, b'{')\n    except OSError: pass\n"
                       "time.sleep(60)", "takes more than 5 s"),
    "empty answer": (GIVEN, "import socket, stat\nfor fd in range(3, 500):\n"
                     "    try:\n        if stat.S_ISSOCK(os.fstat(fd).st_mode): "
                     "os.write(fd, b'{}\\n')\n    except OSError: pass\n"
                     "return right(x, s, z, coef)", "said what is no answer"),
    "shrinks": (GIVEN, "for fd in range(3, 500):\n    try: os.ftruncate(fd, 0)\n"
                "    except OSError: pass\nreturn x", "elements differ"),
    "a child": (GIVEN, "if os.fork() == 0: time.sleep(60)\nctypes.string_at(0)", "SIGSEGV"),
    "escapes": (GIVEN, "raise ValueError('\\x1b[2J' + 'x' * 2**21)", r"ValueError: \?\[2Jx+ \("),
    "forges": (GIVEN, "for fd in range(3, 500):\n"
               "    try: os.write(fd, b'\\0\\0\\0\\x0e{\"results\": 0}')\n"
               "    except OSError: pass\nos._exit(0)", "ended its process|is no answer"),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """{kind: its failed rows} of a check of all of them, one file."""
    file = tmp_path_factory.mktemp("wrong") / "wrong.py"
    file.write_text(source(WRONG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "BEYOND", [(70_001, 3), (70_001, 3), (1, 2**17 + 3)])
        patch.setattr(apart, "SECONDS", .4)
        patch.setattr(apart, "LIMIT", 5.)
        patch.setattr(host, "LIMIT", 5.)
        rows = list(check([file], seed=1))
    names = [f"{file}:langevin_v{k}" for k in range(len(WRONG))]
    found = {name: [] for name in names}
    for row in rows:
        if not row["passed"]:
            found[row["backend"]].append(row)
    return dict(zip(WRONG, found.values()))


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_is_refused_for_the_right_reason(kind, verdicts):
    failed = verdicts[kind]
    assert failed
    assert any(re.search(WRONG[kind][2], said(row)) for row in failed), said(failed[0])


@pytest.mark.parametrize("kind", ["flushed", "minus zero", "zero skipped"])
def test_a_shape_is_tried_on_all_that_fails(kind, tmp_path):
    (tmp_path / "mine.py").write_text(source({kind: WRONG[kind]}))
    failed = [r for r in check([tmp_path / "mine.py"], shapes=[(16, 37)]) if not r["passed"]]
    assert any(re.search(WRONG[kind][2], said(row)) for row in failed)


# ---- 16 bits, clips, sums ----

MORE = HEAD + """
ARRAYS = "torch"
import torch
def columns(x, coef):
    return [k.reshape(-1, *[1] * (x.ndim - 1)) for k in coef.unbind(-1)]
def langevin_v1(x, s, z, coef):
    r = right(x.float(), s.float(), z, coef)
    return (r.view(torch.int32) & -65536).view(torch.float32).bfloat16()
def langevin_v2(x, s, z, coef):
    a, b, c = (k.to(x.dtype) for k in columns(x, coef))
    return (a * x + b * s) + c * z.to(x.dtype)
def langevin_v3(x, s, z, coef):
    r = right(x.float(), s.float(), z, coef)
    i = r.view(torch.int32)
    return torch.where(r.isfinite(), (i + 0x8000 & -65536).view(torch.float32), r).bfloat16()
def ddpm_clipped_v1(x, s, z, coef, clip):
    return clipped(x, s, z, coef, clip, lambda d, lo, hi: d.clamp(-1., 1.))
def ddpm_clipped_v2(x, s, z, coef, clip):
    def clip_it(d, lo, hi):
        return torch.fmin(torch.fmax(d, lo), hi)
    return clipped(x, s, z, coef, clip, clip_it)
def ddpm_clipped_v3(x, s, z, coef, clip):
    clip *= 1.5
    return clipped(x, s, z, coef, clip, torch.clamp)
def clipped(x, s, z, coef, clip, how):
    a, b, c = columns(x, coef)
    p0, p1, lo, hi = columns(x, clip)
    d = how(p0 * x.float() + p1 * s.float(), lo, hi)
    return ((a * x.float() + b * d) + c * z).to(x.dtype)
def noise_norms_v1(shape, seed, sample, step, tag):
    z = noise.normal(shape, seed & 0xFFFFFFFF, sample, step, tag)
    return np.sqrt((z.astype(float)**2).sum(tuple(range(1, z.ndim)))).astype("f")
def noise_norms_v2(x, keys, step, tag):
    z = noise.normal(tuple(x.shape), keys[:, 0].numpy() * 0 + 7, keys[:, 1].numpy(), step, tag)
    return np.sqrt((z.astype(float)**2).sum(tuple(range(1, z.ndim)))).astype("f")
def dsm_loss_v1(s, z, coef):
    e = right(s, s, z, torch.stack((coef[:, 0], coef[:, 0] * 0, coef[:, 1]), 1))
    return (coef[:, 2] * e.square().flatten(1).sum(1)).sum(), e
"""


@pytest.mark.parametrize("name, dtype, words", [
    ("langevin_v1", "bfloat16", "truncated, not rounded"),
    ("langevin_v2", "bfloat16", "computed in bfloat16"),
    ("langevin_v3", "bfloat16", "ties rounded away"),
    ("ddpm_clipped_v1", "float32", "elements differ"),
    ("ddpm_clipped_v2", "float32", "NaN lost in the clip"),
    ("ddpm_clipped_v3", "float32", "changed clip"),
    ("noise_norms_v1", "float32", "high word of the seed"),
    ("noise_norms_v2", "float32", "cannot be|elements differ"),
    ("dsm_loss_v1", "float32", "gradient: .*differ")])
def test_a_wrong_kernel_of_another_op_is_refused(name, dtype, words, tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "BEYOND", [(300, 5)])
    file = tmp_path / "more.py"
    body = re.sub(r"(?ms)^def \w+_v\d\(.*?(?=^def |\Z)",
                  lambda m: m[0] if f"def {name}(" in m[0] else "", MORE)
    file.write_text(body)
    failed = [row for row in check([file], dtypes=[dtype]) if not row["passed"]]
    assert any(re.search(words, said(row)) for row in failed), failed[:1]

"""Every kernel compiled with no GPU: for sm_80, 90, 100 and 120 its machine code is read, for
sm_90 its PTX is run by NumPy.

Triton compiles only outside its interpreter, so in another process: this file, run.
"""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from emulator import launch
from folded import LARGE, last_normals
from minidiff.bench.device import compiled
from minidiff.bench.device.correct import ROOTS
from minidiff.bench.device.speed import COUNTED
from minidiff.kernels import on_cupy, on_host, on_numpy, on_triton
from minidiff.kernels.check import words
from minidiff.kernels.check.compare import compare, ulps
from minidiff.kernels.check.words import check_words
from minidiff.kernels.launch import Launch, Result

try:
    import triton
    TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
except ImportError:
    TOOL = None
needs_triton = pytest.mark.skipif(TOOL is None, reason="triton is not installed")
no_nvrtc = launch.why_not("cupy")
needs_nvrtc = pytest.mark.skipif(no_nvrtc is not None, reason=str(no_nvrtc))
# dtype, operands, draws, clip or sums or terms, coefficients, elements of a row, aligned
VARIANTS = [
    ("float32", 0, 1, 0, "call", 1024, 1), ("float32", 1, 1, 0, "call", 1024, 1),
    ("float32", 2, 1, 0, "call", 1024, 1), ("float32", 2, 1, 1, "sample", 1024, 1),
    ("float32", 4, 1, 1, "counter", 1024, 1), ("float32", 2, 0, 0, "call", 1024, 1),
    ("float32", 3, 0, 0, "counter", 1024, 1), ("float32", 2, 1, 0, "call", 1023, 0),
    ("float32", 1, 1, 0, "sample", 2, 0),
    ("bfloat16", 0, 1, 0, "call", 1024, 1), ("bfloat16", 1, 1, 0, "call", 1024, 1),
    ("bfloat16", 2, 1, 0, "sample", 1024, 1), ("bfloat16", 3, 1, 1, "call", 1024, 1),
    ("bfloat16", 4, 0, 0, "counter", 1024, 1), ("bfloat16", 2, 1, 0, "counter", 1023, 0),
    ("float16", 1, 1, 0, "counter", 1024, 1), ("float16", 2, 1, 1, "call", 1024, 1),
    ("float16", 2, 0, 0, "sample", 1024, 1), ("float16", 4, 1, 1, "sample", 7, 0),
    ("float32", 1, 1, "sums", "sample", 1024, 1), ("bfloat16", 1, 0, "sums", "call", 1024, 1),
    ("float16", 0, 1, "sums", "call", 1024, 1),
    ("float32", 0, 1, 0, "call keys", 1024, 1), ("float32", 1, 1, 0, "call keys", 1024, 1),
    ("float32", 2, 1, 0, "call keys", 1024, 1), ("bfloat16", 0, 1, 0, "call keys", 1024, 1),
    ("bfloat16", 1, 1, 0, "call keys", 1024, 1), ("bfloat16", 2, 1, 0, "call keys", 1024, 1),
    ("float32", 2, 1, 1, "call", 1024, 1), ("float32", 2, 1, 1, "call keys", 1024, 1),
    ("float32", 2, 1, 0, "sample", 1024, 1), ("float32", 2, 1, 0, "counter", 1024, 1),
    ("float32", 2, 1, 1, "sample keys", 7, 0), ("float16", 1, 1, 0, "counter keys", 1024, 1),
    ("float32", 1, 1, "sums", "sample keys", 2, 0), ("float32", 0, 1, 0, "call keys", 64, 1),
    ("float32", 1, 1, "terms", "call", 1024, 1), ("float32", 1, 1, "terms", "call keys", 7, 0),
    ("bfloat16", 1, 1, "terms", "call", 1024, 1)]
MACROS = [(True, dtype, *variant) for dtype in on_host.STORAGE for variant in (
    (0, 1, 0), (1, 1, 0), (2, 0, 0), (2, 1, 1), (4, 1, 1),
    (1, 1, 0, 2), (1, 0, 0, 1), (0, 1, 0, 1), (1, 1, 0, 4),
    (0, 1, 0, 0, 1), (2, 1, 1, 0, 1), (1, 1, 0, 2, 1), (1, 1, 0, 4, 1))]
WRITTEN = 18  # fused multiply-adds of two normals: the radius' 10, its root's 2, the angle's 6
# Issue slots an element may take on sm_90, where rows are aligned: what was counted, and a little
SLOTS = {("triton", "float32"): (32.3, 36., 39.), ("triton", "bfloat16"): (32.2, 37.3, 41.8),
         ("cuda", "float32"): (31.8, 34.5, 37.4), ("cuda", "bfloat16"): (31.3, 35.3, 39.5)}
# With a seed a row: a thread of CUDA C has one row, one of Triton's several, each with keys
KEYED_SLOTS = {("triton", "float32"): (35.7, 39.6, 44.3),
               ("triton", "bfloat16"): (36.8, 41.1, 47.2),
               ("cuda", "float32"): (31.7, 34.5, 37.2), ("cuda", "bfloat16"): (31.3, 35.4, 39.5)}
ARCHITECTURES = 80, 90, 100, 120
ELSEWHERE = 1.5  # slots more, at most, than on sm_90
# Slots more that these Tritons take at most, by their moves of registers; the bits are the same
MORE = {"3.7.1": 2.3, "3.8.0": .5}


def roots(code):
    """The roots that a function takes, as expressions of their argument x: what FFMAs make of
    MUFU.RSQ, and no later FFMA makes more of; up to the function's end."""
    value, found = {}, []
    for n, line in enumerate(code[:code.index("EXIT")]):
        name, *operands = re.split(r",?\s+", line)
        if name == "MUFU.RSQ":
            value[operands[1]] = f"x{n}"
        given = [re.sub(r"R\d+", lambda r: value.get(r[0], r[0]), o) for o in operands[1:]]
        name = name.removesuffix(".FTZ")
        made = f"{name}({', '.join(sorted(given[:2]) + given[2:])})"
        known = name == "MUFU.RSQ" or name in ("FMUL", "FFMA") and "RSQ" in made
        value[operands[0]] = made if known else f"{n}"
        if known and made.count("FFMA") == 2:
            found.append(re.sub(r"x\d+", "x", made))
    return found


def differs(backend, dtype, operands, draws, clip, sums, rows, shape, shift=0, ones=False):
    """What a backend's update makes otherwise than NumPy's, a line each; with special values
    among the operands, tensors that start `shift` elements off, in place as well; `ones` for
    seed, sample, step and tag, which a compiler may take for constants."""
    storage, rng = getattr(torch, dtype), np.random.default_rng(0)

    def place(values):
        return torch.empty(values.size + shift, dtype=storage)[shift:].view(shape).copy_(
            torch.from_numpy(values))
    u = [rng.standard_normal(shape, np.float32) for _ in range(operands)]
    for values in u[:1] * (not sums):
        values.flat[:5] = np.array([-0., 1e-40, np.inf, -np.inf, np.nan])[:values.size]
    width = operands + draws + 4 * clip + (sums == 2)
    step = {"before": -2, "end": 4, "counter": 6}.get(rows.split()[0], 1 if ones else 5)
    coef = rng.standard_normal((
        {"call": 1, "counter": 4, "before": 4, "end": 4}.get(rows.split()[0], shape[0]), width))
    kind = "sample" if "sample" in rows else "all" if "call" in rows else "step"
    seed, sample, tag = (1, 1, 1) if ones else (2**40 + 3, 2**32 - 2, 1)
    keys = torch.from_numpy(rng.integers(-2**63, 2**63, (shape[0], 2))) if "keys" in rows else None
    u = [place(v) for v in u]
    got, want = (place(np.full(shape, np.float32(np.nan))) for _ in "12")
    case = Launch(got, u, torch.from_numpy(coef.astype(np.float32)), kind, bool(draws), bool(clip),
                  sums, seed, sample, tag, 2**31 + 7, keys)
    counter = torch.tensor(step) if kind == "step" or "counter" in rows else step
    total = backend.prepare(case)(counter)
    exact = on_numpy.update(case._replace(out=want), counter)
    lines = []
    if sums and not torch.allclose(total, exact, rtol=1e-12, atol=0):
        lines.append(f"sums {total} and not {exact}")
    if u and case.writes():
        backend.prepare(case._replace(out=u[0]))(counter)
    for out in [got, *u[:1] * case.writes()]:
        found = compare("update", backend.NAME, dtype, shape, out, want,
                        part=f"{rows}, shift {shift}")
        lines += [] if found["passed"] else [found["reason"]]
    return lines


def last_differs(backend, shape):
    """Whether the last block makes the end of more than 2^31 elements otherwise, in place."""
    x = torch.empty(shape, dtype=torch.bfloat16)  # pages that are not touched take no memory
    end, z = last_normals(x, seed=7, sample=1)
    end.copy_(torch.randn(end.shape))
    want = (.5 * end.float() + z).bfloat16()
    coef = torch.tensor([[.5, 1.]])
    backend.prepare(Launch(x, [x], coef, "all", True, False, Result.STATE, 7, 1, 0))(0)
    return not torch.equal(end, want)


# ---- Triton, in another process ----

def unnoticed(*case):
    """Which of the barriers of an update's PTX may lack and nothing tells, and how many it has."""
    run, found = launch.run, []

    def lacks(i):
        def changed(text, *a):
            found[:] = [m.span() for m in re.finditer(r"bar\.sync\s+0;", text)]
            run(text[:found[i][0]] + text[found[i][1]:], *a)
        launch.run = changed
        try:
            return not differs(on_triton, *case)
        except RuntimeError as e:
            return "race" not in str(e)
        finally:
            launch.run = run
    first = [0] if lacks(0) else []
    return first + [i for i in range(1, len(found)) if lacks(i)], len(found)


def result_of(operands, draws, clip):
    """What a variant leaves."""
    if clip == "terms":
        return Result.TERMS
    both = Result.GRADIENT if operands and draws else Result.SQUARES
    return both if clip == "sums" else Result.STATE


def of_variant(dtype, operands, draws, clip, rows, size, aligned):
    """A variant's Launch, and its counter or None."""
    sums = result_of(operands, draws, clip)
    x = torch.zeros(5, size, dtype=getattr(torch, dtype))
    kind, n = next((kind, n) for word, kind, n in (
        ("call", "all", 1), ("sample", "sample", 5), ("counter", "step", 4)) if word in rows)
    coef = torch.zeros(n, operands + draws + 4 * (clip == 1) + (sums == Result.GRADIENT))
    keys = torch.zeros(5, 2, dtype=torch.int64) if "keys" in rows else None
    made = Launch(x, [x] * operands, coef, kind, bool(draws), clip == 1, sums, 7, 1, 2, keys=keys)
    return made, torch.tensor(1) if "counter" in rows else None


def read_for(architecture):
    """What Triton makes of each of VARIANTS for it, counted."""
    found = []
    for variant in VARIANTS:
        case, counter = of_variant(*variant)
        code = compiled.by_triton(case, architecture, counter)
        found.append(compiled.counted(code.cubin, code.name) | {
            "elements": code.elements, "slots": compiled.slots_an_element(code)})
    return found


def triton_runs():
    """Prints what this process alone can find, as JSON: for each of VARIANTS its machine code
    and what differs, and what else differs."""
    launch.emulate()
    variants, others = [], []
    for dtype, operands, draws, clip, rows, size, aligned in VARIANTS:
        sums = result_of(operands, draws, clip)
        lines = differs(on_triton, dtype, operands, draws, clip == 1, sums, rows, (37, size))
        assert on_triton.kernel.options["ALIGNED"] == bool(aligned)
        variants.append({"differs": lines, "options": on_triton.kernel.options})
    # numbers that are 1 or divisible by 16; rows of odd lengths; arrays that are not aligned
    for shape in ((1, 1), (3, 1), (1, 4), (16, 2), (16, 16), (1, 4099), (2, 5000), (600, 2)):
        for shift in (0, 1):
            others += differs(on_triton, "float32", 2, 1, 1, 0, "sample", shape, shift)
            others += differs(on_triton, "bfloat16", 2, 1, 0, 0, "before", shape, shift)
        others += differs(on_triton, "bfloat16", 1, 1, 0, 2, "sample and counter", shape)
        others += differs(on_triton, "float16", 0, 1, 0, 3, "call", shape)
        others += differs(on_triton, "float32", 1, 1, 0, 0, "call", shape, ones=True)
    others += differs(on_triton, "float32", 2, 1, 0, 0, "end", (3, 5))
    had = len(on_triton.kept)
    for shift in (2, 3):  # as far from a multiple of 16 bytes as 1 is: the same kernel
        others += differs(on_triton, "float32", 2, 1, 1, 0, "sample", (3, 1), shift)
    others += ["another kernel"] * (len(on_triton.kept) - had)
    others += [row for row in check_words("triton", 10_000) if not row["passed"]]
    w = np.random.default_rng(2).integers(0, 2**32, (100_000, 2), np.uint32)
    w[:4, 0] = 0, 1, 2**31, 2**32 - 1
    if ulps(words.stages("triton", w), words.stages("numpy", w)).any():
        others.append("stages")
    barriers = [unnoticed("float32", 1, 1, 0, 2, "call", (3, 1024)),
                unnoticed("float32", 2, 1, 0, 0, "call", (3, 1023))]
    launch.blocks = lambda n: [n - 1]
    others += [shape for shape in LARGE if last_differs(on_triton, shape)]
    found = words._stages.compiled.asm["cubin"]
    code = {architecture: read_for(architecture) for architecture in ARCHITECTURES}
    print(json.dumps({
        "variants": variants, "code": code, "others": others, "barriers": barriers,
        "roots": roots(compiled.instructions(found, "_stages")),
        "stages": compiled.counted(found, "_stages")}))


@pytest.fixture(scope="module", autouse=TOOL is not None)
def other_process():
    """It runs beside the tests of CUDA C, which come first."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "",
                                "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, __file__], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()  # where it was not waited for


@pytest.fixture(scope="module")
def from_triton(other_process):
    found, errors = other_process.communicate()
    *_, last = ["", *errors.splitlines()]
    assert other_process.returncode == 0, f"{last}\n{errors}"
    return json.loads(found)


# ---- CUDA C ----

@needs_nvrtc
@needs_triton
@pytest.mark.parametrize("variant", MACROS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc(architecture, variant):
    """The CUDA C: no local memory, 16-byte accesses, two FFMA a root, no double precision."""
    cubin = launch.compiled_by_nvrtc(variant, cubin=True, architecture=architecture)
    found = compiled.counted(cubin, "update")
    _, _, operands, draws, _, sums, *_ = *variant, 0
    assert not (found["stack"] or found["local"] or found["shared"]), found
    assert bool(found["double"]) == bool(sums) and found["load16"] >= operands, found
    assert found["store16"] or sums == 4 or sums and not (operands and draws), found
    assert found["fma"] == WRITTEN * found["root"] and bool(found["root"]) == bool(draws), found


def cuda_slots(dtype, operands, keys=0, architecture=90):
    """Issue slots an element of the loop over packs, four of them unrolled."""
    variant = True, dtype, operands, 1, 0, 0, keys
    cubin = launch.compiled_by_nvrtc(variant, cubin=True, architecture=architecture)
    return compiled.slots(compiled.longest_loop(cubin, "update")) / (
        4 * 16 // (4 if dtype == "float32" else 2))


@needs_nvrtc
@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_c_keeps_to_its_slots(dtype):
    for keys, table in enumerate((SLOTS, KEYED_SLOTS)):
        for operands, ceiling in enumerate(table["cuda", dtype]):
            found = cuda_slots(dtype, operands, keys)
            assert ceiling - 1 < found <= ceiling, (operands, keys, found)
            for other in ARCHITECTURES:
                there = cuda_slots(dtype, operands, keys, other)
                assert there <= ceiling + ELSEWHERE, (operands, keys, other, there)


@needs_nvrtc
@needs_triton
@pytest.mark.parametrize("better, plain", [
    ('asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"((u32)a), "r"(m));',
     "product = (u64)(u32)a * m;"),
    ('asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(w), "r"(keep), "r"(set));',
     "r = (w & keep) | set;")], ids=["product", "logic"])
def test_a_slower_form_is_over_its_slots(monkeypatch, tmp_path, better, plain):
    text = on_host.SOURCE.read_text()
    assert text.count(better) == 1
    slower = tmp_path / "kernels.cu"
    slower.write_text(text.replace(better, plain))
    monkeypatch.setattr(on_cupy, "SOURCE", slower)
    launch.compiled_by_nvrtc.cache_clear()
    assert cuda_slots("float32", 0) > SLOTS["cuda", "float32"][0]
    launch.compiled_by_nvrtc.cache_clear()


LAUNCHED = [
    ("float32", 2, 1, 0, 0), ("float32", 0, 1, 0, 0), ("float32", 4, 0, 0, 0),
    ("bfloat16", 1, 1, 0, 0), ("float16", 2, 1, 1, 0), ("float32", 1, 0, 0, 1),
    ("bfloat16", 0, 1, 0, 1), ("float16", 1, 1, 0, 2), ("float32", 0, 1, 0, 3),
    ("float32", 1, 1, 0, 4), ("bfloat16", 1, 1, 0, 4)]
CASES = [*product([(5, d) for d in range(1, 10)] + [(600, 2), (3, 1031), (9, 64), (2, 9000)],
                  ("call", "sample", "counter", "before", "end", "sample and counter", "call keys",
                   "sample and counter keys"), (0, 1))]


@needs_nvrtc
@pytest.mark.parametrize("variant", LAUNCHED, ids=str)
def test_nvrtc_s_code_returns_the_bits_of_numpy(cupy_here, variant):
    """What it compiles, launched as CuPy would, in a grid's blocks and threads. A variant takes
    every fifth case, so each shape, with rows and shifts in turn; they take all of them."""
    lines = []
    for shape, rows, shift in CASES[LAUNCHED.index(variant) % 5::5]:
        lines += differs(on_cupy, *variant, rows, shape, shift)
    assert not lines


@needs_nvrtc
def test_nvrtc_s_words_and_large_arrays(cupy_here, monkeypatch):
    assert all(row["passed"] for row in check_words("cupy", 10_000))
    monkeypatch.setattr(launch, "blocks", lambda n: [n - 1])
    assert not [shape for shape in LARGE if last_differs(on_cupy, shape)]


@needs_nvrtc
def test_contraction_and_shortcuts_would_show(cupy_here, monkeypatch):
    """So the runs above would see a device's compiler at it."""
    options = on_cupy.options(True, "float32", 2, True, False)
    assert "--fmad=false" in options and not any("fast" in o for o in options)
    case = on_cupy, "float32", 2, 1, 0, 0, "call", (9, 64)
    assert not differs(*case)
    monkeypatch.setattr(on_cupy, "options", lambda aligned, *v: [
        "--std=c++17", f"-DALIGNED={int(aligned)}", *on_host.macros(*v)])
    launch.compiled_by_nvrtc.cache_clear()
    said = r"^(add|mul)\.f32 .* is not written .* 'update' of NVRTC 1\d\."
    with pytest.raises(NotImplementedError, match=said):
        differs(*case)
    launch.compiled_by_nvrtc.cache_clear()


@needs_nvrtc
def test_what_a_device_is_given_neither_contracts_nor_flushes(monkeypatch):
    """NVRTC's options, all of them: a launcher that adds one of its own, such as -ftz=true, would
    have a device flush what the emulator, which is given ours, keeps."""
    from cupy.cuda import nvrtc
    seen, plain = [], nvrtc.compileProgram
    monkeypatch.setattr(nvrtc, "compileProgram", lambda program, options: (
        seen.append(options), plain(program, options)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(on_cupy.driver, "load", lambda *loaded: loaded)
    variant, device = (False, "float16", 1, True, False, 2, True), torch.device("cuda:1")
    where, code, *name = on_cupy.compiled.__wrapped__(device, variant)
    assert (where, *name) == (device, "update", on_cupy.THREADS, 0)
    options = [*on_cupy.options(*variant), "--gpu-architecture=sm_90"]
    assert seen == [options] and code == launch.compiled_by_nvrtc(variant, cubin=True)
    assert "--fmad=false" in options and not any("ftz" in o or "fast" in o for o in options)


@needs_nvrtc
@needs_triton
def test_no_product_of_an_update_flushes():
    """In machine code, but for the root's own start."""
    for variant in MACROS:
        code = compiled.instructions(launch.compiled_by_nvrtc(variant, cubin=True), "update")
        assert not [line for line in code if re.match(r"(FMUL|FADD|FFMA)\S*\.FTZ", line)], variant


@needs_nvrtc
@needs_triton
@pytest.mark.parametrize("more, name", [
    (ROOTS, "roots"), (COUNTED, "products"), (COUNTED, "specials"), (words.SOURCE, "words"),
    (words.SOURCE, "stages")])
def test_nvrtc_takes_what_the_device_check_adds(more, name):
    cubin = launch.compiled_by_nvrtc(MACROS[0], more, cubin=True)
    assert compiled.counted(cubin, name)["instructions"] > 20


ONE_ROOT = """
extern "C" __global__ void own(float *x) { *x = root(*x); }
extern "C" __global__ void rn(float *x) { *x = __fsqrt_rn(*x); }
"""


@needs_nvrtc
@needs_triton
def test_the_root_is_that_of_sqrt_rn(from_triton):
    """The machine's own correctly rounded root, where it takes its short way: the same five
    instructions; and radii are where it does."""
    cubin = launch.compiled_by_nvrtc(MACROS[0], ONE_ROOT, cubin=True)
    own, rn = (compiled.instructions(cubin, name) for name in ("own", "rn"))
    assert roots(own) == roots(rn) and len(roots(rn)) == 1, (own, rn)
    assert {*from_triton["roots"]} == {*roots(rn)}
    assert len(from_triton["roots"]) == from_triton["stages"]["root"]
    low, = re.findall(r"IADD3 R\d+, R\d+, -(0x\w+), RZ", "\n".join(rn))
    span, = re.findall(r"ISETP.GT.U32.AND P0, PT, R\d+, (0x\w+), PT", "\n".join(rn))
    least, most = (int(np.float32(v).view(np.uint32)) for v in (1e-7, 46))
    assert int(low, 16) <= least and most - int(low, 16) <= int(span, 16)


# ---- what Triton made in the other process ----

@needs_triton
def test_triton_s_code_returns_the_bits_of_numpy(from_triton):
    """What it compiles, launched as on a device."""
    for variant, found in zip(VARIANTS, from_triton["variants"], strict=True):
        assert not found["differs"], (variant, found["differs"])
    assert not from_triton["others"]


@needs_triton
def test_a_barrier_that_lacks_would_show(from_triton):
    for missed, barriers in from_triton["barriers"]:
        assert barriers and not missed


on_each = pytest.mark.parametrize("architecture", ARCHITECTURES)


def code_of(from_triton, architecture):
    """(variant, what was counted) of each for an architecture."""
    return zip(VARIANTS, from_triton["code"][str(architecture)], strict=True)


@needs_triton
@on_each
def test_triton_uses_registers_alone(from_triton, architecture):
    """No stack and no spills. But for sums no double precision. Where rows are aligned no shared
    memory, and registers for 16 warps a multiprocessor: with 12 an H200 ran at half its rate.
    Where none was ever run, langevin may have 12: Triton 3.7.1 on sm_100 takes 132 registers, and
    3.9 on sm_120, whose memory is so slow that a tenth of the slots would do, 138."""
    if on_triton.contracts((architecture // 10, 0)):
        pytest.skip("refused")
    most = 144 if architecture >= 100 else 128
    for variant, found in code_of(from_triton, architecture):
        sums, aligned = variant[3] in ("sums", "terms"), variant[-1]
        assert not (found["stack"] or found["local"]), (variant, found)
        assert not aligned or found["registers"] <= most, (variant, found)
        assert bool(found["double"]) == sums, (variant, found)
        assert not found["shared"] or sums or not aligned, (variant, found)


@needs_triton
@on_each
def test_triton_moves_16_bytes_at_a_time(from_triton, architecture):
    """Each operand's and the output's share of a thread, where rows are aligned."""
    for variant, found in code_of(from_triton, architecture):
        dtype, operands, draws, clip, *_, aligned = variant
        if aligned:
            packs = found["elements"] * (4 if dtype == "float32" else 2) // 16
            left = result_of(operands, draws, clip)
            stored = 0 if left in (Result.SQUARES, Result.TERMS) else packs
            assert found["load16"] == operands * packs, (variant, found)
            assert found["store16"] == stored, (variant, found)
            assert found["store"] == stored or left, (variant, found)


@needs_triton
@on_each
def test_triton_contracts_nothing(from_triton, architecture):
    """The fused multiply-adds that are written, and not one elsewhere, but where Triton is
    refused."""
    assert not any(found["options"]["enable_fp_fusion"] for found in from_triton["variants"])
    more = []
    for variant, found in code_of(from_triton, architecture):
        assert found["root"] == variant[2] * found["elements"] // 2, (variant, found)
        if found["fma"] != WRITTEN * found["root"]:
            more.append(variant)
    refused = on_triton.contracts((architecture // 10, 0))
    assert bool(more) == bool(refused), (more, refused)


@needs_triton
@pytest.mark.parametrize("version, capability, refused", [
    ("3.6.0", (9, 0), False), ("3.6.0", (10, 0), True), ("3.6.0", (12, 0), True),
    ("3.7.1", (10, 0), False), ("3.10.0", (12, 0), False), ("4.0.0+git1", (12, 0), False)])
def test_where_triton_is_refused(monkeypatch, version, capability, refused):
    monkeypatch.setattr(on_triton, "INTERPRET", False)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    said = on_triton.why_not.__wrapped__()
    assert bool(said) is refused
    if refused:
        assert said.startswith(f"Triton {version} fuses products and sums on this GPU")


@needs_triton
@on_each
def test_triton_keeps_to_its_slots(from_triton, architecture):
    """Noise with up to two operands, aligned; and under 13 without noise."""
    more = MORE.get(triton.__version__, 0)
    for variant, found in code_of(from_triton, architecture):
        dtype, operands, draws, clip, rows, size, aligned = variant
        if aligned and not draws and not clip and operands <= 2:
            assert found["slots"] < 13, (variant, found["slots"])
        if aligned and draws and not clip and "call" in rows and size == 1024:
            table = KEYED_SLOTS if "keys" in rows else SLOTS
            ceiling = table["triton", dtype][operands]
            if architecture == 90:
                assert ceiling - 1 < found["slots"] <= ceiling + more, (variant, found["slots"])
            assert found["slots"] <= ceiling + more + ELSEWHERE, (variant, found["slots"])


if __name__ == "__main__":
    triton_runs()

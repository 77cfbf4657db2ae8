"""Every kernel compiled for sm_90 with no GPU, and its machine code read; the CUDA C also run.

Triton compiles only outside its interpreter, so in another process: this file, run.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch

from minidiff.bench import words
from minidiff.bench.device_check import ROOTS
from minidiff.kernels import on_cupy, on_host, on_numpy, on_triton, update

try:
    import triton
    TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
except ImportError:
    TOOL = None
needs_triton = pytest.mark.skipif(TOOL is None, reason="triton is not installed")
# dtype, operands, draws, clip or sums, coefficients, elements of a row, aligned
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
    ("float16", 0, 1, "sums", "call", 1024, 1)]
MACROS = [(dtype, *variant) for dtype in on_host.STORAGE for variant in (
    (0, 1, 0), (1, 1, 0), (2, 0, 0), (2, 1, 1), (4, 1, 1),
    (1, 1, 0, 2), (1, 0, 0, 1), (0, 1, 0, 1))]


def disassembled(cubin, function):
    """Counts of the instructions that matter in one function, and its resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        sass, usage = (subprocess.run([TOOL, option, "-fun", function, file.name], check=True,
                                      capture_output=True, text=True).stdout
                       for option in ("-sass", "-res-usage"))
    code = [line for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass) if "NOP" not in line]
    stack, shared = map(int, re.search(r"STACK:(\d+) SHARED:(\d+)", usage).groups())
    return {"stack": stack, "shared": shared, "instructions": len(code)} | {
        name: sum(bool(re.search(pattern, line)) for line in code) for name, pattern in (
            ("local", r"\b(LDL|STL)"), ("double", r"\bD(ADD|MUL|FMA)|F64"), ("fma", r"\bFFMA"),
            ("root", r"\bMUFU\.RSQ"), ("load16", r"\bLDG\.E\.(EF\.)?128"),
            ("store16", r"\bSTG\.E\.(EF\.)?128"), ("store", r"\bSTG"))}


def compiled_by_triton(module, name, launch):
    """(cubin for sm_90, options) of the kernel module.name that launch() starts, specialised to
    its arguments as on a device; nothing runs."""
    from triton.backends.compiler import GPUTarget
    none = lambda *_: 0
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=none, get_current_stream=none,
        get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    kernel, found = getattr(module, name), []
    launches = MagicMock()
    launches.__getitem__.side_effect = lambda grid: lambda *arguments, **options: found.append(
        (kernel.warmup(*arguments, grid=grid, **options).asm["cubin"], options))
    with patch.object(module, name, launches):
        launch()
    (cubin, options), = found
    return cubin, options


def launched(dtype, operands, draws, clip, rows, size, aligned, batch=64):
    """One of VARIANTS through on_triton.update, compiled alone: its cubin."""
    out = torch.zeros((batch, size), dtype=getattr(torch, dtype))
    sums = (2 if operands and draws else 1) if clip == "sums" else 0
    width = operands + draws + 4 * (clip == 1) + (sums == 2)
    coef = torch.zeros((1 if rows == "call" else batch, width))
    step = torch.zeros((), dtype=torch.int64) if rows == "counter" else 0
    cubin, options = compiled_by_triton(on_triton, "kernel", lambda: on_triton.update(
        out, [out] * operands, coef, rows == "sample", draws, clip == 1, sums, 0, 0, 0, step))
    assert options["ALIGNED"] == bool(aligned)
    return cubin


def others():
    """What else a launch would compile: shapes whose numbers are 1 or divisible by 16, and the
    kernels of the bench that show raw words."""
    for batch, size in ((1, 1), (3, 1), (1, 4), (16, 2), (16, 16), (1, 4099), (2, 5000)):
        for variant in (("float32", 2, 1, 1, "sample"), ("bfloat16", 1, 1, "sums", "counter")):
            launched(*variant, size, size % (4 if variant[0] == "float32" else 8) == 0, batch)
    counters, out = torch.zeros((1, 4), dtype=torch.int32), torch.zeros((1, 4), dtype=torch.int32)
    for key in (0, 1, -1):
        compiled_by_triton(words, "_words", lambda key=key: words._words[(1,)](
            counters, out, 1, key, 1, BLOCK=256))
    with patch.object(torch.Tensor, "to", lambda self, device: self):  # "cuda"
        cubin, _ = compiled_by_triton(words, "_radii", lambda: words.triton_radius(
            np.zeros(2048, np.uint32)))
    found = disassembled(cubin, "_radii")
    assert found["root"] and found["fma"] == 2 * found["root"], found  # as in a kernel of use


@pytest.fixture(scope="module")
def from_triton():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_triton
def test_triton_uses_registers_alone(from_triton):
    """No stack and no spills; and but for sums no double precision, and where rows are aligned
    no shared memory."""
    for variant, found in zip(VARIANTS, from_triton, strict=True):
        sums, aligned = variant[3] == "sums", variant[-1]
        assert not (found["stack"] or found["local"]), (variant, found)
        assert bool(found["double"]) == sums, (variant, found)
        assert not found["shared"] or sums or not aligned, (variant, found)


@needs_triton
def test_triton_moves_16_bytes_at_a_time(from_triton):
    """Each operand's and the output's share of a thread, where rows are aligned."""
    for variant, found in zip(VARIANTS, from_triton, strict=True):
        dtype, operands, draws, clip, *_, aligned = variant
        if aligned:
            packs = found["elements"] * (4 if dtype == "float32" else 2) // 16
            stored = packs if clip != "sums" or operands and draws else 0  # sums, or a gradient
            assert found["load16"] == operands * packs, (variant, found)
            assert found["store16"] == stored, (variant, found)
            assert found["store"] == stored or clip == "sums", (variant, found)


@needs_triton
def test_triton_contracts_nothing(from_triton):
    """Two FFMA a square root, which are its rounding, and not one elsewhere."""
    for variant, found in zip(VARIANTS, from_triton, strict=True):
        assert found["fma"] == 2 * found["root"], (variant, found)
        assert found["root"] == variant[2] * found["elements"] // 2, (variant, found)


@needs_triton
def test_triton_takes_47_to_59_instructions_an_element(from_triton):
    """Noise with up to two operands, aligned; and under 13 without noise."""
    for variant, found in zip(VARIANTS, from_triton, strict=True):
        dtype, operands, draws, clip, rows, size, aligned = variant
        each = found["instructions"] / found["elements"]
        if aligned and operands <= 2 and not clip:
            assert 47 < each < 59 if draws else each < 13, (variant, each)


def compiled_by_nvrtc(more, *variant):
    """The cubin of kernels.cu and `more` for sm_90."""
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.nvrtc
    try:
        program = nvrtc.createProgram(on_cupy.SOURCE.read_text() + more, "kernels.cu", [], [])
    except (ImportError, OSError, RuntimeError) as e:
        pytest.skip(f"NVRTC is not installed: {e}")
    nvrtc.compileProgram(program, [*on_cupy.options(*variant), "--gpu-architecture=sm_90"])
    return nvrtc.getCUBIN(program) + b"\0"  # CuPy drops the last byte


@needs_triton
@pytest.mark.parametrize("variant", MACROS, ids=str)
def test_nvrtc(variant):
    """The CUDA C: no local memory, 16-byte accesses, two FFMA a root, no double precision."""
    found = disassembled(compiled_by_nvrtc("", *variant), "update")
    dtype, operands, draws, clip, *sums = variant
    assert not (found["stack"] or found["local"] or found["shared"]), found
    assert bool(found["double"]) == bool(sums) and found["load16"] >= operands, found
    assert found["store16"] or sums and not (operands and draws), found
    assert found["fma"] == 2 * found["root"] and bool(found["root"]) == bool(draws), found


@needs_triton
def test_triton_is_launched_as_it_is_compiled_here(monkeypatch):
    """Contraction off: the one option that changes bits."""
    seen = {}
    monkeypatch.setattr(on_triton, "kernel", {(1,): lambda *args, **options: seen.update(options)})
    on_triton.update(torch.empty(2, 3), [], torch.ones(1, 1), False, True, False, 0, 0, 0, 0, 0)
    assert seen["enable_fp_fusion"] is False and seen["num_warps"] == on_triton.WARPS


def threads_in_turn(monkeypatch, folder, variant, blocks=range):
    """Have on_cupy compile for the CPU and launch by running blocks(grid) thread by thread."""
    source = on_cupy.SOURCE.read_text()
    source, found = re.subn(r'#ifdef __CUDACC_RTC__(?=\n// ---- GPU)', """
        #define __global__
        extern "C" { struct { unsigned x; } blockIdx, threadIdx, blockDim; }
        #define __shfl_xor_sync(mask, value, distance) 0.  // each thread adds for itself
        static void atomicAdd(double *sum, double value) { *sum += value; }
        #if 1""", source)
    source, alone = re.subn(r"threadIdx.x % lanes == 0", "true", source)
    assert found == alone == 1
    built = Path(folder) / "_".join(map(str, variant))
    macros = [o for o in on_cupy.options(*variant) if o.startswith("-D")]
    subprocess.run([on_host.compiler(), "-O1", "-ffp-contract=off", "-fno-math-errno", "-shared",
                    "-fPIC", "-std=c++17", *macros, "-x", "c++", "-", "-o", built], check=True,
                   input=source, text=True)
    library = ctypes.CDLL(str(built))
    parameters = re.search(r"void update\((.*?)\)", source, re.S)[1].split(",")
    kinds = [int if "*" in p else {"int": np.int32, "i64": np.int64, "u64": np.uint64,
                                   "u32": np.uint32}[p.split()[0]] for p in parameters]
    library.update.argtypes = [ctypes.c_void_p if k is int else np.ctypeslib.as_ctypes_type(k)
                               for k in kinds]
    library.update.restype = None
    block_index, thread_index, block_dim = (ctypes.c_uint.in_dll(library, name) for name in (
        "blockIdx", "threadIdx", "blockDim"))

    def launch(grid, block, arguments):
        assert [type(a) for a in arguments] == kinds  # CuPy passes their bytes as they are
        block_dim.value = block[0]
        for block_index.value in blocks(grid[0]):
            for thread_index.value in range(block[0]):
                library.update(*map(int, arguments))
    monkeypatch.setattr(on_cupy, "kernel", lambda *a: launch)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(
        Device=nullcontext, Stream=SimpleNamespace(from_external=nullcontext))))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


@pytest.mark.skipif(on_host.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("variant", [("float32", 2, 1, 0), ("float32", 0, 1, 0),
                                     ("bfloat16", 1, 1, 0), ("float16", 2, 1, 1)], ids=str)
def test_cuda_c_thread_by_thread(monkeypatch, tmp_path, variant):
    """CuPy's launch with its blocks and threads in turn on the CPU: bits and guards."""
    dtype, operands, draws, clip = variant
    kind, rng, edge = getattr(torch, dtype), np.random.default_rng(0), 4096
    threads_in_turn(monkeypatch, tmp_path, variant)
    for shape in [(5, d) for d in range(1, 10)] + [(600, 2), (3, 1031), (9, 64), (2, 9000)]:
        for rows in ("call", "sample", "counter", "before", "sample and counter"):
            for shift in (0, 1):
                def place(values=None, shape=shape, shift=shift):
                    buffer = torch.full((edge * 2 + shape[0] * shape[1] + shift,), 7., dtype=kind)
                    view = buffer[edge + shift:][:shape[0] * shape[1]].view(shape)
                    return view.copy_(torch.nan if values is None else values), buffer
                u = [place(torch.from_numpy(rng.standard_normal(shape, np.float32)))[0]
                     for _ in range(operands)]
                n = {"call": 1, "counter": 4, "before": 4}.get(rows, shape[0])
                coef = rng.standard_normal((n, operands + draws + 4 * clip)).astype(np.float32)
                step = 5 if rows in ("call", "sample") else torch.tensor(-2 if rows == "before"
                                                                         else 6)
                used = coef if "sample" in rows else coef[-1 if rows == "counter" else 0]
                counter = {"seed": 2**40 + 3, "sample": 2**32 - 2, "tag": 1}
                want = update([v.float() for v in u], used, out=torch.empty(shape),
                              step=int(step), backend="numpy", **counter).to(kind)
                out, buffer = place()
                on_cupy.update(out, u, torch.from_numpy(coef), "sample" in rows, draws, clip, 0,
                               counter["seed"], counter["sample"] % 2**32, counter["tag"], step)
                bits = torch.int32 if dtype == "float32" else torch.int16
                assert torch.equal(out.view(bits), want.view(bits)), (shape, rows, shift)
                assert (buffer == 7).sum() - (out == 7).sum() == 2 * edge + shift, (shape, rows)


@pytest.mark.skipif(on_host.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", on_host.STORAGE)
def test_cuda_c_sums_thread_by_thread(monkeypatch, tmp_path, dtype):
    """Norms, noise norms and the loss, but for the addition over a warp."""
    kind, rng = getattr(torch, dtype), np.random.default_rng(1)
    for operands, draws, sums in ((1, 0, 1), (0, 1, 1), (1, 1, 2), (0, 1, 3)):
        threads_in_turn(monkeypatch, tmp_path, (dtype, operands, draws, 0, sums))
        for shape in [(5, d) for d in range(1, 10)] + [(300, 2), (3, 1031), (2, 4096)]:
            s = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(kind)
            coef = torch.from_numpy(rng.uniform(.1, 2, (shape[0], operands + draws + (sums == 2))))
            case = [s] * operands, coef.float(), True, draws, 0, sums, 3, 1, 2, 5
            got, want = torch.full_like(s, torch.nan), torch.full_like(s, torch.nan)
            total, exact = on_cupy.update(got, *case), on_numpy.update(want, *case)
            assert torch.allclose(total, exact, rtol=1e-12, atol=0), (shape, sums)
            bits = torch.int32 if dtype == "float32" else torch.int16
            assert torch.equal(got.view(bits), want.view(bits)), (shape, sums)


@needs_triton
@pytest.mark.parametrize("more, name", [(ROOTS, "roots"), (ROOTS, "products"), (ROOTS, "specials"),
                                        (words.WORDS, "words")])
def test_nvrtc_takes_what_the_device_check_adds(more, name):
    assert disassembled(compiled_by_nvrtc(more, *MACROS[0]), name)["instructions"] > 20


def test_nvrtc_contracts_nothing_and_makes_no_shortcuts():
    options = on_cupy.options("float32", 1, True, False)
    assert "--fmad=false" in options and not any("fast" in o for o in options)


@pytest.mark.skipif(on_host.compiler() is None, reason="no C++ compiler")
def test_cuda_c_beyond_2_31_elements(monkeypatch, tmp_path, folded):
    """The last block alone."""
    threads_in_turn(monkeypatch, tmp_path, ("bfloat16", 0, 1, 0), lambda n: [n - 1])
    for shape in folded.shapes:
        out = folded(shape)
        on_cupy.update(out, [], torch.ones(1, 1), False, True, False, 0, 7, 1, 0, 0)
        got, want = folded.last_normals(out, seed=7, sample=1)
        assert torch.equal(got, want), shape


if __name__ == "__main__":
    others()
    print(json.dumps([disassembled(launched(*variant), "kernel")
                      | {"elements": 512 * 4 // (32 * on_triton.WARPS)} for variant in VARIANTS]))

"""Blocks, threads, instruction sets and sizes change no bit; an update holds its output alone."""

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from exact import FLOATS, check
from folded import LARGE, last_normals
from minidiff import kernels
from minidiff.kernels import on_host, on_triton, update

COUNTER = {"seed": 0x123456789ABCDEF, "sample": 2**32 - 3, "step": 5, "tag": 2}


@pytest.mark.skipif(kernels.why_not("triton") is not None, reason="triton cannot run here")
@pytest.mark.parametrize("quads", [8, 64, 512])
def test_triton_block_sizes_change_nothing(monkeypatch, quads):
    monkeypatch.setattr(on_triton, "QUADS", quads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(8)
    for dtype in FLOATS:
        for shape in ((5, 3), (3, 41), (2, 64)):
            u = [torch.from_numpy(rng.standard_normal(shape, np.float32)) for _ in range(2)]
            check(("triton", device), getattr(torch, dtype), u,
                  rng.standard_normal((shape[0], 3)), shape, f"QUADS {quads}", **COUNTER)


def cpu_has(flag):
    info = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and info.exists() and f" {flag} " in info.read_text()


@pytest.mark.skipif(kernels.why_not("host") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", [
    ("-march=haswell", "-fopenmp"), ("-march=x86-64", "-fopenmp"), ("-march=native",),
    ("-march=native", "-O0")], ids=" ".join)
def test_host_instruction_sets_change_nothing(monkeypatch, flags):
    """AVX2 and SSE2; and this CPU's own without OpenMP, and without optimisation."""
    needs = {"-march=haswell": "avx2", "-march=x86-64": "sse2"}.get(flags[0])
    if needs and not cpu_has(needs):
        pytest.skip(f"the CPU has no {needs}")
    monkeypatch.setattr(on_host, "native", lambda: flags)
    monkeypatch.setattr(on_host, "_function", on_host._function.__wrapped__)  # not a kept one
    rng = np.random.default_rng(9)
    for dtype in FLOATS:
        for shape in ((5, 3), (700, 2), (3, 1031), (2, 4096)):
            for rows in (None, shape[0]):
                u = [torch.from_numpy(rng.standard_normal(shape, np.float32)) for _ in range(3)]
                coef = np.r_[rng.standard_normal(4), .9, .1, -1., 1.]
                check(("host", "cpu"), getattr(torch, dtype), u,
                      np.outer(np.ones(rows), coef) if rows else coef, shape, str(flags), **COUNTER)


@pytest.mark.skipif(kernels.why_not("host") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_host_threads_change_nothing(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rng = np.random.default_rng(10)
    for shape in ((20_001, 3), (3, 20_001), (2, 1 << 15)):
        u = [torch.from_numpy(rng.standard_normal(shape, np.float32))]
        check(("host", "cpu"), torch.float32, u, rng.standard_normal((shape[0], 2)), shape,
              f"{threads} threads", **COUNTER)


@pytest.mark.skipif(kernels.why_not("host") is not None, reason="no C++ compiler")
def test_host_beyond_2_31_elements(monkeypatch, folded):
    """Row b becomes b mod 251; in one thread the rows written last are the ones that stay."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    batch, size = (1 << 16) + 1, 1 << 15
    u, out = folded((batch, size)), folded((batch, size))
    held = folded.period // size  # rows the memory holds
    u[:held] = 1.
    rows = torch.arange(batch)[:, None] % 251.
    update([u], rows, out=out, backend="host")
    assert torch.equal(out[-held:], rows[-held:].bfloat16().expand(held, size))


@pytest.mark.skipif(kernels.why_not("triton") is not None or not on_triton.INTERPRET,
                    reason="runs one program of many: Triton's interpreter only")
def test_triton_beyond_2_31_elements(monkeypatch, folded):
    """The last program alone: the tile that ends a tensor of LARGE."""
    from triton.runtime.interpreter import interpreter_builder as builder
    plain, last = on_triton.kernel, []

    class Last:
        def __getitem__(self, grid):
            last.append(grid[0] - 1)
            return plain[(1,)]
    monkeypatch.setattr(on_triton, "kernel", Last())
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(
        builder, "grid_idx", (last[-1], y, z)))
    for shape in LARGE:
        out = folded(shape, torch.float16)  # bfloat16 is widened whole in the interpreter
        kernels.normal(shape, out=out, backend="triton", seed=7, sample=1)
        got, want = last_normals(out, seed=7, sample=1)
        assert last[-1] > 0 and torch.equal(got, want.half()), shape


def peak_bytes(f):
    """How far the process's memory rose inside f, whoever allocated; None where the system does
    not tell."""
    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
        f()
        return status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def test_an_update_holds_its_output_alone():
    """2^24 elements, 64 MiB, within two huge pages of 2 MiB, one at either end. The least of
    some calls: other threads of the process may take memory meanwhile."""
    u = [torch.randn(1 << 14, 1024) for _ in "xs"]
    f = lambda: update(u, [.5, 2., .25], backend="host")
    f()
    peaks = [peak_bytes(f) for _ in range(5)]
    if None in peaks:
        pytest.skip("the system does not tell the process's peak memory")
    assert abs(min(peaks) - u[0].nbytes) <= 2 * 2**21

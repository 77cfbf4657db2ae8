"""The script for a GPU, as far as a CPU can run it: whole, and its checks with CPU backends in the
place of a GPU's."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from minidiff import kernels
from minidiff.bench import device_check, emulate
from minidiff.bench.check import normals_at
from minidiff.kernels import on_triton

ON_A_GPU = ("device", "square_root", "rates", "launches", "side_stream", "threads",
            "graph_replay", "corrector_replay", "whole_samplers", "training", "large",
            "sanitizer")
SMALL = """
from minidiff.bench import device_check
if __name__ == "__main__":
    device_check.SHAPES = [(3, 5), (2, 64)]
    device_check.PARTS = [p for p in device_check.PARTS if p.__name__ != "all_radii"]  # 20 s
    raise SystemExit(device_check.main())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="minutes of a GPU")
@pytest.mark.skipif(emulate.lacking("cupy") is not None, reason=str(emulate.lacking("cupy")))
@pytest.mark.skipif(not on_triton.triton, reason="triton is not installed")
def test_on_a_cpu_it_runs_what_it_can_and_says_what_it_could_not(tmp_path):
    """Also what Triton and NVRTC compile for a GPU: every op and the sums."""
    out, script = tmp_path / "found.json", tmp_path / "small.py"
    script.write_text(SMALL)
    run = subprocess.run([sys.executable, str(script), "--out", str(out)], text=True,
                         env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    parts = json.loads(out.read_text())["parts"]
    assert [name for name, p in parts.items() if p["passed"] is None] == list(ON_A_GPU)
    assert all(parts[name]["reason"] for name in ON_A_GPU)
    assert all(p["passed"] for name, p in parts.items() if name not in ON_A_GPU)
    assert parts["rows"]["triton"] == parts["rows"]["cupy"] == parts["rows"]["host"] > 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_backend_does_not_pass_for_the_other(monkeypatch):
    for name in device_check.NAMES:
        monkeypatch.setattr(emulate, "lacking", lambda n, name=name: "gone" if n == name else None)
        with pytest.raises(device_check.NotHere, match=f"^{name}: gone$"):
            device_check.counters()
        assert device_check.verdict(True) == {"passed": None, "reason": f"{name}: gone"}
        assert device_check.verdict(False)["passed"] is False
        assert name not in device_check.here()


@pytest.fixture
def no_gpu(monkeypatch):
    """A GPU that is the CPU: graphs are calls, streams nothing."""
    names = [n for n in ("host", "torch") if not kernels.missing(n)]
    for name, value in (("DEVICE", "cpu"), ("on_device", lambda: names),
                        ("compiled", lambda: names),
                        ("captured", lambda f, calls=1: (f(), f)[1])):
        monkeypatch.setattr(device_check, name, value)
    stream = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    for name, value in (("synchronize", lambda: None), ("Stream", lambda: stream),
                        ("stream", lambda s: nullcontext()), ("_sleep", lambda cycles: None)):
        monkeypatch.setattr(torch.cuda, name, value)


def large():
    """As on a device, 2^14 times smaller; in the second shape parts overlap."""
    return device_check.large(2**17, ((2**7 + 3, 1024), (2, 2**16 + 8)))


CHECKS = pytest.mark.parametrize("part", [
    device_check.counters, device_check.side_stream, device_check.threads,
    device_check.graph_replay, device_check.corrector_replay, large], ids=lambda f: f.__name__)


@CHECKS
def test_a_check_passes_where_the_bits_are_the_same(no_gpu, part):
    assert part()["passed"]


@CHECKS
def test_a_check_fails_where_the_noise_is_another(no_gpu, monkeypatch, part):
    monkeypatch.setattr(kernels.backend("numpy"), "noise", SimpleNamespace(
        normal=lambda *a: kernels.backend("torch").normal(*a[:4], a[4] ^ 1, "cpu").numpy()))
    monkeypatch.setattr(device_check, "normals_at", lambda *a, tag: normals_at(*a, tag=tag ^ 1))
    assert part()["passed"] is False


def test_counters_see_what_is_written_beside_the_output(no_gpu, monkeypatch):
    def beside(*a, out, **kw):
        kernels.update(*a, out=out, **kw)
        if out.storage_offset():
            torch.as_strided(out, (1,), (1,), out.storage_offset() - 1).zero_()
        return out
    monkeypatch.setattr(device_check, "update", beside)
    assert device_check.counters()["passed"] is False

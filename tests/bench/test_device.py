"""The script for a GPU, with CPU backends in the place of a GPU's."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from minidiff import kernels, noise
from minidiff.bench.device import __main__ as main
from minidiff.bench.device import correct, here, predicted, speed
from minidiff.bench.speed.clock import once
from minidiff.bench.speed.run import bench, kernels_of
from minidiff.bench.speed.sums import SUMS
from minidiff.families import FAMILIES
from minidiff.kernels import on_cupy, on_triton
from minidiff.kernels.check.compare import normals_at, oracle


@pytest.mark.skipif(torch.cuda.is_available(), reason="minutes of a GPU")
def test_with_no_gpu_each_part_says_so(tmp_path):
    out = tmp_path / "found.json"
    run = subprocess.run([sys.executable, "-m", "minidiff.bench.device", "--json", str(out)],
                         text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    parts = json.loads(out.read_text())["parts"]
    assert len(parts) == 22
    assert all(p["passed"] is None and p["reason"] == "no CUDA device" for p in parts.values())
    assert run.stdout.endswith("0 passed, 0 FAILED, 22 not run\n")


def test_one_backend_does_not_pass_for_the_other(monkeypatch):
    monkeypatch.setattr(here, "CUDA", True)
    for name in here.NAMES:
        monkeypatch.setattr(kernels, "why_not", lambda n, name=name: "gone" if n == name else None)
        assert here.why_not(*here.NAMES) == f"{name}: gone"


@pytest.fixture
def no_gpu(monkeypatch):
    """A GPU that is the CPU: graphs are calls, streams nothing."""
    names = [n for n in ("host", "torch") if not kernels.why_not(n)]
    for name, value in (("DEVICE", "cpu"), ("NAMES", names),
                        ("captured", lambda f, calls=1: (f(), f)[1])):
        monkeypatch.setattr(correct, name, value)
    stream = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    for name, value in (("synchronize", lambda: None), ("Stream", lambda: stream),
                        ("stream", lambda s: nullcontext()), ("_sleep", lambda cycles: None)):
        monkeypatch.setattr(torch.cuda, name, value)


def large():
    """As on a device, 2^14 times smaller; in the second shape parts overlap."""
    return correct.large(2**17, ((2**7 + 3, 1024), (2, 2**16 + 8)))


CHECKS = pytest.mark.parametrize("part", [
    correct.two_norms, correct.counters, correct.side_stream, correct.threads,
    correct.graph_replay, correct.corrector_replay, large], ids=lambda f: f.__name__)


@CHECKS
def test_a_check_passes_where_the_bits_are_the_same(no_gpu, part):
    assert part()["passed"]


@CHECKS
def test_a_check_fails_where_the_noise_is_another(no_gpu, monkeypatch, part):
    def another(shape, seed, sample, step, tag, **where):
        return noise.normal(shape, seed, sample, step, tag ^ 1, **where)
    monkeypatch.setattr(kernels.backend("numpy"), "noise",
                        SimpleNamespace(normal=another, cast=noise.cast))
    monkeypatch.setattr(correct, "normals_at", lambda *a, tag: normals_at(*a, tag=tag ^ 1))
    assert part()["passed"] is False


def test_counters_see_what_is_written_beside_the_output(no_gpu, monkeypatch):
    def beside(*a, out, **kw):
        kernels.update(*a, out=out, **kw)
        if out.storage_offset():
            torch.as_strided(out, (1,), (1,), out.storage_offset() - 1).zero_()
        return out
    monkeypatch.setattr(correct, "update", beside)
    assert correct.counters()["passed"] is False


def test_every_part_that_needs_no_gpu_of_its_own_passes_here(no_gpu, monkeypatch):
    """The words, every op and the sums, small; and what is timed, on the CPU's backend."""
    monkeypatch.setattr(correct, "SHAPES", [(3, 5)])
    monkeypatch.setattr(correct, "ProcessPoolExecutor", lambda n, context: nullcontext(
        SimpleNamespace(map=map)))
    assert correct.words()["passed"]
    found = correct.rows()
    assert found["passed"] and found["host"] == found["torch"] > 90
    monkeypatch.setattr(correct, "every_word", lambda: torch.randint(0, 2**32, (1000, 2)).numpy()
                        .astype("uint32"))
    assert correct.all_stages()["passed"]
    assert speed.COUNTED.count("__global__") == 2


def test_keys_are_timed_beside_numbers_and_held_to_numpy(no_gpu, monkeypatch):
    names = correct.NAMES
    for name, value in (("DEVICE", "cpu"), ("NAMES", names),
                        ("seconds", lambda f: f().numel() * 1e-9)):
        monkeypatch.setattr(speed, name, value)
    found = speed.keys(1 << 13)
    assert found["passed"] and len(found["times"]) == 8 * len(names)
    assert all(row["ratio"] == 1 for row in found["times"].values())
    monkeypatch.setattr(speed, "oracle", lambda *a, seed: oracle(*a, seed=seed + 1))
    assert not speed.keys(1 << 13)["passed"]


def test_the_largest_sizes_are_timed_last(no_gpu, monkeypatch):
    """What is left of `timing` where time ends before it begins, in order."""
    left = speed.timing(-1.)["left"]
    sizes = [elements for _, _, elements in left]
    assert sizes.count(1 << 28) == 12 and set(sizes[-12:]) == {1 << 28}
    assert {"dsm_loss", "corrector", "norms"} < {op for op, _, n in left if n == 1 << 28}


@pytest.fixture
def no_gpu_of_speed(no_gpu, monkeypatch):
    """The parts that measure, on a CPU: its clock, its backends."""
    for name, value in (("DEVICE", "cpu"), ("NAMES", correct.NAMES),
                        ("captured", lambda f, calls=1: f),
                        ("seconds", lambda f, repeats=1: once(f, lambda: None))):
        monkeypatch.setattr(speed, name, value)


def test_launches_are_timed_in_turns(no_gpu_of_speed, monkeypatch):
    monkeypatch.setattr(speed, "PEERS", ("torch_eager",))
    order = []
    monkeypatch.setattr(speed, "once", lambda f, wait, calls: order.append(f) or 1e-6 * len(order))
    found = speed.launches()
    names = [*correct.NAMES, "torch_eager"]
    turns = speed.ROUNDS + 1
    assert found.pop("passed") and list(found) == names
    assert len(order) == turns * len(names) and order == order[:len(names)] * turns
    # the first turn is not kept: the median of turns 2 to 6 is the fourth's
    assert [of["host_us"] for of in found.values()] == [
        3 * len(names) + n + 1 for n in range(len(names))]


@pytest.fixture
def on_an_h200(no_gpu_of_speed, monkeypatch):
    """Each graph takes a second; of normal alone there is a prediction, a second an element."""
    monkeypatch.setattr(speed, "card_here", lambda: "H200")
    monkeypatch.setattr(speed, "kept", lambda card: {
        ("normal", "float32", name): 1. for name in correct.NAMES} if card == "H200" else {})
    monkeypatch.setattr(speed, "seconds", lambda f: f() is None or 1.)


def test_a_row_in_a_graph_stands_beside_its_prediction(on_an_h200):
    """Of 2^16 calls a graph: every update and sum, on the CPU."""
    found = speed.in_graphs(sizes=[1 << 12])
    rows = found["rows"]
    assert found["passed"] and not found["left"]
    assert {row["op"] for row in rows} == {*kernels_of(), *SUMS}
    assert len(rows) == 2 * (len(kernels_of()) + len(SUMS)) * len(correct.NAMES)
    assert all(row["seconds"] == 2**-16 for row in rows)
    assert all(row["predicted"] == (2**12 if row["op"] == "normal" and row["dtype"] == "float32"
                                    else None) for row in rows)
    moved = {row["op"]: row["of_copy"] for row in rows}  # as long as a copy, of two arrays
    assert moved["normal"] == .5 and moved["langevin"] == 1.5 and moved["dpmpp_2m"] == 2.5
    assert moved["noise_norms"] == 0 and moved["norms"] == .5 and moved["corrector"] == 2


def test_what_fails_in_a_graph_loses_no_other(on_an_h200, monkeypatch):
    def fails(f, calls):
        raise RuntimeError("it cannot be captured\nand more")
    monkeypatch.setattr(speed, "captured", fails)
    found = speed.in_graphs(sizes=[1 << 10])
    assert found["passed"] is False and len(found["rows"]) > 20
    assert {row["reason"] for row in found["rows"]} == {"RuntimeError: it cannot be captured"}


def test_what_does_not_fit_is_named():
    assert speed.until(-1., [(1, 2), (3, 4)], max) == {
        "passed": True, "left": [(1, 2), (3, 4)], "rows": []}


def test_the_predictions_of_a_card_are_found(on_an_h200):
    seconds = predicted.kept("H200")["langevin", "float32", "triton"]
    assert seconds == pytest.approx(12 / (.88 * 4800e9), rel=1e-6)
    assert predicted.kept("A100") == predicted.kept(None) == {}


def test_variants_are_compiled_anew_and_then_as_before(on_an_h200, monkeypatch):
    """Each with its constants, the ones in use first; afterwards these are back."""
    seen, cleared = [], []
    modules = {"triton": on_triton, "cupy": on_cupy}
    before = [(on_triton.QUADS, on_triton.WARPS), (on_cupy.PACKS, on_cupy.THREADS)]
    monkeypatch.setattr(on_cupy, "compiled", SimpleNamespace(
        cache_clear=lambda: cleared.append(1)))

    def in_graph(op, dtype, backend, elements, width):
        names = dict(speed.VARIANTS)[backend]
        seen.append(tuple(getattr(modules[backend], name) for name in names))
        return {"seconds": 1.}
    monkeypatch.setattr(speed, "in_graph", in_graph)
    rows = speed.variants(ops=["normal"])["rows"]
    assert seen == 2 * [*speed.TILES, *speed.BLOCKS] and len(rows) == len(seen)
    assert [speed.TILES[0], speed.BLOCKS[0]] == before
    assert before == [(on_triton.QUADS, on_triton.WARPS), (on_cupy.PACKS, on_cupy.THREADS)]
    assert len(cleared) == 2 * len(seen)
    assert rows[-1]["PACKS"] == 8 and rows[-1]["THREADS"] == 512


@pytest.mark.parametrize("pack", [4, 8])
def test_variants_of_cuda_c_divide_a_row_in_ways_of_their_own(monkeypatch, pack):
    found = set()
    for packs, threads in speed.BLOCKS:
        monkeypatch.setattr(on_cupy, "PACKS", packs)
        monkeypatch.setattr(on_cupy, "THREADS", threads)
        found.add((threads, *on_cupy.tile(2048, pack)))
    assert len(found) == len(speed.BLOCKS)


def test_loops_are_those_of_bench(no_gpu_of_speed, monkeypatch):
    grids = []
    monkeypatch.setattr(speed, "bench_samplers", lambda device, grid: grids.append(grid) or ["row"])
    monkeypatch.setattr(speed, "show_samplers", str)
    assert speed.loops() == {"passed": True, "rows": ["row"]}
    assert all(kind == "lean" for grid in grids for kind, *_ in grid)


def test_rates_of_this_machine(no_gpu_of_speed):
    found = speed.rates(1 << 16)
    assert found["copy_gb_per_s"] > 0 and found["fill_gb_per_s"] > 0
    assert found["passed"] is None and found["reason"].startswith("cupy: ")


@pytest.mark.parametrize("other", [False, True])
def test_a_training_draws_what_it_draws_elsewhere(no_gpu, monkeypatch, other):
    if other:
        places = iter("01")
        monkeypatch.setattr(correct, "apply", lambda *given, **options: kernels.apply(
            *given, **options) + (next(places) == "1"))
    assert correct.training(1)["passed"] is not other


@pytest.mark.parametrize("code, passed", [(0, True), (9, False)])
def test_what_the_sanitizer_says(monkeypatch, tmp_path, code, passed):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho summary of $2\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = correct.sanitizer()
    assert found["passed"] is passed
    assert found["memcheck"] == (passed, ["summary of memcheck"])
    assert found["racecheck"] == (passed, ["summary of racecheck"])


@pytest.mark.parametrize("wrong", [False, True])
def test_whole_samplers_are_held_to_their_loops(no_gpu_of_speed, monkeypatch, wrong):
    """Every family but the adaptive one; a graph that returns other samples is seen."""
    monkeypatch.setattr(speed, "EVALUATIONS", dict.fromkeys(FAMILIES, 8))
    monkeypatch.setattr(speed, "chunk_size", lambda shape: 2)
    if wrong:
        runs = []
        monkeypatch.setattr(speed, "same", lambda a, b: runs.append(a) or len(runs) != 3)
    found = speed.whole_samplers((1, 4, 4))
    assert len(found["times"]) == len(FAMILIES) - 1
    assert found["passed"] is not wrong and len(found["failures"]) == wrong
    assert all(row["ms"] > 0 and row["graph_ms"] > 0 for row in found["times"].values())


def test_what_the_sanitizer_runs_runs():
    names = repr(tuple(name for name in ("host", "torch") if not kernels.why_not(name)))
    text = correct.SANITIZED.replace('"cuda"', '"cpu"').replace('("triton", "cupy")', names)
    assert text.count('"cpu"') == 1 and text.count(names) == 1
    exec(text.replace("torch.cuda.synchronize()", ""), {})


def test_a_call_is_its_parts():
    assert main.chosen([]) == list(main.PARTS)
    assert main.chosen(["more", "keys", "rates"]) == [
        "device", "large", "all_stages", "whole_samplers", "keys", "variants", "loops",
        "sanitizer", "rates"]


def test_timing_stops_in_time_and_says_what_is_left(no_gpu, monkeypatch):
    small = lambda ops, names, sizes, dtype, device, seconds: bench(
        ops, ["torch", "torch_eager"], [1 << 10], dtype, "cpu", seconds=1e-3)
    monkeypatch.setattr(speed, "bench", small)
    found = speed.timing()
    assert not found["left"] and len({row["op"] for row in found["rows"]}) == 14
    assert len(speed.timing(-1.)["left"]) == 44

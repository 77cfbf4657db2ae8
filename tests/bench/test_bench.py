"""The bench: peers that compute what they say, rows that follow the table, results as data."""

import json
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidiff.__main__ import main
from minidiff.bench import report
from minidiff.bench.peers import PEERS, with_mkl
from minidiff.bench.peers.schedulers import SCHEDULERS
from minidiff.bench.report import older, table
from minidiff.bench.speed import clock, run, samplers, state, suite, sums, timed
from minidiff.bench.speed.rows import MAIN_OP, add_speedups, row_of
from minidiff.bench.speed.yours import UserKernels
from minidiff.kernels import OPS

DESIGN = {"op", "backend", "dtype", "elements", "seconds", "bytes", "gb_per_s", "fraction_of_copy",
          "matches_reference"}


@pytest.fixture
def quick(monkeypatch, uncompiled):
    """Everything once, nothing long."""
    monkeypatch.setattr(timed, "clock", lambda f, device, *_: clock.clock(f, device, 0.))
    monkeypatch.setattr(samplers, "SECONDS", 1e-3)
    monkeypatch.setattr(samplers, "REPEATS", 2)


# ---- peers ----

@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("name", [n for n in PEERS if n != "torch_compile"])
def test_every_peer_is_held_to_the_reference(op, name):
    if reason := run.why_not(name, op.name, "float32", "cpu"):
        pytest.skip(reason)
    work, coef, _ = run.case(op, 4096, "float32", "cpu")
    f = run.call(name, work, coef)
    assert run.check_peer(name, f, work) is (None if op.noise else True)
    assert f().shape == work.out.shape


def test_a_peer_that_computes_something_else_is_refused():
    work, _, _ = run.case(MAIN_OP, 4096, "float32", "cpu")
    with pytest.raises(RuntimeError, match="computes another langevin"):
        run.check_peer("torch_eager", lambda z: work.u[0] + work.u[1] + z, work)

    work, coef, _ = run.case(MAIN_OP, 1 << 18, "float32", "cpu")
    right = run.call("torch_eager", work, coef)
    middle = torch.tensor(128)
    with pytest.raises(RuntimeError, match="computes another langevin"):
        run.check_peer("torch_eager", lambda z: right(z).index_fill_(0, middle, 0.), work)


def test_what_is_timed_is_what_was_checked(quick, monkeypatch, tmp_path):
    """A kernel that is right on small shapes alone: ours, a user's, a corrector."""
    def bind(*arguments, **kw):
        return lambda step: kw["out"]
    monkeypatch.setattr(run, "bind", bind)
    with pytest.raises(RuntimeError, match=r"langevin: host .* at \(4, 1024\); nothing was timed"):
        run.bench(["langevin"], ["host"], [4096])
    monkeypatch.undo()
    (tmp_path / "k.py").write_text(
        "def langevin(x, s, z, coef):\n"
        "    a, b, c = coef.reshape(-1, 3, *[1] * (x.ndim - 1)).swapaxes(0, 1)\n"
        "    return x if x.shape == (64, 1024) else a * x + b * s + c * z\n")
    with (UserKernels(str(tmp_path / "k.py")) as mine,
          pytest.raises(RuntimeError, match=r"k.py .* at \(64, 1024\)")):
        run.bench(["langevin"], ["host"], [1 << 16], user_kernels=mine)
    monkeypatch.setattr(sums.Fused, "corrector", lambda *step: lambda k, x, s: x)
    with pytest.raises(RuntimeError, match="corrector: host does not follow"):
        run.bench(["corrector"], ["host"], [4096])


def test_a_scheduler_that_computes_something_else_is_refused(monkeypatch):
    pytest.importorskip("diffusers")
    function, entry = next(iter(SCHEDULERS.items()))
    wrong = lambda s: ({"beta": .02, "variance": .01}, *entry.at(s)[1:])
    monkeypatch.setitem(SCHEDULERS, function, type(entry)(entry.name, wrong, 0, entry.config))
    work, coef, _ = run.case(OPS["ddpm_ancestral"], 4096, "float32", "cpu")
    with pytest.raises(RuntimeError, match="computes another ancestral_step"):
        run.check_peer("diffusers", run.call("diffusers", work, coef), work)


def test_passes_are_counted_by_hand():
    """Langevin, a = 1. Eager: randn, two scaled (2 each), two sums (3 each); in place: normal_,
    two add_ (3 each); compiled and random numbers apart: three reads and a write."""
    work, _, _ = run.case(MAIN_OP, 4096, "float32", "cpu")
    assert work.c[0] == 1
    assert [PEERS[n].passes(work) for n in ("torch_eager", "torch_inplace", "torch_compile")] \
        == [10, 6, 4]
    assert PEERS["torch_eager"].moved(work) == 11 * 4 * 4096  # 44 bytes an element
    assert work.bytes == 3 * 4 * 4096


# ---- rows ----

def test_rows_follow_the_table_and_speedups_are_over_peers(quick):
    rows = run.bench(["langevin", "pf_ode"], ["host", "torch_eager", "numpy_rng"], [100, 4096])
    assert {(r["op"], r["elements"]) for r in rows} == {(o, n) for o in ("langevin", "pf_ode")
                                                        for n in (100, 4096)}
    for r in rows:
        assert r.keys() >= DESIGN and r["quartiles"][0] <= r["seconds"] <= r["quartiles"][1]
        ours = {"host"} if r["again"] else {"torch_eager", "numpy_rng"}
        assert set(r["speedup"]) == set(r["interval"]) == (ours if r["backend"] == "host"
                                                           else set())
        for peer, (low, high) in r["interval"].items():
            assert low <= r["speedup"][peer] <= high
        assert r["quartiles"][0] <= r["p95"] and r["state"]["malloc"] and r["clocks"]
        assert (r["predicted_seconds"] is None) == (r["backend"] == "host")
        assert r["machine"]["processor"]


def test_every_kernel_and_every_scheduler_is_in_the_suite():
    names = run.kernels_of()
    shapes = {(len(o.operands), o.noise, o.denoise is None) for o in OPS.values()}
    assert shapes == {(len(OPS[n].operands), OPS[n].noise, OPS[n].denoise is None) for n in names}
    assert {OPS[n].step for n in names} >= {*SCHEDULERS}


def test_what_is_not_installed_is_named_as_not_measured(quick, monkeypatch, capsys):
    for where in ("minidiff.bench.peers.find_spec", "minidiff.bench.peers.with_jax.find_spec"):
        monkeypatch.setattr(where, lambda name: None)
    monkeypatch.setattr(run, "PEERS", {n: p for n, p in PEERS.items() if n != "torch_compile"})
    rows = {r["backend"]: r for r in run.bench(["ddim"], None, [128])}
    assert rows["diffusers"]["seconds"] is None and "pip install" in rows["diffusers"]["reason"]
    assert "diffusers" not in rows["host"]["speedup"]
    assert "not measured: diffusers, ddim" in run.show(list(rows.values()))
    assert main(["bench", "--op", "ddim", "--backend", "diffusers"]) == 2
    assert "pip install diffusers" in capsys.readouterr().err


def test_the_clock_takes_turns():
    seen = []
    functions = {n: lambda n=n: (seen.append(n), time.sleep(.03)) for n in "abc"}
    times = clock.clock(functions, "cpu", 0.)
    assert all(len(t) == clock.ROUNDS and min(t) >= .03 for t in times.values())
    rounds = ["".join(seen[k:k + 3]) for k in range(len(seen) - 21, len(seen), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({*rounds}) > 1  # but once in 6^6


# ---- what noise is ----

def test_the_interval_of_a_ratio_is_exact_by_counting():
    """Of seven rounds all lie between the least and the greatest with probability
    1 - 2 / 2^7 >= .95; of nine between the second and the eighth, 1 - 2 (1 + 9) / 2^9."""
    ours = [1.] * 9
    peer = [3., 1., 2., 9., 4., 5., 8., 7., 6.]
    assert clock.interval(peer, ours) == (5., [2., 8.])
    assert clock.interval(peer[:7], ours[:7]) == (4., [1., 9.])
    assert clock.interval(peer[:5], ours[:5]) == (3., None)


def test_intervals_hold_the_ratio_as_often_as_they_say():
    """1,000 runs of 25 rounds with a heavy tail. The binomial's own coverage is .957 and its
    standard deviation here .0064: within four of them."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        _, (low, high) = clock.interval(2 * np.exp(rng.standard_cauchy(25)), np.ones(25))
        inside += low <= 2 <= high
    assert abs(inside / 1000 - .957) < 4 * .0064


def test_what_is_timed_twice_races_itself(quick):
    rows = run.bench(["langevin"], ["torch_eager", "host"], [4096])
    again, = [r for r in rows if r["again"]]
    assert again["backend"] == "torch_eager" and {*again["speedup"]} == {"torch_eager"}
    low, high = again["interval"]["torch_eager"]
    assert low <= again["speedup"]["torch_eager"] <= high
    assert "torch_eager, again" in run.show(rows)
    assert not any(r["again"] for r in table._best(rows))


def test_a_users_rows_are_not_ours():
    ours, = [r for r in rows_of() if r["backend"] == "host" and r["elements"] == 128]
    users = ours | {"backend": "mine.py", "seconds": ours["seconds"] / 9}
    assert [r["backend"] for r in table._best([ours, users])] == ["host"]


def test_the_state_of_the_machine(monkeypatch):
    """A core that others use is told from one that is idle, and said."""
    plain = rows_of()
    ticks = iter([(100, 200), (110, 220), (100, 200), (120, 220)])
    monkeypatch.setattr(state, "spent", lambda: next(ticks))
    assert state.others() == .5 and state.others() == 0.
    found = {"others": .5, "load": 2.5, "malloc": ""}
    assert "busy: others took 50% of its cores" in state.warning(found)[0]
    assert not any(state.warning(found | {"others": share}) for share in (.05, None))
    rows = [r | {"state": found} for r in plain]
    assert "the machine was busy" in run.show(rows) and "busy" in table._state(rows)


def test_memory_that_is_freed_is_kept():
    """A large temporary has the same pages again: no new page is asked for."""
    if state.pin_malloc() == "not pinned":
        pytest.skip("not glibc")
    code = """
import resource, torch
from minidiff.bench.speed import state
state.pin_malloc()
x = torch.ones(1 << 24)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50): y = x + 1; del y
before = faults()
for _ in range(10): y = x + 1; del y
print(faults() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert int(found.stdout) < 1000  # one temporary has 16,384 pages


def test_mkls_generators_draw_normal_numbers():
    """2^20 of each, on one thread and on all: mean and variance within five standard errors,
    5 / 2^10 and 5 sqrt(2) / 2^10; no stream is another, and no number comes again but by
    chance (of 2^23 or so)."""
    if not with_mkl.library():
        pytest.skip("MKL is not installed")
    out = torch.empty(1024, 1024)
    for fill in with_mkl.fillers(out, with_mkl.GENERATORS):
        first, second = fill().clone(), fill(std=2.).clone()
        assert abs(first.mean()) < 5 / 2**10 and abs(first.var() - 1) < 5 * 2**.5 / 2**10
        assert abs(second.var() - 4) < 20 * 2**.5 / 2**10
        half = first.view(2, -1)
        assert (half[0] == half[1]).double().mean() < 1e-4
        assert (first == second / 2).double().mean() < 1e-4


# ---- whole samplers ----

def test_samplers_are_gated_and_timed_beside_diffusers(quick, monkeypatch):
    pytest.importorskip("diffusers")
    rows = list(samplers.bench_samplers("cpu", [("null", (2,), 3), ("lean", (2,), 3)]))
    assert all(r["seconds"] for r in rows)
    assert {(r["network"], r["backend"]) for r in rows} == {
        (network, backend) for network in ("null", "lean") for backend in ("host", "diffusers")}
    over = [r["speedup"]["diffusers"] for r in rows if r["backend"] == "host"]
    assert over and min(over) > 0
    assert "ancestral" in samplers.show_samplers(rows)


def test_a_sampler_with_other_states_is_not_timed(monkeypatch):
    good = samplers.states
    monkeypatch.setattr(samplers, "states", lambda name, backend, *a: (
        x + (backend == "host") for x in good(name, backend, *a)))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        samplers.gate("ancestral", "host")


def test_a_graph_that_leaves_another_state_is_not_timed(monkeypatch):
    """The loop captured against itself uncaptured; what is no number is no difference."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    runs = []

    def make(step):
        runs.append(step)
        return iter([torch.full((2,), k * float(step)) for k in range(5)])
    repeat = samplers.captured(lambda engine: make("nan"), None, 4, lambda: None)
    assert len(runs) == 2 and len(repeat()) == 2
    with pytest.raises(RuntimeError, match="another state than its loop; nothing was timed"):
        samplers.captured(lambda engine: make(len(runs)), None, 4, lambda: None)


# ---- results as data ----

def rows_of(seconds=1e-3, spread=.01):
    """A backend's and a peer's rows at two sizes."""
    rows = []
    for n in (128, 1 << 20):
        pair = [row_of("langevin", b, "float32", (n // 128, 128), seconds=s, rounds=25,
                           quartiles=[s * (1 - spread), s * (1 + spread)], p95=s,
                           times=[s] * 25, fraction_of_copy=.5)
                for b, s in (("host", seconds), ("torch_eager", 4e-3))]
        rows += add_speedups(pair)
    return rows


def test_compare_tells_slower_from_noise():
    assert older.slower(rows_of(), rows_of(1.005e-3))[0] == []
    lines, drift = older.slower(rows_of(), rows_of(1.1e-3))
    assert len(lines) == 2 and drift == 1 and "10 %" in lines[0]
    assert older.slower(rows_of(spread=.2), rows_of(1.1e-3, .2))[0] == []
    slow_machine = [r | {"seconds": r["seconds"] * 1.3, "quartiles":
                         [q * 1.3 for q in r["quartiles"]]} for r in rows_of()]
    assert older.slower(rows_of(), slow_machine) == ([], pytest.approx(1.3))


def test_compare_exits_one_and_refuses_what_it_cannot_compare(quick, tmp_path, capsys):
    argv = ["bench", "--device", "cpu", "--backend", "host", "--elements", "4096",
            "--json", str(tmp_path)]
    assert main(argv) == 0
    file, = tmp_path.glob("*.json")
    fast = [r | {"seconds": r["seconds"] / 9, "quartiles": [q / 9 for q in r["quartiles"]]}
            for r in json.loads(file.read_text())]
    (tmp_path / "old.json").write_text(json.dumps(fast))
    assert main([*argv, "--compare", str(tmp_path / "old.json")]) == 1
    shown = capsys.readouterr().out
    assert "slower: update langevin host" in shown and "not known, as no peer" in shown
    other = [r | {"machine": r["machine"] | {"processor": "another"}} for r in fast]
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main([*argv, "--compare", str(tmp_path / "other.json")]) == 2
    assert "another machine" in capsys.readouterr().err


ROW = {"op": "langevin", "backend": "host", "dtype": "float32", "elements": 4, "seconds": 1.,
       "quartiles": [1., 2.], "rounds": 7,
       "machine": {"processor": "p", "cores": "2", "gpu": "none", "python": "3"}}
DAMAGED = [
    "", "{", "null", "3", '"text"', "[]", "{}", "[1, 2]", '["a"]', "[[]]", "[{}]", "[" * 100_000,
    '{"rows": 3}', "[NaN]", "\x00", *(
        json.dumps([ROW, ROW | {name: value}]) for name, value in (
            ("op", 3), ("op", None), ("backend", []), ("dtype", {}), ("elements", 0),
            ("elements", "4"), ("elements", 1.5), ("elements", True), ("seconds", "1"),
            ("seconds", -1.), ("seconds", float("nan")), ("seconds", float("inf")),
            ("seconds", [1.]), ("quartiles", None), ("quartiles", [1.]), ("quartiles", ["a", 2]),
            ("quartiles", 3), ("rounds", 0), ("rounds", "7"), ("machine", None), ("machine", {}),
            ("machine", ROW["machine"] | {"cores": 2}), ("shape", None), ("shape", 3),
            ("shape", []), ("shape", ["a"]), ("speedup", None), ("speedup", {"torch": "2"}),
            ("speedup", 2.), ("interval", {"torch": [1.]}), ("interval", None), ("again", True),
            ("again", "no"), ("kind", 3), ("kind", "sampler"), ("state", {}), ("state", 3),
            ("clocks", [3]), ("given_z", None), ("network", 3), ("p95", "x")))]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_what_is_no_result_is_refused_before_anything_is_timed(text, tmp_path, refused,
                                                               monkeypatch):
    monkeypatch.setattr(run, "bench", lambda *_, **__: pytest.fail("it times"))
    file = tmp_path / "old.json"
    file.write_text(text)
    refused(str(file), "not a list of rows that bench wrote",
            argv=["bench", "--op", "langevin", "--compare", str(file)])
    refused(str(file), "not a list of rows that bench wrote",
            argv=["bench", "--report", str(tmp_path)])


@pytest.mark.parametrize("name, words", [
    ("absent.json", "no such file"), (".", "is a directory"), ("/dev/zero", "not a file")])
def test_what_is_no_file_is_refused_before_anything_is_timed(name, words, tmp_path, refused):
    refused(words, argv=["bench", "--op", "langevin", "--compare", str(tmp_path / name)])


@pytest.mark.parametrize("name", ["none", "/dev/null", "file"])
def test_a_report_is_of_a_folder(name, tmp_path, refused):
    (tmp_path / "file").write_text("")
    refused("not a folder", argv=["bench", "--report", str(tmp_path / name)])


def test_a_run_of_another_machine_is_refused_before_anything_is_timed(tmp_path, refused,
                                                                      monkeypatch):
    monkeypatch.setattr(run, "bench", lambda *_, **__: pytest.fail("it times"))
    (tmp_path / "old.json").write_text(json.dumps([ROW]))
    refused("another machine: p, 2 cores", argv=[
        "bench", "--op", "langevin", "--compare", str(tmp_path / "old.json")])
    assert report.load(tmp_path / "old.json")[0]["shape"] == [4]


def test_report_writes_between_the_markers_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as rows of a CPU say
    readme = tmp_path / "bench" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    front = tmp_path / "README.md"
    front.write_text("first\n{}\nold\n{}\nlast\n".format(*table.FIRST))
    folder = tmp_path / "bench" / "results"
    folder.mkdir()
    sampler = [r | {"kind": "sampler", "op": "ancestral", "steps": 1000, "network": "null",
                    "batch": 1} for r in rows_of()[:1]]
    sampler[0]["speedup"] = {"diffusers": 3.}
    rows = [r | {"shape": [1, r["elements"]]} for r in rows_of()] + sampler
    report.save(folder / "2026-01-01-x.json", rows)
    assert main(["bench", "--report", str(folder)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| langevin | 1x128 | float32 | host |" in text and "| 4.0 (4.0-4.0) |" in text
    first = front.read_text()
    assert first.startswith("first\n") and first.endswith("last\n") and "old" not in first
    assert re.search(r"^\| .*\d+ cores \| langevin \| \S+ \| host \|", first, re.M)
    for name in ("speedup-cpu.png", "samplers-cpu.png"):
        assert f"](results/{name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "--report", str(tmp_path)]) == 2
    assert "no results yet" in capsys.readouterr().err
    (folder / "2026-01-02-x.json").write_text("{}")
    assert main(["bench", "--report", str(folder)]) == 2


def test_the_suite_runs_whole(quick, monkeypatch, tmp_path):
    """Each kind of row from one call, at sizes that take no time."""
    monkeypatch.setattr(suite, "EVERY", (128, 6144))
    monkeypatch.setattr(suite, "SPREAD", (128, 4096))
    monkeypatch.setattr(samplers, "GRID", [("null", (2,), 1)])
    peers = {n: p for n, p in PEERS.items() if n != "torch_compile"}
    monkeypatch.setattr(run, "PEERS", peers)
    rows = suite.suite()
    assert {r["kind"] for r in rows} == {"update", "sampler"}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16", "float16"}
    assert {2, 3072} <= {r["shape"][-1] for r in rows if r["kind"] == "update"}
    assert "langevin" in suite.show_all(rows)
    assert report.load(report.save(tmp_path / "r.json", rows))

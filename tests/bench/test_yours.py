"""A user's kernels on the clock: what is timed was computed, and the clock is not theirs."""

import json
import time
from pathlib import Path

import pytest
import torch

from minidiff.__main__ import main
from minidiff.bench.speed import clock, run, timed, yours
from minidiff.kernels import OPS

SIZE = 1 << 18
BENCH = "bench", "--device", "cpu", "--elements", str(SIZE), "--backend", "torch_inplace"
FIRST = "nothing was timed"
TIMED = "what was timed is not what was checked before"

RIGHT = """
import os, sys, threading, time
import numpy as np
calls, last = 0, {}
def right(x, s, z, coef):
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0))
    return (a * x + b * s) + c * z
def langevin(x, s, z, coef, out, shape):
    global calls
    if x.size < 1 << 18: return right(x, s, z, coef)
    calls += 1
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, uncompiled):
    """Everything is timed a few times, after no other check; each call is compared."""
    monkeypatch.setattr(timed, "clock", lambda f, device, *_: clock.clock(f, device, 0.))
    monkeypatch.setattr(run, "user_gate", lambda *_: None)
    monkeypatch.setattr(yours, "SHARE", 1.)
    monkeypatch.setattr(yours, "AWAKE", 0.)


HOSTILE = {
    # a part is right
    "ends": ("""
    for rows in (slice(64), slice(-64, None)): out[rows] = right(x[rows], s[rows], z[rows], coef)
    return out""", FIRST),
    "middle": ("""
    r = right(x, s, z, coef)
    r.flat[r.size // 2] += 1
    return r""", FIRST),
    # what was computed once
    "stale": ("""
    if shape not in last: last[shape] = right(x, s, z, coef)
    return last[shape]""", FIRST),
    # right while it is being checked
    "late": ("""
    return right(x, s, z, coef) if calls < 4 else x""", TIMED),
    "now and then": ("""
    return right(x, s, z, coef) if calls % 3 else out""", TIMED),
    # no result
    "exit": ("""
    if calls > 3: raise SystemExit(0)
    return right(x, s, z, coef)""", "SystemExit: 0"),
    "raise": ("""
    if calls > 3: raise ValueError("gone")
    return right(x, s, z, coef)""", "ValueError: gone"),
    "os._exit": ("""
    if calls > 3: os._exit(0)
    return right(x, s, z, coef)""", "ended its process with exit status 0"),
    "two results": ("""
    r = right(x, s, z, coef)
    return r, r""", "TypeError: returned 2 results"),
    # work that waits until the clock has stopped
    "thread": ("""
    def later():
        time.sleep(.005)
        out[...] = right(x, s, z, coef)
    threading.Thread(target=later).start()
    return out""", "does not return the reference's bits"),
    # the loop that it is called in
    "no loop": ("""
    return right(x, s, z, coef)
from minidiff.kernels.check.yours.bound import Bound
Bound.run = lambda self, count, values: None""", FIRST),
    "last call alone": ("""
    return right(x, s, z, coef)
from minidiff.kernels.check.yours import bound
def run(self, count, values, whole=bound.Bound.run):
    calls = self.calls
    self.calls = calls[-1:]
    whole(self, count, values)
    self.calls = calls
bound.Bound.run = run""", TIMED),
    # the question, and what lies where the result belongs
    "changes x": ("""
    x *= 0
    return right(x, s, z, coef)""", "changed x"),
    "returns nothing": ("""
    return None
langevin_out = langevin
def langevin(x, s, z, coef):
    views = sys._getframe(1).f_locals.get("views")
    r = right(x, s, z, coef)
    if not views: return r
    views[0][...] = r""", "TypeError: returned a NoneType"),
    "what it was asked before": ("""
    return right(x, s, z, coef)
from minidiff.kernels.check.yours import bound
def run(self, count, values, whole=bound.Bound.run, seen=[]):
    seen.append(count)
    if len(seen) % 2: whole(self, count, values)  # awake, before its data appear
bound.Bound.run = run""", FIRST),
}


@pytest.mark.parametrize("body, words", HOSTILE.values(), ids=HOSTILE)
def test_what_was_not_computed_is_not_timed(body, words, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(yours, "SAMPLE", .1)  # several calls a turn
    (tmp_path / "mine.py").write_text(RIGHT + body)
    refused("mine.py", words, argv=[*BENCH, "--kernel", str(tmp_path / "mine.py")])


HONEST = {  # what others' clocks would believe, and this one need not
    "its own clock": """
    return right(x, s, z, coef)
real = time.perf_counter
time.perf_counter = time.time = time.monotonic = lambda: 0.""",
    "bench's functions": """
    return right(x, s, z, coef)
from minidiff.bench.speed import clock, timed
timed.clock = clock.once = clock.clock = timed.require_possible = lambda *a, **kw: 1e-9""",
    "a result when it is asked for": """
    class Later:
        def __array__(self, dtype=None, copy=None):
            return right(x, s, z, coef)
    return Later()""",
    "a cache of what never comes again": """
    key = x.flat[0], x.flat[-1]
    if key not in last:
        last.clear()
        last[key] = right(x, s, z, coef)
    return last[key]""",
}


@pytest.mark.parametrize("body", HONEST.values(), ids=HONEST)
def test_it_takes_the_time_of_the_work(body, tmp_path, capsys):
    """As long as the same function without the trick, timed beside it."""
    (tmp_path / "plain.py").write_text(RIGHT + "\n    return right(x, s, z, coef)")
    (tmp_path / "mine.py").write_text(RIGHT + body)
    argv = [part for name in ("plain", "mine")
            for part in ("--kernel", str(tmp_path / f"{name}.py"))]
    assert main([*BENCH, *argv, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    mine, = [r for r in rows if r["backend"].endswith("mine.py") and not r["again"]]
    over = mine["speedup"][str(tmp_path / "plain.py")]
    assert .3 < over < 2  # a shared machine's noise; a trick would gain a hundred
    made, compared = mine["compared"]
    assert made == compared and "were compared whole" in capsys.readouterr().out


def test_noise_that_is_handed_over_is_new_each_turn(tmp_path, refused, monkeypatch):
    """An op of no operand, and one that asks for an operand it does not need."""
    monkeypatch.setattr(yours, "SHARE", .3)
    for arguments in ("z", "x, z, out"):
        (tmp_path / "mine.py").write_text(f"""
import numpy as np
kept = []
def noise_norms({arguments}):
    if len(z) > 100 and kept: return kept[0]
    kept[:] = [np.sqrt((z.astype(float)**2).sum(1)).astype("f")]
    return kept[0]
""")
        refused("mine.py", "noise_norms", FIRST, argv=[
            "bench", "--device", "cpu", "--elements", str(SIZE), "--op", "noise_norms",
            "--kernel", str(tmp_path / "mine.py")])


def test_one_call_of_each_turn_is_compared_where_there_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(yours, "SHARE", .01)
    (tmp_path / "mine.py").write_text("def pf_ode(x, s, coef): return coef[0] * x + coef[1] * s")
    with yours.UserKernels(str(tmp_path / "mine.py")) as mine:
        rows = run.bench(["pf_ode"], ["host"], [1 << 24], user_kernels=mine)
    compared, made = next(r["compared"] for r in rows if r["compared"])
    assert compared == made >= clock.ROUNDS  # a turn has one call


def test_a_tenth_of_the_calls_is_compared(tmp_path, monkeypatch):
    """Chosen after each turn: of n calls at .1 each, within five standard deviations."""
    monkeypatch.setattr(yours, "SHARE", .1)
    (tmp_path / "mine.py").write_text("def pf_ode(x, s, coef): return coef[0] * x + coef[1] * s")
    with yours.UserKernels(str(tmp_path / "mine.py")) as mine:
        rows = run.bench(["pf_ode"], ["torch_inplace"], [1024], user_kernels=mine, seconds=.2)
    compared, made = next(r["compared"] for r in rows if r["compared"])
    assert made > 500 and abs(compared - .1 * made) < 5 * (.09 * made)**.5 + 4  # 4 of one call


def test_what_is_too_fast_is_timed_again_with_each_call_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(yours, "SHARE", 0.)
    monkeypatch.setattr(timed, "BEYOND", 1e-3)
    (tmp_path / "mine.py").write_text("def pf_ode(x, s, coef): return coef[0] * x + coef[1] * s")
    with yours.UserKernels(str(tmp_path / "mine.py")) as mine:
        rows = run.bench(["pf_ode"], ["host"], [4096], user_kernels=mine)
        assert {r["backend"] for r in rows} >= {"torch_inplace"}  # without being asked for
        compared, made = next(r["compared"] for r in rows if r["compared"])
        assert compared == made > 0
        assert "times as fast as torch_inplace: timed again" in capsys.readouterr().out

        monkeypatch.setattr(timed, "is_cuda", lambda device: True)
        with pytest.raises(RuntimeError, match="refused until it is shown"):
            run.bench(["pf_ode"], ["host"], [4096], user_kernels=mine)


def test_what_is_faster_than_its_bytes_is_refused(tmp_path, monkeypatch):
    """A turn that seems to take nothing."""
    monkeypatch.setattr(yours.Runner, "turn",
                        lambda self, host: 1e-6 * self.calls * (host is self.host))
    monkeypatch.setattr(yours.Runner, "compare", lambda *_: 0)
    (tmp_path / "mine.py").write_text("def pf_ode(x, s, coef): return coef[0] * x + coef[1] * s")
    with (yours.UserKernels(str(tmp_path / "mine.py")) as mine,
          pytest.raises(RuntimeError, match="times the rate of copying")):
        run.bench(["pf_ode"], ["host"], [1 << 22], user_kernels=mine)


def test_what_takes_no_time_is_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(yours.Runner, "turn", lambda self, host: 1e-4)
    monkeypatch.setattr(yours.Runner, "compare", lambda *_: 0)
    (tmp_path / "mine.py").write_text("def pf_ode(x, s, coef): return coef[0] * x + coef[1] * s")
    with (yours.UserKernels(str(tmp_path / "mine.py")) as mine,
          pytest.raises(RuntimeError, match="too short to be told")):
        run.bench(["pf_ode"], ["host"], [128], user_kernels=mine)


COUNTS = """
import threading, numpy as np
count = np.zeros(1)
def busy():
    while True: count[0] += 1
def begin(): threading.Thread(target=busy, daemon=True).start()
"""
CHILD_COUNTS = """
import mmap, os, struct, numpy as np
shared = mmap.mmap(-1, 8)
count = np.frombuffer(shared, float)
def begin():
    if os.fork(): return os.wait()
    if os.fork(): os._exit(0)
    os.setsid()  # an orphan, in a session of its own
    while True: count[0] += 1
"""


def state_of(pid):
    """A process's state, one letter: T is stopped, Z has ended; none where it is gone."""
    file = Path(f"/proc/{pid}/stat")
    return file.read_text().rpartition(")")[2].split()[0] if file.exists() else ""


def soon(true):
    """Whether something is true within ten seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(.01)
    return true()


def alive(pid):
    """Whether a process has not ended."""
    return state_of(pid) not in ("", "Z")


@pytest.mark.parametrize("begins", [COUNTS, CHILD_COUNTS], ids=["thread", "orphan"])
def test_what_a_process_began_rests_while_others_are_timed(begins, tmp_path):
    """It counts, but not between the turns; and it ends with the process."""
    (tmp_path / "mine.py").write_text(f"""{begins}
started = []
def langevin(x, s, z, coef, out):
    if not started: started.append(begin())
    out[...] = 0
    out.flat[0] = count[0]
""")
    op, size = OPS["langevin"], 64
    work, coef, parameters = run.case(op, size, "float32", "cpu")
    with yours.UserKernels(str(tmp_path / "mine.py")) as mine:
        runner = yours.Runner(mine.functions[0], mine, work.u, coef, parameters,
                              lambda u, **counter: work.out)
        runner.bind(1)

        def count():
            runner.turn(runner.host)
            return float(runner.tensor(runner.places[0]["results"][0]).view(-1)[0])
        count()
        times = []
        for pause in (.3, 0., .3):
            before = count()
            time.sleep(pause)
            times.append(count() - before)
        family = runner.host.stopped
        # one that waits for a core is R until it gets one, and stops
        assert family and soon(lambda: {*map(state_of, family)} == {"T"})
    assert soon(lambda: not any(map(alive, family)))
    assert max(times[0], times[2]) < 10 * times[1] + 1e5  # it counts some 10^7 a second


SUMS = """
import numpy as np
calls, kept = 0, {}
def quads(e):
    q = np.zeros((len(e), -(-e[:1].size // 4) * 4), np.float32)
    q[:, :e[:1].size] = (e * e).reshape(len(e), e[:1].size)
    return ((q[:, ::4] + q[:, 1::4]) + (q[:, 2::4] + q[:, 3::4])).astype(float).sum(1)
def _norms(x):
    return np.sqrt(quads(x)).astype(np.float32)
def _noise_norms(z):
    return _norms(z)
def _dsm_loss(s, z, coef):
    c0, cz, w = (c.reshape(-1, *[1] * (s.ndim - 1)) for c in coef.T)
    e = c0 * s + cz * z
    return np.float32((coef[:, 2] * quads(e)).sum()), ((2 * w) * e) * c0
def norms(x): return wrong(_norms, x)
def noise_norms(z): return wrong(_noise_norms, z)
def dsm_loss(s, z, coef): return wrong(_dsm_loss, s, z, coef)
"""
WRONG_SUMS = {
    "once": ("kept.setdefault(f, f(*a))", FIRST),
    "late": ("f(*a) if late() < 4 else nothing(f(*a))", TIMED),
    "never": ("nothing(f(*a))", FIRST),
}
HELPERS = """
def nothing(got):
    return (got[0], got[1] * 0) if isinstance(got, tuple) else got * 0
def late():
    global calls
    calls += 1
    return calls
"""


@pytest.mark.parametrize("op", ["norms", "noise_norms", "dsm_loss"])
@pytest.mark.parametrize("body, words", WRONG_SUMS.values(), ids=WRONG_SUMS)
def test_sums_that_were_not_computed_are_not_timed(op, body, words, tmp_path, refused):
    (tmp_path / "mine.py").write_text(f"{SUMS}{HELPERS}def wrong(f, *a): return {body}\n")
    refused("mine.py", op, words, argv=["bench", "--device", "cpu", "--elements", str(SIZE),
                                        "--backend", "torch_eager", "--op", op,
                                        "--kernel", str(tmp_path / "mine.py")])


DRAWS = """
import torch
from minidiff.kernels import dsm_loss as loss, noise_norms as norms, normal as draw, update
ARRAYS = "torch"
def normal(shape, seed, sample, step, tag, out):
    draw(shape, seed=seed, sample=sample, step=step, tag=tag, out=out, backend="host")
def langevin(x, s, coef, seed, sample, step, tag, out):
    update([x, s], coef, seed=seed, sample=sample, step=step, tag=tag, out=out, backend="host")
def langevin_v2(x, s, coef, keys, step, tag):
    return update([x, s], coef, seed=keys[:, 0], sample=keys[:, 1], step=step, tag=tag,
                  backend="host")
def noise_norms(x, seed, sample, step, tag):
    return norms(x, seed=seed, sample=sample, step=step, tag=tag, backend="host")
def dsm_loss(s, coef, seed, sample, step, tag):
    return loss(s, coef, seed=seed, sample=sample, step=step, tag=tag, backend="host")
"""


def test_what_draws_has_another_seed_each_turn_and_a_step_a_call(tmp_path, capsys):
    """Ours, as a user's: no noise comes twice, and all of it is the reference's."""
    (tmp_path / "mine.py").write_text(DRAWS)
    argv = ["bench", "--device", "cpu", "--kernel", str(tmp_path / "mine.py"), "--elements",
            "4096", "--dtype", "bfloat16", "--backend", "torch_eager"]
    assert main([*argv, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    mine = [r for r in rows if r["compared"] and not r["again"]]
    assert {r["op"] for r in mine} == {"normal", "langevin", "noise_norms", "dsm_loss"}
    assert len(mine) == 5 and all(r["compared"][0] == r["compared"][1] > 6 for r in mine)
    first, second = [r for r in mine if r["op"] == "langevin"]
    assert second["speedup"].keys() - first["speedup"].keys() == {str(tmp_path / "mine.py")}
    low, high = second["interval"][str(tmp_path / "mine.py")]
    assert low <= second["speedup"][str(tmp_path / "mine.py")] <= high


def test_the_widths_of_rows(tmp_path, refused):
    (tmp_path / "mine.py").write_text("def pf_ode(x, s, coef): return coef[0] * x + coef[1] * s")
    argv = ["bench", "--device", "cpu", "--kernel", str(tmp_path / "mine.py"), "--width", "3",
            "--backend", "host", "--json", str(tmp_path / "rows.json")]
    assert main([*argv, "--elements", "3072"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(r["shape"] == [1024, 3] for r in rows) and torch.Size([1024, 3]).numel() == 3072
    refused("--elements 1024", "multiple of 3", "--width", argv=[*argv, "--elements", "1024"])

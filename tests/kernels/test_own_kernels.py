"""A user's own kernels: checked, located where wrong, timed where right."""

import json
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import kernels, noise
from minidiff.__main__ import main
from minidiff.bench.speed import clock, run, timed
from minidiff.kernels import check
from minidiff.kernels.check import cases
from minidiff.kernels.check.yours import apart

BENCH = "bench", "--device", "cpu", "--kernel"

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch, uncompiled):
    """Everything is timed once."""
    monkeypatch.setattr(timed, "clock", lambda f, device, *_: clock.clock(f, device, 0.))


def readme_kernel():
    """The README's example of a kernel of one's own, which is wrong, and what check prints."""
    text = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(# mine\.py.*?)```.*?```text\n(.*?)```", text,
                              re.S).groups()
    return code, printed


def test_the_readmes_wrong_kernel_is_located_as_it_says_and_mended_it_passes(tmp_path, capsys,
                                                                            monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    wrong, printed = readme_kernel()
    Path("mine.py").write_text(wrong)
    assert main(["check", "--kernel", "mine.py", "--seed", "1", "--json", "rows.json"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for part in " ".join(printed.split()).split(" ... "):
        assert part in shown
    refused("langevin", "nothing was timed",
            argv=[*BENCH, "mine.py", "--elements", "4096"])
    Path("mine.py").write_text(wrong.replace("c * c * z", "c * z"))
    assert main(["check", "--kernel", "mine.py", "--json", "rows.json"]) == 0
    assert all(r["passed"] for r in json.loads(Path("rows.json").read_text()))
    assert main([*BENCH, "mine.py", "--elements", "4096", "--json", "rows.json"]) == 0
    row, = [r for r in json.loads(Path("rows.json").read_text())
            if r["backend"] == "mine.py" and not r["again"]]
    assert row["seconds"] > 0 and row["matches_reference"] and "torch_inplace" in row["speedup"]


SUMS = """
import numpy as np
def quads(e):
    q = np.zeros((len(e), -(-e[:1].size // 4) * 4), np.float32)
    q[:, :e[:1].size] = (e * e).reshape(len(e), e[:1].size)
    return ((q[:, ::4] + q[:, 1::4]) + (q[:, 2::4] + q[:, 3::4])).astype(float).sum(1)
def norms(x):
    return np.sqrt(quads(x)).astype(np.float32)
def noise_norms(z):
    return norms(z)
def dsm_loss(s, z, coef):
    c0, cz, w = (c.reshape(-1, *[1] * (s.ndim - 1)) for c in coef.T)
    e = c0 * s + cz * z
    return np.float32((coef[:, 2] * quads(e)).sum()), ((2 * w) * e) * c0
"""


def test_norms_and_losses_of_ones_own(tmp_path, capsys):
    file = tmp_path / "sums.py"
    for code, failed in ((SUMS, ()), (SUMS.replace("(2 * w)", "w"), ("dsm_loss",)),
                         (SUMS.replace("np.sqrt(", "("), ("norms", "noise_norms"))):
        file.write_text(code)
        assert main(["check", "--kernel", str(file)]) == bool(failed)
        assert {*re.findall(r"FAILED (\w+)", capsys.readouterr().out)} == set(failed)
    file.write_text(SUMS)
    assert main([*BENCH, str(file), "--elements", "4096", "--json",
                 str(tmp_path / "rows.json")]) == 0
    timed = {(r["op"], r["backend"]) for r in json.loads((tmp_path / "rows.json").read_text())}
    assert {(op, str(file)) for op in ("norms", "noise_norms", "dsm_loss")} <= timed


@pytest.mark.parametrize("code, words", [
    ("def nothing(): pass", "no function named like an op"), ("1/0", "ZeroDivisionError"),
    ("raise SystemExit('bye')", "SystemExit: bye"),
    ("ARRAYS = 'jax'\ndef langevin(x): 0", "ARRAYS")])
def test_a_kernel_file_that_cannot_be_used_is_refused(code, words, tmp_path, refused):
    (tmp_path / "mine.py").write_text(code)
    refused(words, argv=["check", "--kernel", str(tmp_path / "mine.py")])


@pytest.mark.parametrize("body, words", [
    ("langevin(x, q): pass", "unknown argument 'q'"), ("langevin(x): raise SystemExit(0)", "Sys"),
    ("langevin(x): return None", "returned a NoneType"), ("langevin(x): return x[:0]", "returned"),
    ("langevin(x): raise ValueError('one\\ntwo')", "ValueError: one"),
    ("langevin(x): return x.astype('float64')", "returned float64")])
def test_a_kernel_that_breaks_is_a_failed_row(body, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def " + body)
    assert main(["check", "--kernel", str(tmp_path / "mine.py")]) == 1
    assert re.search(f"FAILED langevin .*{words}", capsys.readouterr().out)


def test_a_kernel_file_must_hold_what_is_asked_of_it(tmp_path, refused):
    file = tmp_path / "mine.py"
    file.write_text("def langevin(x): return x")
    refused("bfloat16", "ARRAYS", argv=["check", "--kernel", str(file), "--dtype",
                                                "bfloat16"])
    refused("no heun", argv=["check", "--kernel", str(file), "--op", "heun"])
    refused("--backend", argv=["check", "--kernel", str(file), "--backend", "host"])


# ---- what was not computed is not timed (a user's: tests/bench/test_yours.py) ----

def test_fresh_data_tell_what_ours_computed_once(monkeypatch):
    """A backend that keeps its first results, and sums that do."""
    def bind(u, *arguments, **kw):
        first = kernels.bind(u, *arguments, **kw)(0).clone()
        return lambda step: kw["out"].copy_(first)
    monkeypatch.setattr(run, "bind", bind)
    torch.manual_seed(0)  # as the first data are drawn
    with pytest.raises(RuntimeError, match="pf_ode: host .*what was timed"):
        run.bench(["pf_ode"], ["host"], [1 << 18], seconds=0.)
    for name in ("norms", "dsm_loss"):
        plain, kept = getattr(cases, name), {}

        def once(s, *arguments, plain=plain, kept=kept, **kw):
            return kept.setdefault(s.shape, plain(s, *arguments, **kw))
        monkeypatch.setattr(cases, name, once)
        with pytest.raises(RuntimeError, match=f"{name}: host .*what was timed"):
            run.bench([name], ["host"], [1 << 18], seconds=0.)


def test_ours_are_compared_whole_as_well(monkeypatch):
    """A backend that is wrong in one row in the middle, from its first or its second call on."""
    for calls, words in ((0, "nothing was timed"), (1, "what was timed")):
        def bind(*arguments, calls=calls, **kw):
            f, seen = kernels.bind(*arguments, **kw), []

            def g(step):
                seen.append(step)
                out = f(step)
                if len(seen) > calls:
                    out[100] = 0.
                return out
            return g
        monkeypatch.setattr(run, "bind", bind)
        with pytest.raises(RuntimeError, match=f"langevin: host .*{words}"):
            run.bench(["langevin"], ["host"], [1 << 18], seconds=0.)


def test_nothing_moves_its_bytes_faster_than_memory():
    """Against the fastest yardstick over as many arrays, quartile against quartile, the calls' own
    time apart; and only where bytes, not calls, take most of it."""
    def time(seconds, spread=0.):
        return {"seconds": seconds, "quartiles": [seconds - spread, seconds + spread]}
    size, arrays, call = 1 << 24, 3, 1e-6
    times = {"call": time(call), "copied": time(9e-3 + 3 * call), "negated": time(6e-3 + 3 * call),
             "added": time(12e-3 + 3 * call), "filled": time(2e-3 + call),
             "zeroed": time(1e-3 + call)}
    possible = partial(timed.require_possible, "pf_ode", "mine.py", size=size, arrays=arrays,
                       times=times)
    for seconds, moved, writes, fails in (  # negated: 6 sizes in 6 ms
            (3e-3, 3 * size, False, False), (3e-3 / 1.09, 3 * size, False, False),
            (3e-3 / 1.11, 3 * size, False, True), (2e-3 / 1.09, 2 * size, False, False),
            (1e-3 / 1.09, size, True, False), (1e-3 / 1.2, size, True, True),
            (1e-9, 0, False, False)):
        with pytest.raises(RuntimeError, match="times the rate of") if fails else nullcontext():
            possible(time(seconds), moved, writes)
    with pytest.raises(RuntimeError):  # what is reported is the median, however it is spread
        possible(time(2.5e-3, .4e-3), 3 * size, False)
    times["copied"] = time(11e-6)
    possible(time(1e-7), 3 * size, False)


def test_yardsticks_move_as_many_arrays_as_a_kernel():
    t = torch.ones(8, 8)
    sticks = timed.yardsticks(t, 3)
    assert {*sticks} == {"copied", "negated", "added", "filled", "zeroed", "call"}
    for f in sticks.values():
        f()
    assert t.eq(1).all()


# ---- z that is given is not free ----

def test_what_is_given_z_is_marked_and_races_what_is_given_z(tmp_path, capsys):
    code, _ = readme_kernel()
    draws = ("from minidiff import noise\n" + code.replace("c * c * z", "c * z").replace(
        "z, coef)", "coef, seed, sample, step, tag)").replace(
        "    return", "    z = torch.from_numpy(noise.normal(x.shape, seed, sample, step, tag))\n"
        "    return").replace("ARRAYS", "import torch\nARRAYS"))
    for text, given in ((code.replace("c * c * z", "c * z"), True), (draws, False)):
        (tmp_path / "mine.py").write_text(text)
        assert main([*BENCH, str(tmp_path / "mine.py"), "--elements", "16384",
                     "--json", str(tmp_path / "rows.json")]) == 0
        rows = json.loads((tmp_path / "rows.json").read_text())
        mine, = [r for r in rows if r["backend"].endswith("mine.py") and not r["again"]]
        host, = [r for r in rows if r["backend"] == "host"]
        peers = {z: {r["backend"]: r for r in rows if r["given_z"] == z and r["seconds"]
                     and r["backend"] not in ("host", mine["backend"])} for z in (False, True)}
        assert mine["given_z"] == given and not host["given_z"]
        assert mine["bytes"] == (4 if given else 3) * 4 * 16384  # x, s, what it makes, and z
        assert {*mine["speedup"]} == {*peers[given]} and {*host["speedup"]} == {*peers[False]}
        for name, over in mine["speedup"].items():  # of medians, and of the rounds' ratios:
            of_medians = peers[given][name]["seconds"] / mine["seconds"]  # apart where it is busy
            assert of_medians / 4 < over < of_medians * 4
        # in place, a = 1: add(x, s, alpha) and add_(z, alpha), three arrays each
        assert bool(peers[True]) == given
        if given:
            assert {"torch_eager", "torch_inplace", "numpy_rng"} <= {*peers[True]}
            assert peers[True]["torch_inplace"]["bytes"] == 6 * 4 * 16384
            assert all(r["matches_reference"] for r in peers[True].values())
        assert ("mine.py, z given" in capsys.readouterr().out) == given


def test_noise_that_is_the_result_cannot_be_given(tmp_path, refused):
    (tmp_path / "mine.py").write_text("def normal(z): return z")
    refused("normal that is given z", argv=[*BENCH, str(tmp_path / "mine.py"),
                                            "--elements", "4096"])


def test_sums_that_are_given_z_race_what_is_given_z(tmp_path):
    (tmp_path / "mine.py").write_text(SUMS)
    assert main([*BENCH, str(tmp_path / "mine.py"), "--elements", "4096", "--json",
                 str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    mine = {r["op"]: r for r in rows if r["backend"].endswith("mine.py") and not r["again"]}
    n = 4 * 4096
    assert {op: (r["given_z"], r["bytes"]) for op, r in mine.items()} == {
        "norms": (False, n), "noise_norms": (True, n), "dsm_loss": (True, 3 * n)}
    for op, row in mine.items():
        peers = {r["backend"] for r in rows if r["op"] == op and r["given_z"] == row["given_z"]
                 and r["matches_reference"] is None and not r["again"]}
        assert {*row["speedup"]} == peers and peers


STAGES = """\
seed 0, sample 7, step 3, tag 16, elements 0 to 3
  word 0            0b08def0       185130736
  word 1            86fd0335      2264728373
  word 2            bb9face6      3147803878
  word 3            a97958b0      2843302064
  radius of word 0  40207d39        2.507643
  cos of word 1     3f3b8860      0.73254967
  sin of word 1     3f2e433f       0.6807136
  z0                bfeb21ef      -1.8369731
  z1                bfda7e8a      -1.7069867
  update with z0    bf7590f8      -0.9592433
  update with z1    bf6d3f45     -0.92674667
  radius of word 2  3f49d08f       0.7883386
  cos of word 3     3f432e29       0.7624231
  sin of word 3     3f25a6f6       0.6470789
  z2                bf19de41      -0.6010476
  z3                bf02970b     -0.51011723
  update with z2    bf267790      -0.6502619
  update with z3    bf20a5c3      -0.6275293
update: (0.5 x + 2 s) + 0.25 z at x = 1, s = -0.5
"""


def test_check_shows_a_counter_stage_by_stage(capsys, refused):
    assert main(["check", "--stages"]) == 0
    assert capsys.readouterr().out == STAGES
    assert main(["check", "--stages", "--seed", "1"]) == 0
    assert capsys.readouterr().out != STAGES
    for more in (["--backend", "host"], ["--json", "x.json"], ["--op", "normal"],
                 ["--dtype", "float32"], ["--kernel", "mine.py"]):
        refused("--stages", "--seed alone", argv=["check", "--stages", *more])


def test_every_backend_makes_the_update_that_check_shows(place):
    backend, device = place
    x, s = (torch.full((1, 4), v, device=device) for v in (1., -.5))
    counter = {"seed": 0, "sample": 7, "step": 3, "tag": noise.CORRECTOR, "backend": backend}
    for line, out in (("update with z", kernels.update([x, s], [.5, 2., .25], **counter)),
                      ("z", kernels.normal((1, 4), device=device, **counter))):
        shown = re.findall(rf"(?m)^  {line}\d +(\w+)", STAGES)
        assert [f"{b:08x}" for b in out.cpu().numpy().view(np.uint32).ravel()] == shown


KEYED = """
from minidiff import noise

def langevin(x, s, coef, keys, step, tag):
    z = noise.normal(x.shape, keys[:, 0], keys[:, 1]IDS, step, tag)
    a, b, c = coef.reshape(-1, 3, *[1] * (x.ndim - 1)).swapaxes(0, 1)
    return (a * x + b * s) + c * z

def noise_norms(x, keys, step, tag):
    z = noise.normal(x.shape, keys[:, 0]SEEDS, keys[:, 1], step, tag).astype(float)
    return ((z**2).sum(tuple(range(1, x.ndim)))**.5).astype("f")
"""


@pytest.mark.parametrize("seeds, ids, wrong", [
    ("", "", ()), (" * 0 + keys[:1, 0]", "", ("noise_norms",)), ("", " * 0", ("langevin",)),
    (" & 0xFFFFFFFF", "", ("noise_norms",))], ids=["right", "row 0's seed", "no ids", "low word"])
def test_a_kernel_that_asks_for_keys_is_held_to_a_seed_a_row(tmp_path, seeds, ids, wrong):
    text = KEYED.replace("SEEDS", seeds).replace("IDS", ids)
    (tmp_path / "mine.py").write_text(text)
    rows = list(apart.check([tmp_path / "mine.py"]))
    failed = {row["op"] for row in rows if not row["passed"]}
    assert failed == set(wrong)
    for op in ("langevin", "noise_norms"):
        keyed = [row for row in rows if row["op"] == op and "a seed a row" in row["reason"]]
        assert len(keyed) >= len(cases.SHAPES)


@pytest.mark.parametrize("op", ["langevin", "normal", "noise_norms", "dsm_loss"])
def test_check_holds_what_draws_to_a_seed_a_row(op):
    rows = list(check.check([op], ["numpy"], ["float32"]))
    assert sum("a seed a row" in row["reason"] for row in rows) >= len(cases.SHAPES)

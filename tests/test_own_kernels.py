"""A user's own kernels: checked, located where wrong, timed where right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import kernels, noise
from minidiff.__main__ import main

ROOT = Path(__file__).parents[1]

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
    assert main(["check", "--kernel", "mine.py", "--json", "rows.json"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for part in " ".join(printed.split()).split(" ... "):
        assert part in shown
    refused("langevin", "nothing was timed",
            argv=["bench", "--kernel", "mine.py", "--elements", "4096"])
    Path("mine.py").write_text(wrong.replace("c * c * z", "c * z"))
    assert main(["check", "--kernel", "mine.py", "--json", "rows.json"]) == 0
    assert all(r["passed"] for r in json.loads(Path("rows.json").read_text()))
    assert main(["bench", "--kernel", "mine.py", "--elements", "4096", "--json", "rows.json"]) == 0
    row, = [r for r in json.loads(Path("rows.json").read_text()) if r["backend"] == "mine.py"]
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
    assert main(["bench", "--kernel", str(file), "--elements", "4096", "--json",
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
    ("langevin(x): return x.astype('float64')", "returned torch.float64")])
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

"""What `check --kernel` takes and says, and that nothing of a user's file is left running."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_files import NUMPY, TRITON

from minidiff.__main__ import main
from minidiff.kernels.check.compare import Near, compare
from minidiff.kernels.check.yours import host, load
from minidiff.kernels.check.yours.apart import check


def test_seeds_are_secret_told_and_repeat_a_run(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import numpy as np\ndef langevin(x, s, z, coef): return x")
    one = "check", "--kernel", str(file), "--shape", "2,3"
    shown = []
    for more in ([], [], ["--seed", "7"], ["--seed", "7"], ["--seed", str(2**64 + 7)]):
        assert main([*one, *more]) == 1
        shown.append(capsys.readouterr().out)
    assert len({*shown[:3]}) == 3 and shown[2] == shown[3]
    assert shown[4].split("--seed")[0] == shown[2].split("--seed")[0]
    assert main([*one, "--seed", re.search(r"--seed (\d+)", shown[0])[1]]) == 1
    assert capsys.readouterr().out == shown[0]


def test_check_goes_where_a_failure_is(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(NUMPY)
    json_file = tmp_path / "rows.json"
    assert main(["check", "--kernel", str(file), "--shape", "2,3,4", "--elements", "70",
                 "--dtype", "float16", "--dtype", "float32", "--json", str(json_file)]) == 1
    rows = json.loads(json_file.read_text())
    assert {tuple(r["shape"]) for r in rows} == {(2, 3, 4), (1, 70)}
    assert {r["dtype"] for r in rows} == {"float16", "float32"}
    assert {r["dtype"] for r in rows if not r["passed"]} == {"float16"}  # returned float32
    assert main(["check", "--op", "langevin", "--backend", "torch", "--shape", "2,3"]) == 0


@pytest.mark.parametrize("argv, words", [
    (["--ulp", "1"], ["--ulp", "--kernel"]),
    (["--shape=3,-1"], ["--shape", "negative"]),
    (["--kernel", "no.py"], ["no.py", "not a file"]),
    (["--op", "langevin", "--shape", "99999999999,99999"],
     ["out of memory (--shape 99999999999,99999)"]),
    (["--shape", "1" + 30 * "0"], ["out of memory (--shape 1000000000000000000"])])
def test_check_options_that_cannot_be(argv, words, refused):
    refused(*words, argv=["check", *argv])


def test_near_is_near_and_never_the_same(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(NUMPY.replace("return (a * x + b * s) + c * z",
                                  "return a * x + (b * s + c * z)"))
    one = "check", "--kernel", str(file), "--op", "langevin", "--shape", "7,4", "--seed", "1"
    assert main([*one]) == 1
    assert main([*one, "--ulp", str(2**20)]) == main([*one, "--rtol", "1e-6"]) == 0
    out = capsys.readouterr().out
    assert f"within {2**20} ulp: at most" in out and "within rtol 1e-06: at most" in out
    assert main([*one, "--rtol", "1e-9"]) == 1
    file.write_text(NUMPY.replace("return (a * x + b * s) + c * z",  # 2 ulp away at most
                                  "return ((a * x + b * s) + c * z) * np.float32(1 + 2**-23)"))
    for options, bits in ((["--rtol", "1e-5"], "rtol 1e-05"), (["--ulp", "2"], "2 ulp")):
        assert main(["bench", "--device", "cpu", "--kernel", str(file), "--op", "langevin",
                     "--elements", "4096", *options, "--json", str(tmp_path / "r.json")]) == 0
        out = capsys.readouterr().out
        mine, = [line for line in out.splitlines()
                 if line.startswith("langevin ") and "mine.py" in line
                 and "again" not in line]
        assert bits in mine and "same" not in mine
        row, = [r for r in json.loads((tmp_path / "r.json").read_text())
                if "mine.py" in r["backend"] and not r["again"]]
        assert row["within"] == bits and row["matches_reference"] is False


def test_near_counts_from_what_was_expected():
    a, b = torch.tensor([1., 2., np.nan, np.inf]), torch.tensor([1., 2. + 2**-22, np.nan, np.inf])
    row = compare("op", "b", "float32", (4,), b, a, near=Near(ulp=1))
    assert row["passed"] and row["within"] == "within 1 ulp" and row["max_ulp"] == 1
    assert not compare("op", "b", "float32", (4,), b + 2**-22, a, near=Near(ulp=1))["passed"]
    assert compare("op", "b", "float32", (4,), b, a, near=Near(rtol=2.**-23))["passed"]
    assert not compare("op", "b", "float32", (4,), b, a, near=Near(rtol=2.**-25))["passed"]
    assert not compare("op", "b", "float32", (4,), b * 0, a, near=Near(rtol=.9))["passed"]
    for other in (torch.nan, 3e38, 5.):
        far = torch.tensor([1., 2., np.nan, other])
        assert not compare("op", "b", "float32", (4,), far, a, near=Near(2**20, .1))["passed"]
    assert not compare("op", "b", "float32", (4,), a * torch.nan, a, near=Near(2**32))["passed"]


def test_several_files_and_versions(tmp_path, capsys):
    (tmp_path / "helper.py").write_text(NUMPY.replace("langevin", "mine"))
    for name in ("a", "b"):
        version = {"a": "v1", "b": "v12"}[name]
        (tmp_path / f"{name}.py").write_text(
            f"import helper\nlangevin_{version} = langevin = helper.mine\n"
            "langevin_kernel = langevin_v = helper.mine\n")
    files = [str(tmp_path / f"{name}.py") for name in "ab"]
    options = [text for file in files for text in ("--kernel", file)]
    assert main(["check", *options, "--shape", "3,5", "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {r["backend"] for r in rows} == {*files, f"{files[0]}:langevin_v1",
                                            f"{files[1]}:langevin_v12"}
    assert main(["bench", "--device", "cpu", *options, "--elements", "1024", "--json",
                 str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {*files, f"{files[0]}:langevin_v1"} <= {r["backend"] for r in rows}


def test_what_a_kernel_prints_is_shown_up_to_a_limit(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(NUMPY + "print('hello')\nprint('x' * 10**7)\n")
    assert main(["check", "--kernel", str(tmp_path / "mine.py"), "--shape", "3,5"]) == 0
    out, err = capfd.readouterr()
    assert "hello" in err and "prints more, which is not shown" in err and len(err) < 5000
    assert "xxx" not in out


@pytest.mark.parametrize("code, words", [
    ("import os; os._exit(0)", "its import ended its process with exit status 0"),
    ("import ctypes; ctypes.string_at(0)", "its import crashed in .*mine.py, line 1 .SIGSEGV"),
    ("import time; time.sleep(60)", "its import takes more than 6 s"),
    ("x = 1\n1 / 0", "ZeroDivisionError: division by zero .*mine.py, line 2"),
    ("def f(:", "SyntaxError.*line 1")])
def test_a_file_that_ends_its_process_is_one_line(code, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host, "START", 6.)
    (tmp_path / "mine.py").write_text(code)
    assert main(["check", "--kernel", str(tmp_path / "mine.py")]) == 2
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1
    assert main(["bench", "--device", "cpu", "--kernel", str(tmp_path / "mine.py")]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_nothing_is_left_running(tmp_path):
    """A kernel's own processes end with it."""
    (tmp_path / "mine.py").write_text(NUMPY + f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
""")
    list(check([tmp_path / "mine.py"], ["langevin"], shapes=[(3, 5)]))
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_bench_times_no_interpreter(tmp_path, refused):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("it is compiled there")
    (tmp_path / "mine.py").write_text(TRITON)
    refused("mine.py", "right in Triton's interpreter", "nothing was timed", argv=[
        "bench", "--device", "cpu", "--kernel", str(tmp_path / "mine.py"), "--elements", "1024"])


@pytest.mark.parametrize("argv, words", [
    (["--shape", "3,,5"], "between commas"), (["--shape", "a"], "between commas"),
    (["--ulp", "0"], "at least 1"), (["--ulp", str(2**21)], "at most 2^20"),
    (["--rtol", "2"], "between 0 and 1"),
    (["--elements", "0"], "at least 1")])
def test_option_values_that_cannot_be(argv, words, capsys):
    with pytest.raises(SystemExit):
        main(["check", *argv])
    assert words in capsys.readouterr().err


def test_what_is_imported_from_here_is_nobodys_kernel(tmp_path, refused):
    (tmp_path / "mine.py").write_text("from minidiff.noise import normal\n")
    refused("no function named like an op", argv=["check", "--kernel", str(tmp_path / "mine.py")])


@pytest.mark.parametrize("arguments", ["*x", "x, /, s", "", "**x"])
def test_arguments_are_named(arguments, tmp_path, refused):
    (tmp_path / "mine.py").write_text(f"def langevin({arguments}): return x")
    refused("langevin must name each argument", argv=["check", "--kernel",
                                                      str(tmp_path / "mine.py")])


def test_each_file_has_its_own_helper(tmp_path):
    """Two folders with a module of one name."""
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "helper.py").write_text(f"NUMBER = {k}")
        (tmp_path / str(k) / "mine.py").write_text("import helper\ndef norms(x): "
                                                   "return x + helper.NUMBER")
    found = [load(tmp_path / str(k) / "mine.py")[0][0] for k in (1, 2)]
    assert [f.call(0) for f in found] == [1, 2]

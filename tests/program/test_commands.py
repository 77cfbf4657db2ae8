"""The commands as a user meets them: help, the demo, measures, refusals, check and bench."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import data, demo, families, kernels, plot, targets
from minidiff.__main__ import main, parser
from minidiff.chunks import NetScore, samples
from minidiff.demo import Measured
from minidiff.quality import Quality

ROOT = Path(__file__).parents[2]


# ---- help and info ----

def test_info_says_where_a_cpu_has_no_fused_multiply_add(monkeypatch, capsys):
    if reason := kernels.why_not("host"):
        pytest.skip(f"host: {reason}")
    for has, words in ((True, "host          runs\n"), (False, "no fused multiply-add\n")):
        monkeypatch.setattr(kernels.backend("host"), "has_fma", lambda has=has: has)
        assert main(["info"]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("command", ["tour", "demo", "train", "sample", "eval", "check", "bench",
                                     "info"])
def test_help_has_an_example_and_the_common_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"example: python -m minidiff {command}" in text
    assert "--seed" in text and ("--device" in text) == (command != "tour")


# ---- demo and eval ----

def test_demo_on_points_prints_every_family_and_draws(tmp_path, capsys, monkeypatch):
    measured, plain = [], demo.measure

    def measure(*arguments, **options):
        found = plain(*arguments, **options)
        measured.append(found[0][:2])
        return found
    monkeypatch.setattr(demo, "measure", measure)
    assert main(["demo", "--data", "moons", "--steps", "30", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for family in families.FAMILIES:
        assert re.search(rf"^{family} +\d+ +[\d.]+ +0?[.\d]+ \+- [.\d]+ +[\d.]+$", out, re.M)
    assert "Less is better; 1 is a uniform guess." in out
    assert "train | held-out" in out and plot.CAPTION in out
    assert "floor" not in out  # nobody knows the score of the moons
    assert measured[:demo.HALVINGS] == [(demo.QUICK, 20)] * demo.HALVINGS  # of the training
    del measured[:demo.HALVINGS]
    solvers = [m for m in measured if m[0] != "pf_ode_adaptive"]  # which takes what it needs
    assert len(solvers) == len(set(solvers)) and {f for f, n in measured if n <= 24} >= {
        f for f in families.FAMILIES if f != "pc_vp"}  # at least 39
    for name in ("demo", "evaluations", "training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sample", "--model", str(tmp_path / "model.safetensors"), "--n", "5",
                 "--evaluations", "4", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["x"].shape == (5, 2)
    argv = ["sample", "--model", str(tmp_path / "model.safetensors"), "--evaluations", "8",
            "--family", "pc_ve", "--out", str(tmp_path / "x.npz"), "--seeds"]
    found = {}
    for seeds in ("3,1,4,-2", "4,3,-2,1"):
        assert main([*argv, seeds]) == 0
        found[seeds] = dict(zip(seeds.split(","), np.load(tmp_path / "x.npz")["x"]))
    for seed in "314":  # a network's sums may be of another order in another batch
        np.testing.assert_allclose(*(by_seed[seed] for by_seed in found.values()), atol=1e-4)
    capsys.readouterr()
    assert main([*argv, "3,1", "--n", "2"]) == main([*argv, "3,1", "--seed", "2"]) == 2
    assert main([*argv, "3,1", "--family", "pf_ode_adaptive"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["minidiff sample: --seeds names a sample each: without --n and --seed"] * 2
    assert "pf_ode_adaptive computes with the whole batch" in said[2]


def gaussian_net(target):
    """The exact score of x0 + sigma z as a network of (x, sigma)."""
    def net(x, sigma):
        s = target.noised(1, float(sigma[0])).score(x.double().numpy())
        return torch.from_numpy(s).float()
    return net


def test_the_loss_is_the_floor_and_what_is_left_to_learn():
    """Of N(0, I) in closed form: the floor is 1/2 w (1 / sigma^2 - 1 / (1 + sigma^2)) an element,
    and a network c times the score leaves 1/2 w (c - 1)^2 / (1 + sigma^2)."""
    target, c, n = targets.Gaussian([0., 0.], 1.), .9, 1 << 14
    exact = gaussian_net(target)
    rows = demo.losses(lambda x, sigma: c * exact(x, sigma), target, n=n)
    assert len(rows) == 12 and rows[0][0] < .05 and rows[-1][0] > 2
    for sigma, loss, floor, left in rows:
        w = demo.edm_weight(sigma)
        # 2^15 elements: a mean square is right to 6 sqrt(2 / 2^15) of itself, 4.7 %
        assert floor == pytest.approx(w / 2 * (1 / sigma**2 - 1 / (1 + sigma**2)), rel=.047)
        assert left == pytest.approx(w / 2 * (c - 1)**2 / (1 + sigma**2), rel=.047)
        # what is over is twice the mean product of two independent numbers
        assert abs(loss - floor - left) < 6 * 2 * (floor * left * 2 / (2 * n))**.5
    for _, loss, floor, left in demo.losses(exact, target, n=64):
        assert loss == pytest.approx(floor, rel=1e-5) and left < 1e-9


def test_the_demo_on_a_mixture_prints_and_draws_the_floor(tmp_path, capsys, monkeypatch, refused):
    few = {name: families.FAMILIES[name] for name in (demo.TRAJECTORY, "dpmpp_2m")}
    monkeypatch.setattr(demo, "FAMILIES", few)
    assert main(["demo", "--data", "mixture", "--steps", "200", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(\d+\.\d{3}|mean) +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M)
    assert [r[0] for r in rows][-1] == "mean" and len(rows) == 13
    loss, floor, left = map(float, rows[-1][1:])
    assert .35 < floor < .45 and left > 0 and loss == pytest.approx(floor + left, rel=.05)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "loss.png") in out
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    refused("model.safetensors was trained on mixture: choose another --out",
            argv=["demo", "--data", "moons", "--out", str(tmp_path)])
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert main(["demo", "--data", "mixture", "--steps", "3", "--out", str(tmp_path)]) == 0


def test_eval_measures_the_likelihood_and_samples(tmp_path, capsys, refused):
    """Bits/dim of a mixture of known density: the model is worse by its KL divergence, up to the
    spread of the difference over 64 points, some .3 / 8.

    An untrained network misses 2.1 bits/dim, the best Gaussian 2.0, and the mixture's ring with
    its modes smeared out .80: a network that found the modes misses less than that.
    """
    argv = ["train", "--data", "mixture", "--steps", "600", "--out", str(tmp_path)]
    assert main(argv) == 0
    model, out = str(tmp_path / "model.safetensors"), tmp_path / "bits.json"
    capsys.readouterr()
    assert main(["eval", "--likelihood", "--model", model, "--n", "64", "--out", str(out)]) == 0
    assert re.search(r"^bits/dim -?[.\d]+ \+- [.\d]+ on 64 held-out samples; \d+ evaluations: "
                     r".*\ndensity, a coordinate\. Less is better; 1 is a uniform guess\.\n"
                     r"DDPM's chain of 1000 steps, .*: at most -?[.\d]+ \+- [.\d]+\n"
                     r"bits/dim, by its variational bound; 1000 evaluations\.$",
                     capsys.readouterr().out, re.M)
    found = json.loads(out.read_text())
    assert found["bound_evaluations"] == 1000 and found["n"] == 64
    # of one network they are two models: apart by its own faults, and by one draw a step
    assert abs(found["bound"] - found["bits_per_dim"]) < 4.9 * found["bound_error"]
    exact = -data.ring().log_density(data.load("mixture").held[:64].astype(float)) / (2 * np.log(2))
    gap = found["bits_per_dim"] - exact.mean()
    # along the ring the data are one of 8 modes and a normal of std .05, the ring is even
    entropy = np.log(8) + np.log(2 * np.pi * np.e * .05**2) / 2
    ring = (np.log(2 * np.pi * .8) - entropy) / (2 * np.log(2))
    assert round(ring, 2) == .8
    assert -.15 < gap < ring - 4.9 * found["error"]
    assert main(["eval", "--model", model, "--n", "100", "--evaluations", "10"]) == 0
    assert "SVM accuracy" in capsys.readouterr().out
    refused("--data digits", "levels", argv=["eval", "--model", model, "--data", "digits"])
    refused("RK45", "--family", argv=["eval", "--model", model, "--likelihood", "--family", "ddim"])


def test_evaluations_are_drawn(tmp_path, monkeypatch):
    """A labelled line for every family, through its points; fresh noise apart from the flow."""
    rows = [Measured(f, n, 1., Quality(.5 + n / 100, .01, 2.))
            for f in families.FAMILIES for n in (20, 10)]
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    plot.curves(tmp_path / "e.png", rows, .5)
    axes = plot.plt.gcf().axes
    shown = [[bar.get_label() for bar in axis.containers] for axis in axes]
    assert sorted(sum(shown, [])) == sorted(f.replace("_", " ") for f in families.FAMILIES)
    assert set(shown[0]) == {f.replace("_", " ") for f in plot.FLOWS}
    for axis in axes:
        colors = [bar[0].get_color() for bar in axis.containers]
        assert len(set(colors)) == len(colors)
        for bar in axis.containers:
            np.testing.assert_allclose(bar[0].get_xydata(), [[10, .6], [20, .7]])
    plot.plt.gcf().clear()
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_demo_draws_images_a_row_each_and_says_why_some_are_alike(tmp_path, monkeypatch):
    digits = data.load("digits")
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    plot.picture(tmp_path / "p.png", digits, {"ddim": digits.train[:20]}, digits.train[:30])
    figure = plot.plt.gcf()
    names = [axis.get_ylabel() for axis in figure.axes]
    assert names == ["data", "ddim", "one trajectory"]
    for axis, x in zip(figure.axes, (digits.held, digits.train)):
        shown = axis.images[0].get_array()
        assert shown.shape == (10, 160)  # sixteen images of 8 by 8, framed
        np.testing.assert_array_equal(shown[1:9, 1:9], x[0, 0])
    assert figure.get_supxlabel() == plot.CAPTION
    assert all(f.replace("_", " ") in plot.CAPTION for f in plot.FLOWS)
    figure.clear()
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_the_flows_of_the_caption_show_nearly_the_same_samples():
    """With an exact score; of the same noise the others end elsewhere."""
    def score(x, sigma):
        return torch.from_numpy(data.ring().noised(1, sigma).score(x.double().numpy())).float()
    ends = {}
    for family in (*plot.FLOWS, "reverse_sde_vp", "edm_churn"):
        x, = samples(score, (2,), family, 200, kernels, 60)
        ends[family] = torch.from_numpy(x)
    for family, x in ends.items():
        apart = (x - ends["heun"]).norm(dim=1).median()
        assert (apart < .05) == (family in plot.FLOWS), family  # .05: the modes' std


def test_the_loss_is_drawn_over_its_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    rows = [(.1, .5, .4, .1), (1., .7, .5, .2)]
    plot.loss_levels(tmp_path / "l.png", rows)
    drawn = {line.get_label(): line.get_xydata().T for line in plot.plt.gca().lines}
    for label, column in (("trained network", 1), ("floor", 2), ("left", 3)):
        xy, = (v for k, v in drawn.items() if label in k)
        np.testing.assert_array_equal(xy, [[.1, 1.], [r[column] for r in rows]])
    plot.plt.gcf().clear()
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


# ---- refused: one clear line, exit 2, nothing overwritten ----

def test_options_are_refused_in_one_line(tmp_path, refused):
    out = str(tmp_path / "o")
    refused("--lr", argv=["train", "--lr", "-1", "--out", out])
    refused("--device", argv=["train", "--device", "cuda:99", "--out", out])
    refused("neither", argv=["demo", "--data", "nothing", "--out", out])
    refused("no such file", argv=["train", "--resume", "--data", "moons", "--out", out])
    refused("nothing_such", argv=["bench", "--backend", "nothing_such"])
    refused("--elements 1500", argv=["bench", "--elements", "1500"])
    refused("--batch 9999", argv=["train", "--data", "moons", "--batch", "9999", "--out", out])
    refused("--json", "folder", argv=["check", "--json", f"{out}/no/such.json"])
    refused("--json", ".json", argv=["eval", "--json", "model.safetensors"])
    refused("--json", "folder", argv=["bench", "--json", f"{out}/no/such.json"])
    refused("--out", "folder", argv=["sample", "--out", f"{out}/no/such.npz"])
    refused("--out .", "folder", argv=["sample", "--out", "."])
    refused(f"--out {out}/", "a folder", argv=["sample", "--out", f"{out}/"])
    for argv in (["demo", "--steps", "0"], ["sample", "--family", "x"], ["check", "--op", "x"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def every_option():
    """(command, option) of all that take a value."""
    choices = parser()._subparsers._group_actions[0].choices
    return [(name, action.option_strings[0]) for name, one in choices.items()
            for action in one._actions if action.option_strings and action.nargs != 0]


@pytest.mark.parametrize("command, option", every_option(), ids="".join)
def test_no_option_takes_an_empty_word(command, option, capsys):
    """It is a variable of the shell that was not set; the default would be another answer."""
    with pytest.raises(SystemExit) as stop:
        main([command, option, ""])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said[-1].startswith(f"minidiff {command}: error: argument ")
    assert option in said[-1] and len(every_option()) > 50


@pytest.mark.parametrize("name", ["hpu", "meta", "mps", "cpu:0:0", "nonsense", "cuda:-1"])
def test_a_device_is_a_cpu_or_a_gpu(name, refused):
    refused(f"--device must be cpu, cuda or cuda:N, got '{name}'",
            argv=["info", "--device", name])


def test_flow_matching_is_a_regression_and_no_other_objectives_weight(tmp_path, capsys, refused):
    argv = ["train", "--data", "moons", "--steps", "2", "--weighting", "flow", "--out",
            str(tmp_path / "a")]
    assert main(argv) == 0
    assert "denoising score matching, weighting flow" in capsys.readouterr().out
    for objective in "implicit", "sliced", "sliced_vr":
        refused("--weighting flow", "--objective denoising", argv=[
            *argv[:-1], str(tmp_path / "b"), "--objective", objective])


def test_training_says_what_it_chose(tmp_path, capsys):
    argv = ["train", "--data", "moons", "--steps", "2", "--seed", "3", "--out", str(tmp_path)]
    assert main(argv) == 0
    name = kernels.backend().NAME
    assert ("2 iterations of 512 samples, denoising score matching, weighting edm, peak learning "
            f"rate 0.002; seed 3, on cpu by {name}\n") in capsys.readouterr().out
    more = ["--objective", "sliced", "--lr", "1e-4", "--batch", "16", "--backend", "torch"]
    assert main([*argv[:-1], str(tmp_path / "b"), *more]) == 0
    assert ("2 iterations of 16 samples, sliced score matching, weighting sigma2, peak learning "
            "rate 0.0001; seed 3, on cpu by torch\n") in capsys.readouterr().out


def test_a_warning_of_a_command_is_one_line_said_once(tmp_path):
    """Its user has no line of code that it could point at."""
    said = subprocess.run(
        [sys.executable, "-m", "minidiff", "train", "--data", "moons", "--steps", "2", "--batch",
         "9", "--out", str(tmp_path)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"CXX": "no-such-compiler"}).stderr
    line = "minidiff: backend 'torch' instead of host: CXX=no-such-compiler: no-such-compiler"
    assert said.count(line) == said.count("instead of") == 1 and "Warning" not in said


def test_a_run_is_neither_overwritten_nor_mixed_up(tmp_path, capsys, refused):
    argv = ["train", "--data", "moons", "--steps", "3", "--out", str(tmp_path)]
    assert main(argv) == 0
    kept = (tmp_path / "state.safetensors").read_bytes()
    capsys.readouterr()
    refused("exists", "--resume", argv=argv)
    refused("another run", argv=[*argv, "--resume", "--seed", "1"])
    refused("holds a training run", argv=["demo", "--data", "moons", "--out", str(tmp_path)])
    assert (tmp_path / "state.safetensors").read_bytes() == kept


def test_a_network_that_diverges_is_never_masked():
    class Broken(torch.nn.Module):
        def forward(self, x, sigma):
            return x * float("nan")
    x, = samples(NetScore(Broken()), (2,), "ddim", 3, kernels, 4)
    assert np.isnan(x).all()


# ---- check and bench ----

CHECKED = {"op", "backend", "dtype", "shape", "max_ulp", "passed", "within", "explained", "reason"}


def test_check_writes_a_row_for_all_that_it_compared(tmp_path):
    file = tmp_path / "rows.json"
    assert main(["check", "--backend", "host", "--op", "langevin", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {"langevin"} <= {r["op"] for r in rows}
    for r in rows:
        assert r.keys() == CHECKED and r["passed"] and not r["max_ulp"]


def test_check_counts_what_cannot_run_as_not_passed(tmp_path, capsys, monkeypatch):
    """Where no backend is named, all are asked for."""
    file = tmp_path / "rows.json"
    for name in ("triton", "cupy"):
        module = import_module(f"minidiff.kernels.on_{name}")
        monkeypatch.setattr(module, "why_not", lambda: "not here")
    assert main(["check", "--op", "langevin", "--dtype", "float32", "--json", str(file)]) == 0
    rows = {r["backend"]: r for r in json.loads(file.read_text())}
    for name in ("triton", "cupy"):
        assert rows[name]["passed"] is None and rows[name]["reason"] == "not here"
    assert "0 failed, 2 not run" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_backend_that_is_missing_is_named(command, refused, monkeypatch):
    monkeypatch.setattr(kernels.on_cupy, "why_not", lambda: "no GPU of this kind")
    refused("cupy", "no GPU of this kind", argv=[command, "--backend", "cupy"])


def test_bench_gates_and_reports(tmp_path, uncompiled):
    rows = tmp_path / "rows.json"
    assert main(["bench", "--device", "cpu", "--elements", "4096", "--json", str(rows)]) == 0
    rows = {r["backend"]: r for r in json.loads(rows.read_text()) if not r["again"]}
    assert {"op", "backend", "dtype", "elements", "seconds", "bytes", "gb_per_s",
            "fraction_of_copy", "matches_reference"} <= set(rows["host"])
    assert rows["host"]["matches_reference"] is True
    assert rows["torch_eager"]["matches_reference"] is None
    assert set(rows["host"]["speedup"]) >= {"torch_eager", "torch_inplace"}
    assert rows["torch_eager"]["speedup"] == {}


def test_bench_times_nothing_on_a_red_gate(monkeypatch):
    from minidiff.bench.speed import run, timed
    monkeypatch.setattr(run, "check_op", lambda *a: [{"passed": False}])
    monkeypatch.setattr(timed, "clock", lambda *a: pytest.fail("timed on a red gate"))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        run.bench(["langevin"], ["host"], [64])


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*kernels.BACKENDS, "processor", "torch", "numpy"))

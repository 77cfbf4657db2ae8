"""The program as a user meets it: commands, files, faults, training that resumes bit for bit."""

import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch

import minidiff
from minidiff import data, demo, families, kernels, noise, samplers, targets, train
from minidiff.__main__ import main
from minidiff.demo import EVALUATIONS, Measured, NetScore
from minidiff.demo import sample as draw
from minidiff.net import ScoreNet
from minidiff.plot import FLOWS
from minidiff.quality import nearest_distance, svm_accuracy

ROOT = Path(__file__).parents[2]


# ---- the package ----

def test_info_says_where_a_cpu_has_no_fused_multiply_add(monkeypatch, capsys):
    if reason := kernels.why_not("host"):
        pytest.skip(f"host: {reason}")
    for has, words in ((True, "host          runs\n"), (False, "no fused multiply-add\n")):
        monkeypatch.setattr(kernels.backend("host"), "has_fma", lambda has=has: has)
        assert main(["info"]) == 0
        assert words in capsys.readouterr().out


IMPORTED = """
import sys
from time import process_time
start = process_time()
import numpy
middle, before = process_time(), {*sys.modules}
import minidiff, minidiff.noise, minidiff.samplers, minidiff.kernels
end = process_time()
packages = {name.split(".")[0] for name in {*sys.modules} - before}
print(*packages - sys.stdlib_module_names, end - middle < middle - start)
"""


def test_import_needs_numpy_alone_and_less_time_than_numpys_own():
    """Processor time, which a busy machine does not stretch; measured, a quarter of NumPy's."""
    out = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True,
                         check=True)
    assert out.stdout.split() == ["minidiff", "True"]


@pytest.mark.parametrize("page", ["README.md", "bench/README.md"])
def test_a_page_names_files_and_tests_that_exist(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert links and all((folder / link).exists() for link in links)
    tests = re.findall(r"def (test_\w+)", "".join(
        f.read_text() for f in (ROOT / "tests").rglob("test_*.py")))
    tests += [f.stem for f in (ROOT / "tests").rglob("test_*.py")]
    for name in re.findall(r"`(test_\w+)", text):
        assert any(test.startswith(name) for test in tests), name


def test_readme_example_prints_what_the_readme_says():
    text = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n.*?```text\n(.*?)```", text, re.S).groups()
    out = subprocess.run([sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + code],
                         capture_output=True, text=True, check=True)
    assert out.stdout == printed


@pytest.mark.parametrize("command", ["demo", "train", "sample", "eval", "check", "bench", "info"])
def test_help_has_an_example_and_the_common_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"example: python -m minidiff {command}" in text
    assert "--seed" in text and "--device" in text


# ---- families and demo ----

@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_reaches_an_exact_mixture(family):
    """Exact score, 4,096 samples of an off-centre two-mode target within [-1, 1]. Weight within
    6 sigma of a binomial plus .02 for the coarse grids; means within 6 standard errors of the
    mode plus .02."""
    target = targets.Mixture([.3, .7], [[-.6, -.3], [.6, .3]], .01)
    def score(x, sigma):
        return target.noised(1., sigma).score(x)
    z = noise.normal((4096, 2), tag=noise.PRIOR)
    *_, x = families.FAMILIES[family](score, z, 600, samplers.Reference(seed=1))
    left = x[:, 0] < 0
    assert abs(left.mean() - .3) < 6 * (.21 / 4096)**.5 + .02
    for side, mean in ((left, [-.6, -.3]), (~left, [.6, .3])):
        assert np.abs(x[side].mean(0) - mean).max() < 6 * .1 / side.sum()**.5 + .02
        assert np.abs(x[side].std(0) - .1).max() < .02


# evaluations as the README's table has them; how much the std of an end is off .1, the data's
DEMO = {"annealed_langevin": (97, .2441), "ddpm_ancestral": (80, -.0965), "ddim": (40, -.0956),
        "reverse_sde_ve": (80, -.0055), "reverse_sde_vp": (80, .0421),
        "reverse_sde_subvp": (80, .018), "reverse_diffusion_ve": (80, .0468),
        "reverse_diffusion_vp": (80, .2072), "ancestral_ve": (79, -.0563), "pc_ve": (79, -.0044),
        "pc_vp": (79, .082), "pc_subvp": (79, .0376), "pf_ode": (40, .0245), "heun": (39, .0553),
        "edm_churn": (79, .0354), "dpmpp_2m": (20, .0329)}


@pytest.mark.parametrize("family", DEMO)
def test_a_familys_law_on_a_gaussian_at_the_demos_evaluations(family):
    """Its end is linear in the start and in every draw: row 0 of a batch answers the start alone,
    each other row one draw, and the squares add up to the variance. A flow answers no draw."""
    rows, calls = {}, []

    def impulse(shape, k, tag):
        return np.eye(shape[0])[:, [rows.setdefault((k, tag), 1 + len(rows))]]

    def score(x, sigma):
        calls.append(sigma)
        return targets.Gaussian([0.], .01).noised(1., float(sigma)).score(x)
    *_, x = families.FAMILIES[family](score, np.eye(256)[:, :1], EVALUATIONS.get(family, 80),
                                      samplers.Reference(normal=impulse))
    bias = (x**2).sum()**.5 / .1 - 1
    assert (len(calls), round(bias, 4)) == DEMO[family]
    assert (x[1:] != 0).any() == (family not in FLOWS)


@pytest.mark.parametrize("family", ["reverse_diffusion_ve", "ancestral_ve"])
def test_ves_chain_is_scored_at_its_own_levels(family):
    """At the demo's 80 evaluations a mode's deviation .1 is off by .006 at most, the chain's own
    bias; scores of the level one step on would make it .018."""
    target = targets.Gaussian([.3, -.2], .01)
    z = noise.normal((4096, 2), tag=noise.PRIOR)
    *_, x = families.FAMILIES[family](lambda x, sigma: target.noised(1., sigma).score(x), z, 80,
                                      samplers.Reference(seed=1))
    assert np.abs(x.std(0) - .1).max() < .009


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_of_few_evaluations_ends(family, n):
    target = targets.Gaussian([.3, -.2], .01)
    *_, x = families.FAMILIES[family](lambda x, sigma: target.noised(1., sigma).score(x),
                                      noise.normal((8, 2)), n, samplers.Reference(seed=1))
    assert np.isfinite(x).all()


def test_families_on_kernels_follow_the_reference():
    """Float32 states of a fused run beside a float64 one: the DDIM map is a contraction onto the
    data here, so one rounding a step stays below 1e-4 of the data's scale."""
    target = targets.Gaussian([.2, -.1], .04)
    def score(x, sigma):
        return target.noised(1., sigma).score(x).astype(x.dtype)
    z = noise.normal((64, 2), tag=noise.PRIOR)
    *_, fused = families.FAMILIES["ddim"](score, z, 40, kernels.Fused(backend="host"))
    *_, exact = families.FAMILIES["ddim"](score, z.astype(float), 40, samplers.Reference())
    assert fused.dtype == np.float32 and np.abs(fused - exact).max() < 1e-4


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
    assert "train | held-out" in out
    solvers = [m for m in measured if m[0] != "pf_ode_adaptive"]  # which takes what it needs
    assert len(solvers) == len(set(solvers)) and {f for f, n in measured if n <= 24} >= {
        f for f in families.FAMILIES if f != "pc_vp"}  # at least 39
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sample", "--model", str(tmp_path / "model.safetensors"), "--n", "5",
                 "--evaluations", "4", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["x"].shape == (5, 2)


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
    assert re.search(r"^bits/dim -?[.\d]+ \+- [.\d]+ on 64 held-out samples; \d+ evaluations$",
                     capsys.readouterr().out, re.M)
    found = json.loads(out.read_text())
    angle = 2 * np.pi * np.arange(8) / 8
    target = targets.Mixture(np.ones(8), .8 * np.stack((np.cos(angle), np.sin(angle)), 1), .05**2)
    exact = -target.log_density(data.load("mixture").held[:64].astype(float)) / (2 * np.log(2))
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
    from minidiff import plot
    rows = [Measured(f, n, 1., .5 + n / 100, .01, 2.)
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


def test_demo_draws_images(tmp_path):
    from minidiff.plot import picture
    digits = data.load("digits")
    picture(tmp_path / "p.png", digits, {"ddim": digits.train[:20]}, digits.train[:30])
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_quality_figures_know_good_from_bad():
    digits = data.load("digits")
    good, _ = svm_accuracy(digits.train[:360], digits.held)
    bad, _ = svm_accuracy(noise.normal((360, 1, 8, 8)), digits.held)
    assert good < .58 and bad > .95
    assert nearest_distance(digits.train[:50], digits.train) == 0
    assert nearest_distance(digits.held, digits.train) > 1


# ---- bad input: one clear line, exit 2, nothing overwritten ----

def broken_files(folder):
    good = folder / "good.safetensors"
    train.save(good, ScoreNet((2,)).state_dict(), {"shape": [2], "data": "moons", "levels": None})
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:1000])
    (folder / "text.safetensors").write_text("hello")
    import safetensors.torch
    safetensors.torch.save_file({"x": torch.ones(1)}, folder / "foreign.safetensors")
    for name, odd in (("other", {"shape": [1, 8, 8]}), ("strange", {"shape": "abc"}),
                      ("negative", {"shape": [-1]}), ("levels", {"levels": "x"}),
                      ("fewer", {"levels": 1}),
                      ("data", {"data": 5})):
        train.save(folder / f"{name}.safetensors", ScoreNet((2,)).state_dict(),
                   {"shape": [2], "data": "moons", "levels": None} | odd)
    train.save(folder / "list.safetensors", ScoreNet((2,)).state_dict(), [])


@pytest.mark.parametrize("name, words", [
    ("absent", "no such file"), ("truncated", "not a readable"), ("text", "not a readable"),
    ("foreign", "not minidiff's"), ("other", "another architecture"),
    ("levels", "not minidiff's"), ("fewer", "not minidiff's"), ("data", "not minidiff's"),
    ("strange", "not minidiff's"), ("negative", "not minidiff's"), ("list", "not minidiff's")])
def test_bad_models_are_refused(name, words, tmp_path, refused):
    broken_files(tmp_path)
    refused(f"{name}.safetensors", words,
            argv=["sample", "--model", str(tmp_path / f"{name}.safetensors"),
                  "--out", str(tmp_path / "x.npz")])
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"nonsense", "not a readable"), (b"", "not a readable"),
    ({"x": np.zeros((900, 7, 7))}, "every value"), ({"x": np.zeros((10, 2))}, "at least"),
    ({"x": np.array(["a"] * 900)}, "no numeric array"), ({"x": np.full((900, 2), np.nan)}, "NaN"),
    ({"x": np.random.default_rng(0).random((900, 7, 7))}, "must be even"),
    ({"x": np.array([{}] * 900, object)}, "not a readable"),
    ({"x": np.zeros((900, 1))}, "two axes"), ({"x": np.zeros((900, 0))}, "two axes"),
    ({"x": np.array([[-1.7e308, 1.7e308]] * 900)}, "too far apart")])
def test_bad_data_files_are_refused(content, words, tmp_path, refused):
    file = tmp_path / "d.npz"
    if isinstance(content, dict):
        np.savez(file, **content)
    elif content is not None:
        file.write_bytes(content)
    refused("d.npz", words, argv=["train", "--data", str(file), "--out",
                                          str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", data.SETS)
def test_the_held_out_points_are_like_the_others(name):
    """Means and mean squares of 360 against 8,192 to 4.9 standard errors: the order is drawn from
    other words than the points."""
    d = data.load(name)
    for f in (lambda x: x, np.square, lambda x: np.hypot(*x.T)**4):
        held, train = f(d.held), f(d.train)
        assert (abs(held.mean(0) - train.mean(0)) < 4.9 * train.std(0) * (1 / 360 + 1 / 8192)**.5
                ).all()
    angle = 2 * np.pi * np.arange(8) / 8
    if name == "mixture":
        centers = .8 * np.stack((np.cos(angle), np.sin(angle)), 1)
        r = np.linalg.norm(d.held[:, None] - centers, axis=-1).min(1)  # chi^2 of 2: mean 2 v
        assert abs((r**2).mean() - .005) < 4.9 * .005 / 360**.5


def test_data_files_are_scaled(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (900, 6, 6)).astype(np.uint8)
    np.savez(tmp_path / "i.npz", x=images, labels=np.zeros(900, int))
    d = data.load(tmp_path / "i.npz")
    assert d.shape == (1, 6, 6) and d.levels == 256
    assert d.train.min() == -1 and d.train.max() == 1
    again = d.quantize(data.dequantized(d.held, d.levels, seed=2))
    assert np.allclose(again, d.held, atol=1e-6)  # a level in float32
    assert {*d.in_own_units(d.held).ravel()} <= {*images.ravel()}
    assert d.in_own_units(d.held).dtype == np.uint8


def test_the_scale_is_the_models_whatever_a_test_file_holds(tmp_path):
    """Appended outliers, other units, a part of the range: each row keeps its place on the scale
    of the file that the model was trained on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 2)) * 3 + 5
    np.savez(tmp_path / "train.npz", x=x)
    trained = data.load(tmp_path / "train.npz")
    low, high = trained.ends
    assert (low, high) == (x.min(), x.max())
    back = trained.in_own_units(np.concatenate((trained.held, trained.train)))
    order = data.permutation(900, 0)
    slack = 2.**-25 * (high - low) / 2 * 1.01  # what float32 keeps of a place on [-1, 1]
    assert abs(back - x[order]).max() <= slack
    for name, other in (("part", np.abs(x)), ("outlier", np.append(x[1:], [[1e4, -1e4]], 0)),
                        ("units", 10 * x + 7), ("float32", x.astype(np.float32))):
        np.savez(tmp_path / f"{name}.npz", x=other)
        d = data.load(tmp_path / f"{name}.npz", ends=trained.ends)
        want = 2 * (other[order].astype(float) - low) / (high - low) - 1
        assert d.ends == trained.ends
        assert np.array_equal(np.concatenate((d.held, d.train)), want.astype(np.float32))


def test_a_set_by_name_is_measured_on_a_models_scale():
    plain = data.load("moons")
    other = data.load("moons", ends=[-3., 5.])
    want = (plain.held.astype(float) + 3) / 8 * 2 - 1
    assert other.ends == (-3., 5.) and abs(other.held - want).max() < 2.**-24
    assert data.load("digits", ends=(0., 16.)).train.max() == 1


def test_a_scale_that_float32_cannot_keep(tmp_path, refused):
    """Samples of large numbers keep their digits; numbers beyond the model's reach are refused."""
    big = data.Data("x", *np.empty((2, 0, 2)), None, (1e9 - 3, 1e9 + 3))
    assert np.array_equal(big.in_own_units(np.array([[-1., 0., 1.]])),
                          [[1e9 - 3, 1e9, 1e9 + 3]])
    wide = data.Data("x", *np.empty((2, 0, 2)), None, (-1e300, 1e300))
    assert np.isfinite(wide.in_own_units(np.array([[-1.5, 1.5]]))).all()
    grey = data.Data("x", *np.empty((2, 0, 2)), 256, (0., 255.))
    assert grey.in_own_units(np.array([-1.05, 1.05])).tolist() == [0, 255]
    np.savez(tmp_path / "far.npz", x=np.outer(np.arange(800.), [1e300, 1.]))
    with pytest.raises(ValueError, match="too far from the -1 to 1 .* trained on"):
        data.load(tmp_path / "far.npz", ends=(-1.000001, 1.))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A folder with a model of points in units of their own, and the file of these points."""
    folder = tmp_path_factory.mktemp("scaled")
    np.savez(folder / "train.npz", x=two_clusters(2000, 0))
    assert main(["train", "--data", str(folder / "train.npz"), "--steps", "60", "--batch", "128",
                 "--out", str(folder)]) == 0
    return folder


def two_clusters(n, seed):
    """n points, (n, 2), a coordinate about -2 and about 2."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 2)) * .5 + np.where(rng.random((n, 1)) < .5, -2, 2)


def test_a_model_measures_another_file_on_its_own_scale(scaled, tmp_path):
    """A file of the same law as the first gives its bits/dim, to their errors; in other units it
    is another law."""
    x, found = two_clusters(800, 1), {}
    np.savez(tmp_path / "test.npz", x=x)
    np.savez(tmp_path / "units.npz", x=10 * x + 7)
    for file in (scaled / "train.npz", tmp_path / "test.npz", tmp_path / "units.npz"):
        out = tmp_path / f"{file.stem}.json"
        assert main(["eval", "--likelihood", "--model", str(scaled / "model.safetensors"), "--data",
                     str(file), "--out", str(out)]) == 0
        found[file.stem] = json.loads(out.read_text())
    bits = {name: row["bits_per_dim"] for name, row in found.items()}
    # a tenth of the range off would be log2(10 / 9), .15
    error = np.hypot(found["train"]["error"], found["test"]["error"])
    assert abs(bits["train"] - bits["test"]) < 4.9 * error
    assert bits["units"] > bits["test"] + 1


def test_samples_come_in_the_units_of_the_data(scaled, tmp_path):
    model = scaled / "model.safetensors"
    _, saved = train.load_model(model)
    low, high = saved["ends"]
    assert (low, high) == data.load(scaled / "train.npz").ends
    out = {}
    for units in ("model", "data"):
        assert main(["sample", "--model", str(model), "--n", "50", "--evaluations", "8", "--units",
                     units, "--out", str(tmp_path / units)]) == 0
        out[units] = np.load(tmp_path / f"{units}.npz")["x"]
    want = low + (out["model"].astype(float) + 1) / 2 * (high - low)
    assert np.array_equal(out["data"], want)


def test_a_model_that_keeps_no_scale_says_so(scaled, tmp_path, refused):
    tensors, metadata = train.read(scaled / "model.safetensors")
    old, odd, out = (tmp_path / f"{name}.safetensors" for name in ("old", "odd", "out"))
    out = str(out.with_suffix(".npz"))
    train.save(old, tensors, {k: v for k, v in metadata.items() if k != "ends"})
    for argv in (["sample", "--units", "data", "--out", out],
                 ["eval", "--data", str(scaled / "train.npz")], ["eval"]):
        refused("old.safetensors", "scale", "train it again", argv=[*argv, "--model", str(old)])
    for ends in ([1., 1.], [0., float("inf")], [2., 1.], "01", [0.], [0., "1"]):
        train.save(odd, tensors, metadata | {"ends": ends})
        refused("odd.safetensors", "not minidiff's",
                argv=["sample", "--model", str(odd), "--out", out])
    assert not Path(out).exists()


def test_a_model_that_keeps_no_scale_is_sampled_in_its_own_units(scaled, tmp_path):
    tensors, metadata = train.read(scaled / "model.safetensors")
    old, out = tmp_path / "old.safetensors", tmp_path / "out.npz"
    train.save(old, tensors, {k: v for k, v in metadata.items() if k != "ends"})
    assert main(["sample", "--model", str(old), "--n", "2", "--out", str(out)]) == 0
    assert np.load(out)["x"].shape == (2, 2)


def test_grey_levels_are_sampled_as_the_file_had_them(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "grey.npz", x=rng.integers(0, 256, (800, 4, 4)).astype(np.uint8))
    folder, model = tmp_path / "o", tmp_path / "o" / "model.safetensors"
    assert main(["train", "--data", str(tmp_path / "grey.npz"), "--steps", "2", "--out",
                 str(folder)]) == 0
    assert main(["sample", "--model", str(model), "--n", "9", "--evaluations", "8", "--units",
                 "data", "--out", str(tmp_path / "x")]) == 0
    assert np.load(tmp_path / "x.npz")["x"].dtype == np.uint8


def test_from_the_clones_parent_folder_the_package_is_found(tmp_path):
    """There the clone's own name, without a package in it, stands first on Python's path."""
    try:
        distribution("minidiff")
    except PackageNotFoundError:
        pytest.skip("not installed")
    (tmp_path / "minidiff").symlink_to(ROOT, target_is_directory=True)
    for code in (["-m", "minidiff", "--version"],
                 ["-c", "import minidiff.kernels, minidiff.bench; print(minidiff.__version__)"]):
        done = subprocess.run([sys.executable, *code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == minidiff.__version__, done.stderr


def test_walking_the_package_finds_its_modules_alone():
    names = [m.name for m in pkgutil.walk_packages(minidiff.__path__, "minidiff.")]
    assert len(names) == len(set(names)) and "minidiff.noise" in names
    assert not {n for n in names if n.split(".")[1] in ("minidiff", "tests", "setup")}
    for name in ("minidiff.tests", "minidiff.setup", "minidiff.minidiff"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)


def test_a_clone_that_is_not_installed_finds_its_rooms():
    code = "import minidiff.kernels, minidiff.bench; print(minidiff.kernels.__file__)"
    path = os.pathsep.join(p for p in sys.path if "site-packages" in p)
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": path})
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py", done.stderr


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
    for argv in (["demo", "--steps", "0"], ["sample", "--family", "x"], ["check", "--op", "x"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


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
    *_, x = draw(NetScore(Broken()), (2,), "ddim", 3, kernels, 4)
    assert x.isnan().all()


# ---- check, bench and info ----

CHECKED = {"op", "backend", "dtype", "shape", "max_ulp", "passed", "reason"}


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
    rows = {r["backend"]: r for r in json.loads(rows.read_text())}
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

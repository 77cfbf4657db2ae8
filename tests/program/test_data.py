"""What meets users' files: data and models that are refused, scales, units, grey levels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import data, train
from minidiff.__main__ import main
from minidiff.net import ScoreNet


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

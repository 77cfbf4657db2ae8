"""Data sets: what is held out, the scale of a model, units, grey levels."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from minidiff import data, weights
from minidiff.__main__ import main


@pytest.mark.parametrize("name", data.SETS)
def test_the_held_out_points_are_like_the_others(name):
    """Means and mean squares to 4.9 standard errors, of all and of the first 360, which the demo
    takes; a fifth is held out to as many."""
    d = data.load(name)
    assert abs(len(d.held) - data.POINTS / 5) < 4.9 * (data.POINTS * .2 * .8)**.5
    for f in (lambda x: x, np.square, lambda x: np.hypot(*x.T)**4):
        for some in (d.held, d.held[:360]):
            held, train = f(some), f(d.train)
            error = train.std(0) * (1 / len(held) + 1 / len(train))**.5
            assert (abs(held.mean(0) - train.mean(0)) < 4.9 * error).all()
    angle = 2 * np.pi * np.arange(8) / 8
    if name == "mixture":
        centers = .8 * np.stack((np.cos(angle), np.sin(angle)), 1)
        r = np.linalg.norm(d.held[:360, None] - centers, axis=-1).min(1)  # chi^2 of 2: mean 2 v
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


def rows(d):
    """All samples of a data set."""
    return np.concatenate((d.held, d.train))


def test_the_scale_is_the_models_whatever_a_test_file_holds(tmp_path):
    """Appended outliers, other units, a part of the range: each sample keeps its place on the scale
    of the file that the model was trained on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 2)) * 3 + 5
    np.savez(tmp_path / "train.npz", x=x)
    trained = data.load(tmp_path / "train.npz")
    low, high = trained.ends
    assert (low, high) == (x.min(), x.max())
    back = trained.in_own_units(rows(trained))
    order = np.argsort(data.sample_keys(x))
    slack = 2.**-25 * (high - low) / 2 * 1.01  # what float32 keeps of a place on [-1, 1]
    assert abs(back - x[order]).max() <= slack
    for name, other in (("part", np.abs(x)), ("outlier", np.append(x[1:], [[1e4, -1e4]], 0)),
                        ("units", 10 * x + 7), ("float32", x.astype(np.float32))):
        np.savez(tmp_path / f"{name}.npz", x=other)
        d = data.load(tmp_path / f"{name}.npz", ends=trained.ends)
        other = other[np.argsort(data.sample_keys(other))].astype(float)
        assert d.ends == trained.ends
        want = 2 * (other - low) / (high - low) - 1
        assert np.array_equal(rows(d), want.astype(np.float32))


def test_the_same_samples_are_held_out_of_every_file_that_holds_them(tmp_path):
    """Appending, deleting, shuffling, another dtype, layout or name move no other sample."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (900, 3, 8, 6)).astype(np.uint8)
    some = {"same": x, "deleted": np.delete(x, 5, 0), "appended": np.append(x, 255 - x[:99], 0),
            "shuffled": rng.permutation(x), "int64": x.astype(int), "float32": x.astype("f4"),
            "big_endian": x.astype(">f8"), "last": x.transpose(0, 2, 3, 1),
            "fortran": np.asfortranarray(x), "divided": x / 255., "divided32": np.float32(x) / 255,
            "halves": np.float16(x / 255.), "centred": np.float32(x / 127.5 - 1),
            "twice": np.append(x, x[::-1], 0)}
    found = {}
    for name, u in some.items():
        np.savez(tmp_path / f"{name}.npz", x=u)
        found[name] = data.load(tmp_path / f"{name}.npz")
    def as_set(u):
        return {v.tobytes() for v in u}
    first = found["same"]
    train, held = as_set(first.train), as_set(first.held)
    assert 180 - 4.9 * 12 < len(held) < 180 + 4.9 * 12  # binomial, standard deviation 12
    for name, d in found.items():
        assert not as_set(d.train) & held and not as_set(d.held) & train, name
        alike = name not in ("deleted", "appended", "twice")
        assert (d.digest == first.digest) == alike, name
        assert np.array_equal(rows(d), rows(first)) or not alike, name
        assert (as_set(d.train) == train) == (alike or name == "twice"), name


def test_a_digest_is_of_numbers_and_shape(tmp_path):
    """One bit, a sample twice, the same numbers in another shape, a test array."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 4))
    bit = x.copy()
    bit[7, 1] = np.nextafter(bit[7, 1], 9)
    twice = np.append(x, x[:1], 0)
    zero, minus = x.copy(), x.copy()
    zero[0, 0], minus[0, 0] = 0., -0.
    files = {"x": {"x": x}, "bit": {"x": bit}, "twice": {"x": twice},
             "shape": {"x": x.reshape(-1, 2, 2)}, "test": {"x": x[200:], "x_test": x[:200]},
             "zero": {"x": zero}, "minus": {"x": minus}}
    digests = {}
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        digests[name] = data.load(tmp_path / f"{name}.npz").digest
    assert digests.pop("zero") == digests.pop("minus")  # which train alike
    assert len(set(digests.values())) == len(digests) == 5


def test_a_sample_that_is_trained_on_is_not_held_out(tmp_path):
    """Of a test array that shares 30 samples with the array to train on; copies count too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 2))
    np.savez(tmp_path / "d.npz", x_train=x[:700], x_test=np.append(x[700:], x[:30], 0))
    d = data.load(tmp_path / "d.npz")
    assert len(d.held) == 200 and len(d.train) == 700
    assert not {v.tobytes() for v in d.held} & {v.tobytes() for v in d.train}
    assert "200 held out in x_test, but for 30 that are trained on" in d.about


def test_the_scale_is_of_both_arrays(tmp_path):
    """The test array may have levels, or a range, that the other lacks."""
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 17, (700, 4, 4))
    np.savez(tmp_path / "d.npz", x_train=dark, x_test=rng.integers(0, 256, (200, 4, 4)))
    assert data.load(tmp_path / "d.npz").levels == 256
    np.savez(tmp_path / "d.npz", x_train=dark, x_test=rng.integers(0, 17, (200, 4, 4)) + .5)
    refused = pytest.raises(ValueError, match="are not alike")
    with refused:
        data.load(tmp_path / "d.npz")
    np.savez(tmp_path / "d.npz", x_train=dark / 3., x_test=rng.integers(0, 17, (200, 4, 4)) * 9.)
    d = data.load(tmp_path / "d.npz")
    assert d.levels is None and d.ends == (0, 144) and d.held.max() == 1 > d.train.max()


def test_what_a_model_was_trained_on_is_known_by_its_numbers(tmp_path, capsys, refused):
    """The same under another name goes on; other numbers under the same name are refused."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1440, 4)).clip(-2, 2)
    file, moved = tmp_path / "d.npz", tmp_path / "folder" / "e.npz"
    moved.parent.mkdir()
    np.savez(file, x=x)
    np.savez(moved, x=rng.permutation(x).astype(">f8"))
    argv = ["train", "--steps", "3", "--batch", "64", "--out", str(tmp_path / "o")]
    model = str(tmp_path / "o" / "model.safetensors")
    assert main([*argv, "--data", str(file)]) == 0
    assert main([*argv, "--data", str(moved), "--resume"]) == 0
    assert main(["eval", "--model", model, "--n", "20", "--evaluations", "4"]) == 0
    for other in (rng.uniform(5, 6, (900, 4)), np.delete(x, 5, 0)):
        np.savez(file, x=other)
        capsys.readouterr()
        refused("another run", "digest", argv=[*argv, "--data", str(file), "--resume"])
        refused("no longer what the model was trained on", f"--data {file}",
                argv=["eval", "--model", model])
    for other in (file, moved):
        assert main(["eval", "--model", model, "--n", "20", "--evaluations", "4", "--data",
                     str(other)]) == 0


def test_a_test_array_is_held_out_and_another_file_may_hold_what_was_trained_on(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 2))
    split, plain = tmp_path / "split.npz", tmp_path / "plain.npz"
    np.savez(split, x_train=x[100:], x_test=x[:100], y_train=np.zeros(800), y_test=np.zeros(100))
    np.savez(plain, x=x)
    d = data.load(split)
    assert (len(d.train), len(d.held), d.split) == (800, 100, "in x_test")
    back = d.in_own_units(d.held)
    assert abs(np.sort(back, 0) - np.sort(x[:100], 0)).max() < 1e-6  # float32, within 4
    argv = ["--model", str(tmp_path / "model.safetensors"), "--n", "20", "--evaluations", "4"]
    assert main(["train", "--data", str(split), "--steps", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert ("x_train (800, 2) float64, as points of 2 coordinates; not used: y_train (labels), "
            "y_test (labels)") in said
    assert "800 samples to train on, 100 held out in x_test" in said
    assert main(["eval", *argv]) == 0 and "may be among" not in capsys.readouterr().out
    other = tmp_path / "fold.npz"  # its test array was trained on
    np.savez(other, x_train=x[:800], x_test=x[800:])
    for file in (plain, other):
        assert main(["eval", *argv, "--data", str(file)]) == 0
        assert "held out in x_test: what is held out" in (said := capsys.readouterr().out)
        assert "here may be among them" in said and "20 samples" in said
        assert f"held out of {file}\n" in said


def test_a_small_file_measures_a_model_that_it_could_not_train(tmp_path, capsys, refused):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(900, 2)))
    np.savez(tmp_path / "few.npz", x=rng.normal(size=(100, 2)))
    argv = ["train", "--data", str(tmp_path / "d.npz"), "--steps", "2", "--out", str(tmp_path)]
    assert main(argv) == 0
    argv = ["eval", "--model", str(tmp_path / "model.safetensors"), "--evaluations", "4"]
    assert main([*argv, "--data", str(tmp_path / "few.npz")]) == 0
    said = capsys.readouterr().out
    n = int(re.findall(r"(\d+) held out by hash", said)[-1])
    assert 5 <= n < 50 and f"; {n} compared with as many" in said and "among them" not in said
    file = str(tmp_path / "none.npz")
    np.savez(file, x_train=rng.normal(size=(3, 2)), x_test=rng.normal(size=(60, 2)))
    refused("3 samples: at least 5 are needed", argv=[*argv, "--data", file])
    (tmp_path / "d.npz").rename(tmp_path / "elsewhere.npz")
    capsys.readouterr()
    refused("d.npz, which the model was trained on, is not there", "--data", argv=argv)


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
    _, saved = weights.load_model(model)
    low, high = saved["ends"]
    assert (low, high) == data.load(scaled / "train.npz").ends
    out = {}
    for units in ("model", "data"):
        assert main(["sample", "--model", str(model), "--n", "50", "--evaluations", "8", "--units",
                     units, "--out", str(tmp_path / units)]) == 0
        out[units] = np.load(tmp_path / f"{units}.npz")["x"]
    want = low + (out["model"].astype(float) + 1) / 2 * (high - low)
    assert np.array_equal(out["data"], want)


def rewritten(model, file, **changed):
    """Write a copy of a model with other metadata; what is None is left out. Returns the file."""
    tensors, metadata = weights.read(model)
    metadata |= changed
    kept = {k: v for k, v in metadata.items() if k not in changed or v is not None}
    weights.save(file, tensors, kept)
    return str(file)


def test_a_model_of_an_older_version_says_what_it_lacks(scaled, tmp_path, refused):
    model, out = scaled / "model.safetensors", str(tmp_path / "out.npz")
    old = rewritten(model, tmp_path / "old.safetensors", ends=None)
    for argv in (["sample", "--units", "data", "--out", out],
                 ["eval", "--data", str(scaled / "train.npz")], ["eval"]):
        refused("old.safetensors", "scale", "train it again", argv=[*argv, "--model", old])
    assert not Path(out).exists()
    old = rewritten(model, tmp_path / "old.safetensors", digest=None)
    refused("old.safetensors", "held-out samples may be among them", "train it again",
            argv=["eval", "--model", old])


def test_a_model_that_keeps_no_scale_is_sampled_in_its_own_units(scaled, tmp_path):
    old = rewritten(scaled / "model.safetensors", tmp_path / "old.safetensors", ends=None)
    assert main(["sample", "--model", old, "--n", "2", "--out", str(tmp_path / "out.npz")]) == 0
    assert np.load(tmp_path / "out.npz")["x"].shape == (2, 2)


@pytest.mark.parametrize("dtype, ends, own", [
    (np.uint8, (0, 255), np.uint8), (np.int64, (0, 255), np.uint8), (np.uint8, (0, 16), np.uint8),
    (np.uint16, (0, 4095), np.uint16), (np.int8, (-128, 127), np.int8), (np.float32, (0, 255),
                                                                         np.uint8),
    (bool, (0, 1), np.uint8)])
def test_grey_levels_are_sampled_as_the_file_had_them(dtype, ends, own, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(ends[0], ends[1] + 1, (800, 4, 4))
    x[0, 0, :2] = ends
    np.savez(tmp_path / "grey.npz", x=x.astype(dtype))
    folder, model = tmp_path / "o", tmp_path / "o" / "model.safetensors"
    assert main(["train", "--data", str(tmp_path / "grey.npz"), "--steps", "2", "--out",
                 str(folder)]) == 0
    _, saved = weights.load_model(model)
    assert saved["levels"] == ends[1] - ends[0] + 1 and saved["ends"] == list(ends)
    assert main(["sample", "--model", str(model), "--n", "9", "--evaluations", "8", "--units",
                 "data", "--out", str(tmp_path / "x")]) == 0
    sampled = np.load(tmp_path / "x.npz")["x"]
    assert sampled.dtype == own and sampled.min() >= ends[0] and sampled.max() <= ends[1]


def test_pixels_that_were_divided_come_back_divided(tmp_path):
    """In [0, 1] and [-1, 1] samples are k / 255 and 2 k / 255 - 1, in float64."""
    x = np.random.default_rng(0).integers(0, 256, (400, 4, 4)).astype(np.uint8)
    for low, high in ((0, 1), (-1, 1)):
        np.savez(tmp_path / "d.npz", x=np.float32(low + x / 255 * (high - low)))
        d = data.load(tmp_path / "d.npz")
        assert d.levels == 256 and d.ends == (low, high)
        back = d.in_own_units(rows(d) + .3 / 255)
        want = low + x[np.argsort(data.sample_keys(x))] / 255 * (high - low)
        assert back.dtype == np.float64 and len(np.unique(back)) == 256
        assert abs(np.sort(back.ravel()) - np.sort(want.ravel())).max() < 1e-12


def test_a_test_file_of_fewer_levels_is_measured_on_the_models(tmp_path, capsys, refused):
    """Dark images have the model's levels; what is between two levels is refused."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 4, 4))
    for name, x in (("train", images), ("dark", images % 90), ("finer", images * .5)):
        np.savez(tmp_path / f"{name}.npz", x=x)
    assert data.load(tmp_path / "dark.npz").levels == 90
    d = data.load(tmp_path / "dark.npz", ends=(0, 255), levels=256)
    assert d.levels == 256 and set(np.unique(d.in_own_units(rows(d)))) <= set(range(90))
    assert main(["train", "--data", str(tmp_path / "train.npz"), "--steps", "2", "--out",
                 str(tmp_path)]) == 0
    argv = ["eval", "--model", str(tmp_path / "model.safetensors"), "--n", "20", "--evaluations",
            "4", "--data"]
    assert main([*argv, str(tmp_path / "dark.npz")]) == 0
    capsys.readouterr()
    refused("none of the 256 grey levels", argv=[*argv, str(tmp_path / "finer.npz")])

"""A user's .npz file: which array is trained on, what is refused, and how much memory it takes."""

import io
import re
import struct
import tracemalloc
import zipfile
from functools import partial

import numpy as np
import pytest

from minidiff import data, npz
from minidiff.__main__ import main

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(900, 2))
IMAGES = RNG.integers(0, 256, (900, 4, 6)).astype(np.uint8)


def npy(x):
    """The bytes of an array as a .npy file."""
    f = io.BytesIO()
    np.save(f, x)
    return f.getvalue()


def npy_header(shape, dtype="<f8", version=(1, 0)):
    """The bytes of a .npy header that claims a shape."""
    f = io.BytesIO()
    said = {"descr": dtype, "fortran_order": False, "shape": shape}
    {1: np.lib.format.write_array_header_1_0, 2: np.lib.format.write_array_header_2_0}[
        version[0]](f, said)
    return f.getvalue()


def archive(file, members, method=zipfile.ZIP_STORED):
    """Write a zip of {name: bytes or array}."""
    with zipfile.ZipFile(file, "w", method) as z:
        for name, content in members.items():
            z.writestr(name, npy(content) if isinstance(content, np.ndarray) else content)
    return file


def train_argv(file):
    return ["train", "--data", str(file), "--out", str(file.parent / "o")]


# ---- refused: one clear line, nothing made ----

@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"nonsense", "not a readable"), (b"", "not a readable"),
    (npy(POINTS), "single array, a .npy file: numpy.savez"),
    ({"x": np.zeros((900, 8, 8))}, "every value is 0"),
    ({"x": np.zeros((900, 4, 4), np.uint8)}, "every value is 0"),
    ({"x": np.full((900, 4, 4), 255, np.uint8)}, "every value is 255"),
    ({"x": POINTS[:10]}, "at least 50"),
    ({"x": POINTS, "x_test": POINTS[:9]}, "900 samples to train on and 0 held out, but for 9 that "
                                          "are trained on; at least 50 of each"),
    ({"x": np.array(["a"] * 900)}, "no numeric array"), ({"x": POINTS * np.nan}, "NaN"),
    ({"x": np.where(POINTS > 3, np.inf, POINTS)}, "NaN or inf"),
    ({"x": POINTS, "x_test": POINTS * np.nan}, "x_test holds NaN"),
    ({"x": np.repeat(POINTS[:3], 300, 0)}, "(equal samples stay together); at least 50"),
    ({"x": np.ones((1, 2**20 + 1))}, "an axis of a sample is at most 1048576"),
    ({"x": np.array([{}] * 900, object)}, "no numeric array"),
    ({"x": np.zeros(900, [("a", "f4")])}, "no numeric array"), ({}, "it holds nothing"),
    ({"x": POINTS + 0j}, "no numeric array"), ({"x": np.zeros((900, 1))}, "two axes"),
    ({"x": np.zeros((900, 0))}, "two axes"), ({"x": np.float64(3)}, "no numeric array"),
    ({"x": np.array([[-1.7e308, 1.7e308]] * 900)}, "too far apart"),
    ({"a": POINTS, "b": POINTS}, "which of a, b is meant? Call the samples x"),
    ({"x_train": POINTS, "z_train": POINTS}, "which of x_train, z_train"),
    ({"x_train": POINTS, "a_test": POINTS, "b_test": POINTS}, "which of a_test, b_test"),
    ({"x_train": POINTS, "x_test": IMAGES}, "are not alike"),
    ({"x_train": IMAGES, "x_test": IMAGES / 255}, "are not alike"),
    ({"y": POINTS, "labels": POINTS}, "which of y, labels is meant")])
def test_bad_data_files_are_refused(content, words, tmp_path, refused):
    file = tmp_path / "d.npz"
    if isinstance(content, dict):
        np.savez(file, **content)
    elif content is not None:
        file.write_bytes(content)
    refused("d.npz", words, argv=train_argv(file))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("member, words", [
    (b"no array", "not a readable"), (b"", "not a readable"), (npy(POINTS)[:40], "not a readable"),
    (npy_header((10**12, 2)), "claims 16000000000000 bytes, (1000000000000, 2) float64, and holds"),
    (npy_header((10**30, 2), version=(2, 0)), "claims"), (npy(POINTS)[:-8], "claims 14400 bytes"),
    (npy(POINTS) + b"more", "claims"), (npy_header((-900, 2)), "x claims a shape of (-900, 2)"),
    (npy(POINTS).replace(b"<f8", b"<f9"), "not a readable"),
    (npy(POINTS).replace(b"descr", b"desc\x00"), "not a readable"),
    (npy(POINTS).replace(b"\x93NUMPY\x01", b"\x93NUMPY\x07"), "x.npy is no array"),
    (npy(POINTS).replace(b"{'descr'", b"(" * 8), "not a readable")])
def test_a_header_is_not_believed(member, words, tmp_path, refused):
    refused("d.npz", words, argv=train_argv(archive(tmp_path / "d.npz", {"x.npy": member})))


def test_what_is_no_array_is_passed_over(tmp_path):
    """What people and systems put beside arrays: texts, folders, macOS's own files."""
    file = archive(tmp_path / "d.npz", {
        "README.txt": b"read me", "folder/": b"", "x.npy": POINTS, "__MACOSX/._x.npy": b"mac",
        "._x.npy": b"mac", "__MACOSX/": b"", "d.json": b"{}", "x.npy.bak": b"x", "./": b"",
        "y.npy/": b""})
    assert npz.contents(file).keys() == {"x"} and data.load(file).shape == (2,)
    for name in ("README.txt", "x.csv"):
        file = archive(tmp_path / "e.npz", {name: b"1,2"})
        with pytest.raises(ValueError, match="no numeric array .* it holds nothing"):
            data.load(file)


def test_an_array_twice_is_refused(tmp_path, refused):
    file = tmp_path / "d.npz"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "w") as z:
        for x in (POINTS, -POINTS):
            z.writestr("x.npy", npy(x))
    refused("holds x twice", argv=train_argv(file))


def test_arrays_that_hold_no_numbers_are_no_fault(tmp_path):
    """Fields with names of any alphabet, many of them, Python objects."""
    named = np.zeros(3, [("\u03bb", "f4")])
    many = np.zeros(3, [(f"a_rather_long_name_{i}", "f8") for i in range(400)])
    with pytest.warns(UserWarning):
        np.savez(tmp_path / "d.npz", x=POINTS, named=named, many=many, objects=np.array([{}, 1]))
    about = data.load(tmp_path / "d.npz").about
    assert "not used: named, many, objects" in about


def test_an_encrypted_file_is_refused(tmp_path, refused):
    file = archive(tmp_path / "d.npz", {"x.npy": POINTS})
    raw = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1
    file.write_bytes(raw)
    refused("x is encrypted", argv=train_argv(file))


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("method", METHODS, ids=["stored", "deflated", "bzip2", "lzma"])
def test_a_damaged_file_is_refused_or_the_same(method, tmp_path):
    """A byte changed, or the end cut off, at 300 places each: one line, or no other number."""
    whole = archive(tmp_path / "d.npz", {"x.npy": POINTS[:400].round(1) + 0.}, method)
    raw = whole.read_bytes()
    file = tmp_path / "e.npz"
    first = data.load(whole)
    rng = np.random.default_rng(1)
    places = rng.permutation(len(raw))[:200]
    ends = [*range(100), *range(len(raw) - 100, len(raw))]  # headers and the directory
    refused = 0
    for place in (*places, *ends):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << rng.integers(8)
        for content in (bytes(flipped), raw[:place]):
            file.write_bytes(content)
            try:
                d = data.load(file)
            except ValueError as e:
                assert str(e).startswith(str(file)) and "\n" not in str(e)
                refused += 1
            else:
                assert d.digest == first.digest and np.array_equal(d.train, first.train)
    assert refused > 600  # what is left are dates and flags of the archive


def test_an_unknown_compression_is_refused(tmp_path, refused):
    file = archive(tmp_path / "d.npz", {"x.npy": POINTS})
    raw = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        struct.pack_into("<H", raw, raw.index(signature) + offset, 97)
    file.write_bytes(raw)
    refused("d.npz", "compression", argv=train_argv(file))


# ---- memory ----

def peak_of(call):
    """The most bytes that Python held while call() ran, beyond what it held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_sizes_are_read_before_arrays(tmp_path, monkeypatch, refused):
    """An archive of 80 kB that would fill 80 MB is refused by its headers."""
    file = archive(tmp_path / "d.npz", {"x.npy": np.zeros((10**7,), np.uint8).reshape(-1, 2)},
                   zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(npz, "free_memory", lambda: 10**7)
    words = "x (5000000, 2) uint8 needs 47 MiB of memory, 9 are free"
    assert peak_of(lambda: refused(words, argv=train_argv(file))) < 10**6


def test_loading_takes_little_more_than_the_numbers(tmp_path):
    """The file's own bytes, float32 of the same shape, two chunks of 2^20 in float64, keys."""
    x = RNG.integers(0, 256, (20_000, 20, 20)).astype(np.uint8)
    for dtype in (np.uint8, np.float64):
        file = tmp_path / "d.npz"
        np.savez(file, x=x.astype(dtype), y=np.zeros(10**7))  # y, 80 MB, is not read
        chunks = 4 * 8 * 2**20
        peak = peak_of(partial(data.load, file))
        assert peak < x.size * (np.dtype(dtype).itemsize + 4) + chunks


def system(folder, files):
    """A folder with the system's small files in it."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize("files, free", [
    ({}, float("inf")),
    ({"meminfo": "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    5 kB\n"}, 5 * 1024),
    ({"memory.max": "max", "memory.current": "7", "memory.stat": "x 1"}, float("inf")),
    ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 9\ninactive_file 600"},
     900),
    ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "700", "memory/"
      "memory.stat": "inactive_file 1\ntotal_inactive_file 50"}, 350),
    ({"meminfo": "MemAvailable: 5 kB\n", "memory.max": "9000", "memory.current": "1000",
      "memory.stat": "inactive_file 0"}, 5120)])
def test_free_memory_is_the_systems_or_the_containers(files, free, tmp_path):
    """What files fill is given up when a program asks, so it counts as free."""
    where = {name: ("proc/" if name == "meminfo" else "sys/fs/cgroup/") + name for name in files}
    system(tmp_path, {where[name]: text for name, text in files.items()})
    assert npz.free_memory(tmp_path) == free


def test_free_memory_of_this_machine():
    assert npz.free_memory() > 2**20


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_running_out_of_memory_is_said(command, tmp_path, refused, monkeypatch, capsys):
    assert main(["train", "--data", "moons", "--steps", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()

    def too_much(*arguments, **options):
        yield np.empty(1 << 62, np.uint8)
    monkeypatch.setattr("minidiff.chunks.states", too_much)
    monkeypatch.chdir(tmp_path)
    refused(f"minidiff {command}: out of memory", "ask for less",
            argv=[command, "--model", "model.safetensors"])
    assert not list(tmp_path.glob("samples*"))


# ---- which array, which axis, which levels ----

@pytest.mark.parametrize("names, train, test", [
    ("a x", "x", None), ("X Z", "X", None), ("x x_train x_test", "x_train", "x_test"),
    ("./x z", "./x", None), ("x_train x_test y_train y_test", "x_train", "x_test"),
    ("test_images test_labels train_images train_labels", "train_images", "test_images"),
    ("train_images val_images test_images train_labels", "train_images", "test_images"),
    ("X_train X_test", "X_train", "X_test"), ("train test", "train", "test"),
    ("x x_test", "x", "x_test"), ("arr_0 arr_1_labels", "arr_0", None),
    ("x_train x_val", "x_train", None), ("x_test", "x_test", None),
    ("images labels", "images", None), ("x_train x_test z_test", "x_train", "x_test"),
    ("trainX testX trainY", "trainX", "testX"), ("Xtrain Xtest ytrain", "Xtrain", "Xtest"),
    ("values", "values", None), ("y", "y", None), ("image_class_a", "image_class_a", None),
    ("training testing", "training", "testing"),
    ("testimony x_test", "testimony", "x_test")])
def test_the_array_to_train_on_is_chosen_by_name(names, train, test, tmp_path):
    """Whatever the order in the file; the labels here are one-hot, of two axes."""
    for order in (names.split(), names.split()[::-1]):
        one_hot = np.eye(10)[RNG.integers(10, size=900)]
        arrays = {name: one_hot if re.search("labels|^y|Y$", name) else POINTS for name in order}
        np.savez(tmp_path / "d.npz", **arrays)
        choice = npz.choose("d.npz", npz.contents(tmp_path / "d.npz"))
        assert choice.train.name == train and (choice.test and choice.test.name) == test


def test_labels_are_found_by_their_shape_too(tmp_path):
    np.savez(tmp_path / "d.npz", arr_0=IMAGES, arr_1=np.zeros(900, int), scale=np.zeros(3))
    choice = npz.choose("d.npz", npz.contents(tmp_path / "d.npz"))
    assert [m.name for m in choice.labels] == ["arr_1"]
    assert [m.name for m in choice.unused] == ["scale"]
    about = data.load(tmp_path / "d.npz").about
    assert ("arr_0 (900, 4, 6) uint8, as images of 4 by 6, 1 channel; not used: arr_1 (labels), "
            "scale; ") in about


THREE = np.arange(900) % 3


@pytest.mark.parametrize("labels, expected", [
    (THREE + 5, THREE), (THREE[:, None], THREE), (THREE + 1., THREE), (THREE == 0, THREE == 0),
    (np.eye(3)[THREE], THREE), (np.array(["a", "b", "c"])[THREE], THREE),
    (np.arange(900), None), (np.arange(900) % 91, None), (np.zeros(900, int), None),
    (THREE / 2, None), (np.full(900, np.nan), None), (2 * np.eye(3)[THREE], None),
    (np.ones((900, 2)), None), (np.eye(3)[THREE] > 0, THREE),
    (np.array([[1, .5, 0]] * 450 + [[0, .5, 1]] * 450), None)])
def test_labels_are_classes_or_are_not_used(labels, expected, tmp_path):
    """Those of ten samples each on average at least, whatever they are called."""
    np.savez(tmp_path / "d.npz", x=IMAGES, y=labels)
    source = npz.source(tmp_path / "d.npz")
    assert (source.labels is None) == (expected is None)
    assert ("y (labels)" in source.what) == (expected is None)
    if expected is not None:
        np.testing.assert_array_equal(source.labels, expected)
        assert f", {expected.max() + 1} classes in y" in source.what


@pytest.mark.parametrize("names, used", [
    ("x y", "y"), ("x_train x_test y_train y_test", "y_train"), ("x y y_test", "y"),
    ("train_images train_labels test_images test_labels", "train_labels"),
    ("x fine_labels coarse_labels", None), ("x y_test", None), ("x y_val", None),
    ("x y index", "y"), ("x_train y_train weights", "y_train"), ("x fold", None),
    ("arr_0 arr_1", "arr_1"), ("arr_0 arr_1 arr_2", None), ("x y arr_1", "y")])
def test_the_labels_of_what_is_trained_on_are_taken(names, used, tmp_path):
    classes = np.arange(900) % 3
    images = re.compile("images|^x|arr_0")
    arrays = {name: IMAGES if images.search(name) else classes for name in names.split()}
    np.savez(tmp_path / "d.npz", **arrays)
    source = npz.source(tmp_path / "d.npz")
    assert (source.labels is not None) == (used is not None)
    assert used is None or f"3 classes in {used}" in source.what


def test_labels_go_with_their_samples(tmp_path):
    """Whichever are held out, and in whatever order they are trained on: here the label is the
    first pixel."""
    images = IMAGES.copy()
    images[:, 0, 0] = np.arange(900) % 3
    np.savez(tmp_path / "d.npz", x=images, y=np.array(["a", "b", "c"] * 300))
    d = data.load(tmp_path / "d.npz")
    first = np.round(d.in_own_units(d.train)[:, 0, 0, 0])
    np.testing.assert_array_equal(d.labels, first)


@pytest.mark.parametrize("shape, channels_first", [
    ((720, 32, 32, 3), (3, 32, 32)), ((720, 28, 28, 1), (1, 28, 28)),
    ((720, 32, 32, 4), (4, 32, 32)), ((720, 3, 32, 32), (3, 32, 32)),
    ((720, 1, 4, 4), (1, 4, 4)), ((720, 16, 8, 8), (16, 8, 8)), ((720, 3, 8, 4), (3, 8, 4)),
    ((720, 32, 32, 2), (2, 32, 32)), ((720, 4, 6), (1, 4, 6)), ((720, 5), (5,))])
def test_channels_come_first(shape, channels_first, tmp_path):
    x = RNG.integers(0, 256, shape).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x=x)
    d = data.load(tmp_path / "d.npz")
    assert d.shape == channels_first
    moved = x.transpose(0, 3, 1, 2) if x.ndim == 4 and d.shape != shape[1:] else x
    want = moved.reshape(720, *channels_first)
    found = d.in_own_units(np.concatenate((d.held, d.train)))
    assert np.array_equal(found, want[np.argsort(data.sample_keys(want))])


@pytest.mark.parametrize("low, high, levels, ends", [
    (0, 255, 256, (0, 255)), (0, 250, 256, (0, 255)), (0, 128, 256, (0, 255)),
    (0, 127, 128, (0, 127)), (0, 16, 17, (0, 16)), (0, 1, 2, (0, 1)), (5, 9, 10, (0, 9)),
    (0, 4000, 4096, (0, 4095)), (0, 65535, 65536, (0, 65535)), (-3, 3, 7, (-3, 3)),
    (0, 70000, None, (0, 70000)), (-40000, 40000, None, (-40000, 40000))])
def test_whole_numbers_are_grey_levels_whatever_their_dtype(low, high, levels, ends):
    x = RNG.integers(low, high + 1, 3000)
    x[:2] = low, high
    for dtype in (np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64, bool):
        if np.array_equal(x.astype(dtype), x):
            assert npz.grey_levels([x.astype(dtype)], float(low), float(high)) == (levels, ends)


def test_numbers_between_levels_are_points():
    x = RNG.integers(0, 256, 3000) / 255
    for dtype in (np.float16, np.float32, np.float64):
        for low, high in ((0, 1), (-1, 1)):
            u = (low + x * (high - low)).astype(dtype)
            assert npz.grey_levels([u], low, high) == (256, (low, high))
            for other in (1.01 * u, u + dtype(.002)):
                ends = float(other.min()), float(other.max())
                assert npz.grey_levels([other], *ends)[0] is None
    u[7] += .3 / 255
    assert npz.grey_levels([u], low, high) == (None, (low, high))
    for n in (256, 3000):  # float16 has few digits: it is no reason to see whole numbers
        uneven = (RNG.random(3000)**4 * n).astype(np.float16)
        assert npz.grey_levels([uneven], 0., float(uneven.max()))[0] is None
    whole = RNG.integers(0, 256, 3000)
    assert npz.grey_levels([whole, whole + .5], 0., 255.5) == (None, (0., 255.5))

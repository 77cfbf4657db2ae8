"""Models and states: every flipped bit and cut is found, nothing that they claim is believed."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from minidiff import weights
from minidiff.__main__ import main
from minidiff.net import ScoreNet

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--data", "moons", "--steps", "4", "--batch", "64", "--save-every", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model and its states, trained for four iterations."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([*TRAIN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of that folder."""
    for file in trained.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / ".lock").unlink()
    return tmp_path


def sample_argv(model):
    return ["sample", "--model", str(model), "--n", "2", "--evaluations", "4", "--out",
            str(model.parent / "x.npz")]


def put(file, tensors, **said):
    """Write safetensors as another program could, with these strings as metadata."""
    safetensors.torch.save_file(tensors, file, said)


# ---- damage ----

@pytest.mark.parametrize("name", ["model", "state"])
def test_every_flipped_bit_and_cut_is_found(name, copy):
    """Of each byte before the tensors, and of bytes throughout these."""
    raw = (copy / f"{name}.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    file = copy / "damaged.safetensors"
    rng = np.random.default_rng(0)
    places = [*range(start), *rng.integers(start, len(raw), 300)]
    for place in places:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << rng.integers(8)
        for content in (flipped, raw[:place]):
            file.write_bytes(content)
            with pytest.raises(ValueError, match="damaged.safetensors") as e:
                weights.read(file)
            assert "\n" not in str(e.value)
    file.write_bytes(raw)
    weights.read(file)


@pytest.mark.parametrize("key", ["sha256", "minidiff"])
def test_a_checksum_that_was_taken_out_is_missed(key, copy):
    raw = (copy / "model.safetensors").read_bytes()
    file = copy / "model.safetensors"
    file.write_bytes(raw.replace(f'"{key}"'.encode(), f'"{key[::-1]}"'.encode(), 1))
    with pytest.raises(ValueError, match="checksum|not minidiff's"):
        weights.read(file)


def test_a_model_of_before_checksums_is_read(copy):
    tensors, metadata = weights.read(copy / "model.safetensors")
    del metadata["version"]
    put(copy / "old.safetensors", tensors, minidiff=json.dumps(metadata))
    again, said = weights.read(copy / "old.safetensors")
    assert said == metadata and all(torch.equal(again[k], tensors[k]) for k in tensors)


# ---- what a file claims ----

SHAPES = ["abc", [], [0], [-1], [2.], [True], [1, 8], [1, 8, 8, 8], [10**30], [1, 10**6, 10**30],
          None, {"2": 2}, [[2]]]
CLAIMS = [{"shape": s} for s in SHAPES] + [
    {"levels": v} for v in ("x", 1, 0, -256, 2.5, True, 10**400, [256])] + [
    {"ends": v} for v in ([1., 1.], [0., float("inf")], [2., 1.], "01", [0.], [0., "1"], 3,
                          [-10**400, 10**400], [float("nan"), 1.], [True, 2],
                          [10**18, 10**18 + 1], [-1.7e308, 1.7e308])] + [
    {"data": v} for v in (5, None, ["moons"])] + [
    {"digest": 7}, {"split": 7}, {"split": None}, {"seed": "1"}, {"seed": 1.5}, {"seed": None}]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: str(c)[:40])
def test_a_claim_of_another_kind_is_refused(claim, copy, refused):
    """Checksums are right: it is a file that anybody could have made."""
    tensors, metadata = weights.read(copy / "model.safetensors")
    file = copy / "claims.safetensors"
    weights.save(file, tensors, metadata | claim)
    refused("claims.safetensors", "not minidiff's", argv=sample_argv(file))
    assert not (copy / "x.npz").exists()


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, "nonsense", "9" * 5000, ""])
def test_metadata_that_is_no_dict_is_refused(text, copy, refused):
    put(copy / "odd.safetensors", {"x": torch.ones(2)}, minidiff=text)
    refused("odd.safetensors", "safetensors file", argv=sample_argv(copy / "odd.safetensors"))


def test_files_of_others_are_refused(copy, refused):
    refused("is the state of a training; its model lies beside it",
            argv=sample_argv(copy / "state.safetensors"))
    (copy / "text.safetensors").write_text("hello")
    (copy / "empty.safetensors").write_bytes(b"")
    (copy / "folder.safetensors").mkdir()
    put(copy / "foreign.safetensors", {"x": torch.ones(1)})
    torch.save({"x": torch.ones(1)}, copy / "pickle.safetensors")
    for name, words in (("text", "not a readable"), ("empty", "not a readable"),
                        ("folder", "is a directory"), ("foreign", "not minidiff's"),
                        ("pickle", "not a readable"), ("absent", "no such file")):
        refused(f"{name}.safetensors", words, argv=sample_argv(copy / f"{name}.safetensors"))


@pytest.mark.parametrize("shape", [[1, 4096, 4096], [3, 2**20, 2**20], [2**20], [1, 8, 8], [3]])
def test_a_shape_that_the_tensors_do_not_have_takes_no_memory(shape, copy, refused):
    tensors, metadata = weights.read(copy / "model.safetensors")
    file = copy / "large.safetensors"
    weights.save(file, tensors, metadata | {"shape": shape})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused("large.safetensors", "another architecture", argv=sample_argv(file))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_weights_of_another_dtype_are_refused(copy, refused):
    tensors, metadata = weights.read(copy / "model.safetensors")
    name = "F_x.inp.weight"
    for dtype in (torch.int32, torch.bool, torch.float64, torch.bfloat16, torch.float16):
        file = copy / "dtype.safetensors"
        weights.save(file, tensors | {name: tensors[name].to(dtype)}, metadata)
        refused("another architecture or dtype", argv=sample_argv(file))
    state, saved = weights.read(copy / "state.safetensors")
    for name in ("net.F_x.inp.weight", "average.n_averaged", "adam.0.step", "adam.0.exp_avg"):
        weights.save(copy / "state.safetensors", state | {name: state[name].to(torch.int32)}, saved)
        refused("not a state of this network", argv=[*TRAIN, "--out", str(copy), "--resume"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_neither_written_nor_read(value, copy, refused):
    for file, argv in ((copy / "model.safetensors", sample_argv(copy / "model.safetensors")),
                       (copy / "state.safetensors", [*TRAIN, "--out", str(copy), "--resume"])):
        tensors, metadata = weights.read(file)
        for name in list(tensors)[::9]:
            if not tensors[name].is_floating_point():
                continue
            wrong = tensors[name].clone()
            wrong.view(-1)[-1] = value
            with pytest.raises(FloatingPointError, match=f"not saved, {name} holds NaN"):
                weights.save(file, tensors | {name: wrong}, metadata)
            text = json.dumps(metadata)
            put(copy / "odd", tensors | {name: wrong}, minidiff=text,
                sha256=weights._checksum(tensors | {name: wrong}, text))
            os.replace(copy / "odd", file)
            refused(file.name, f"{name} holds NaN or infinity", argv=argv)
            weights.save(file, tensors, metadata)
    assert not (copy / "x.npz").exists()


def test_words_are_printed_without_what_moves_the_cursor(copy, capsys):
    """A model's data and split, a state's circumstances and run, the error about each."""
    tensors, metadata = weights.read(copy / "model.safetensors")
    state, saved = weights.read(copy / "state.safetensors")
    odd, text = str(copy / "odd.safetensors"), "\x1b[2J\x07\r\n\u202e"
    resume = [*TRAIN, "--out", str(copy), "--resume", odd]
    measure = ["eval", "--model", odd, "--n", "9", "--evaluations", "4"]
    capsys.readouterr()
    for argv, code, parts, changed in (
            (sample_argv(copy / "odd.safetensors"), 0, tensors, {"data": text}),
            (measure, 2, tensors, {"data": text}),
            ([*measure, "--data", "moons"], 0, tensors, {"split": text, "digest": text}),
            (resume, 0, state, {"circumstances": {"torch": text, "threads": text}}),
            (resume, 2, state, {"objective": text * 1000})):
        whole = saved if parts is state else metadata
        weights.save(odd, parts, whole | changed)
        assert main(argv) == code
        said = "".join(capsys.readouterr())
        assert "\\x1b[2J\\x07\\r\\n\\u202e" in said and len(said) < 2000
        assert not {*"\x1b\x07\u202e"} & {*said}


def test_every_state_that_does_not_fit_is_refused_in_one_line(copy, tmp_path, refused):
    state, saved = weights.read(copy / "state.safetensors")
    odd = copy / "odd.safetensors"
    argv = [*TRAIN, "--out", str(tmp_path / "new"), "--resume", str(odd)]
    less = dict(state)
    del less["adam.0.step"]
    for tensors, changed, words in (
            (state, {"circumstances": "abc"}, "not minidiff's"), (state, {"circumstances": None},
                                                                  "not minidiff's"),
            (state, {"step": 2}, "its parts are not of iteration 2"),
            (state, {"step": 10**30}, "not a state"), (state, {"step": "4"}, "not a state"),
            (state | {"average.n_averaged": torch.tensor(-5)}, {}, "not of iteration 4"),
            (state | {"adam.3.step": torch.tensor(3.)}, {}, "not of iteration 4"),
            (less, {}, "not a state"), (state, {"digest": "0" * 3000}, "another run: digest '000"),
            (state, {"lr": 1}, "another run: lr 1, not 0.002")):
        weights.save(odd, tensors, saved | changed)
        refused("odd.safetensors", words, argv=argv)
    argv[-1] = str(copy / "model.safetensors")
    refused("is a model", "state.safetensors", argv=argv)
    for path in (".", "/", str(copy), "a\0b"):
        argv[-1] = path
        refused("minidiff train: ", argv=argv)


def test_a_checksum_is_of_shapes_and_dtypes(copy):
    """The same bytes as another shape, as another dtype, under each other's names."""
    a, b = torch.arange(6.).reshape(2, 3), torch.ones(2, 3)
    weights.save(copy / "m.safetensors", {"a": a, "b": b}, {})
    raw = (copy / "m.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    said = json.loads(raw[8:8 + length])["__metadata__"]
    put(copy / "same.safetensors", {"a": a, "b": b}, **said)
    weights.read(copy / "same.safetensors")
    for tensors in ({"a": a.reshape(3, 2), "b": b}, {"a": a.view(torch.int32), "b": b},
                    {"a": b, "b": a}, {"a": a}, {"a": a, "b": b, "c": b + 1}):
        put(copy / "odd.safetensors", tensors, **said)
        with pytest.raises(ValueError, match="checksum"):
            weights.read(copy / "odd.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "C64", "BOOL"])
def test_a_dtype_that_is_unknown_is_no_traceback(dtype, copy, refused):
    header = json.dumps({"__metadata__": {"minidiff": "{}"},
                         "x": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}).encode()
    file = copy / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused("odd.safetensors", argv=sample_argv(file))


def test_a_loaded_network_is_the_one_that_was_saved(copy):
    """Weights that are assigned compute the bits of weights that were copied; for images too."""
    for shape in ((2,), (3, 8, 8)):
        torch.manual_seed(0)
        net = ScoreNet(shape).eval().requires_grad_(False)
        net.F_x.out.weight.normal_()
        weights.save(copy / "m.safetensors", net.state_dict(),
                     {"shape": list(shape), "data": "x", "levels": None, "ends": [-1., 1.]})
        loaded, _ = weights.load_model(copy / "m.safetensors")
        x, sigma = torch.randn(5, *shape), torch.full((5,), .7)
        assert torch.equal(loaded(x, sigma), net(x, sigma))
        strides = [p.stride() for p in net.parameters()]
        assert [p.stride() for p in loaded.parameters()] == strides


# ---- the save before ----

def test_the_save_before_is_offered_and_goes_on(copy, capsys, refused):
    """A damaged state is set aside, so that two saves are whole again after the first."""
    state, previous = copy / "state.safetensors", copy / "state.previous"
    whole = state.read_bytes()
    argv = [*TRAIN, "--out", str(copy), "--resume"]
    state.write_bytes(whole[:1000])
    refused("state.safetensors", "not a readable",
            f"the save before it, of iteration 3, is whole: {previous}", argv=argv)
    before = previous.read_bytes()
    assert main([*argv, str(previous)]) == 0
    said = capsys.readouterr().out
    assert f"{state} was damaged and is now {copy / 'state.damaged'}" in said
    assert (copy / "state.damaged").read_bytes() == whole[:1000]
    assert weights.read(state)[1]["step"] == 4
    assert previous.read_bytes() == before
    state.unlink()
    refused("no such file", "iteration 3", argv=argv)
    previous.write_bytes(b"")
    refused("no such file", argv=argv)


def test_a_run_is_not_written_over_by_another_that_is_resumed_there(copy, tmp_path, refused,
                                                                    capsys):
    """Nor by one that finds a model alone, which a demo left."""
    there = tmp_path / "there"
    other = ["train", "--data", "checkerboard", "--steps", "2", "--batch", "64"]
    assert main([*other, "--out", str(there)]) == 0
    files = {f: f.read_bytes() for f in there.glob("*.*")}
    capsys.readouterr()
    argv = [*TRAIN, "--out", str(there)]
    refused("there/state.safetensors is of another run", argv=[*argv, "--resume", str(
        copy / "state.safetensors")])
    (there / "state.safetensors").rename(tmp_path / "elsewhere")
    refused("there/model.safetensors exists: --resume its run, or choose another", argv=argv)
    refused("there/model.safetensors is of another run", argv=[*argv, "--resume", str(
        copy / "state.safetensors")])
    (tmp_path / "elsewhere").rename(there / "state.safetensors")
    assert files == {f: f.read_bytes() for f in there.glob("*.*")}
    for name in ("state.previous", "model.safetensors", "model.previous"):
        only = tmp_path / f"only {name}"
        only.mkdir()
        (only / name).write_bytes(b"")
        refused(f"{name} exists", argv=[*TRAIN, "--out", str(only)])


def test_a_run_that_was_finished_keeps_the_save_before(copy):
    """What is written already is not written again, so previous stays one save behind; with
    another number of threads too, with which nothing was trained."""
    before = {f.name: f.read_bytes() for f in copy.glob("*.*")}
    threads = torch.get_num_threads()
    try:
        for n in (threads, threads + 1):
            torch.set_num_threads(n)
            assert main([*TRAIN, "--out", str(copy), "--resume"]) == 0
    finally:
        torch.set_num_threads(threads)
    after = {f.name: f.read_bytes() for f in copy.glob("*.*")}
    assert before == {name: after[name] for name in before}
    assert weights.read(copy / "state.previous")[1]["step"] == 3


def test_a_model_before_it_is_offered(copy, refused, capsys):
    model, previous = copy / "model.safetensors", copy / "model.previous"
    model.rename(previous)
    refused("no such file", f"the save before it is whole: {previous}", argv=sample_argv(model))
    argv = sample_argv(model)
    argv[2] = str(previous)
    assert main(argv) == 0


# ---- two saves are whole at every moment ----

KILLED = """
import os, sys, torch
from minidiff import weights
folder, last = sys.argv[1], int(sys.argv[2])
seen = 0
def killed_at(call):
    def counted(*arguments, **options):
        global seen
        seen += 1
        if seen == last:
            os._exit(9)
        return call(*arguments, **options)
    return counted
if sys.argv[3] == "no links":
    def link(*arguments):
        raise PermissionError(1, "Operation not permitted")
    os.link = link
for name in "link replace fsync open unlink".split():
    setattr(os, name, killed_at(getattr(os, name)))
weights.save(folder + "/s.safetensors", {"x": torch.full((9,), 3.)}, {"step": 3})
"""


@pytest.mark.parametrize("links", ["links", "no links"])
def test_a_kill_at_any_call_leaves_two_whole_saves(links, tmp_path):
    """A process ends in the middle of a save, before each call that changes files in turn."""
    file = tmp_path / "s.safetensors"
    ended = []
    for last in range(1, 40):
        for step in (1, 2):
            weights.save(file, {"x": torch.full((9,), float(step))}, {"step": step})
        code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(last), links],
                              cwd=ROOT).returncode
        steps = []
        for name in ("s.safetensors", "s.previous"):
            tensors, saved = weights.read(tmp_path / name)
            assert (tensors["x"] == saved["step"]).all()
            steps.append(saved["step"])
        assert steps in ([2, 1], [3, 1], [3, 2])
        ended.append(code)
        if code == 0:
            break
    assert ended[-1] == 0 and len(ended) > 5 and set(ended[:-1]) == {9} and steps == [3, 2]


def test_without_links_saves_are_copied(tmp_path, monkeypatch):
    def link(*arguments):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    file = tmp_path / "s.safetensors"
    for step in range(5):
        weights.save(file, {"x": torch.ones(2)}, {"step": step})
        assert weights.read(file)[1]["step"] == step
        if step:
            assert weights.read(tmp_path / "s.previous")[1]["step"] == step - 1
    assert len(list(tmp_path.iterdir())) == 2

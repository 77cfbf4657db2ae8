"""Labels and known parts, from a file to samples: the network, its training, the commands."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from untrained import IMAGE

from minidiff import chunks, conditions, data, demo, guidance, kernels, noise, npz, train, weights
from minidiff.__main__ import main
from minidiff.chunks import NetScore
from minidiff.conditions import Conditions
from minidiff.net import ScoreNet, per_sample
from minidiff.quality import Judge, Quality

SHARES = {"left": 1, "right": 3}


def sides(n=4000):
    """(x, y): points about (-.5, .1) and, three of four, about (.5, -.1), and their side."""
    right = noise.uniform((n,), 1, tag=noise.CHOICE) < .75
    at = np.where(right[:, None], [.5, -.1], [-.5, .1])
    x = at + np.array([.1, .2]) * noise.normal((n, 2), 2)
    return x, np.where(right, "right", "left")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with sides.npz and the model that `train --labels` made of it."""
    folder = tmp_path_factory.mktemp("sides")
    x, y = sides()
    np.savez(folder / "sides.npz", x=x, y=y)
    assert main(["train", "--data", str(folder / "sides.npz"), "--labels", "--steps", "1000",
                 "--batch", "256", "--out", str(folder)]) == 0
    return folder


def sample(folder, *argv):
    """What `sample` writes: {name: array}."""
    assert main(["sample", "--model", str(folder / "model.safetensors"), "--units", "data",
                 "--out", str(folder / "samples.npz"), *argv]) == 0
    with np.load(folder / "samples.npz") as found:
        return dict(found)


def labelled(shape=IMAGE, classes=3):
    """An untrained network of classes that do not look alike to it."""
    torch.manual_seed(0)
    net = ScoreNet(shape, classes=classes).eval().requires_grad_(False)
    torch.nn.init.normal_(net.F_x.out.weight, std=.02)
    torch.nn.init.normal_(net.F_x.embed.label)
    return net


# ---- the network ----

@pytest.mark.parametrize("shape", [IMAGE, (3,)])
def test_a_network_of_classes_begins_as_the_one_without(shape):
    torch.manual_seed(0)
    plain = ScoreNet(shape)
    torch.manual_seed(0)
    net = ScoreNet(shape, classes=3)
    more = {name: u for name, u in net.state_dict().items() if name not in plain.state_dict()}
    assert list(more) == ["F_x.embed.label"] and more["F_x.embed.label"].shape[0] == 4
    for part in (plain, net):
        torch.nn.init.constant_(part.F_x.out.weight, .01)
    x, sigma = torch.randn(5, *shape), torch.rand(5) + .1
    for label in (None, torch.tensor([2]), torch.arange(5) % 4):
        assert torch.equal(plain(x, sigma), net(x, sigma, label))


@pytest.mark.parametrize("shape", [IMAGE, (3,)])
def test_a_class_for_all_is_that_class_for_each(shape):
    """And none is the last. One level and one class have the bits of any batch."""
    net = labelled(shape)
    x = torch.randn(6, *shape)
    level = torch.tensor([.7])
    for k in range(4):
        one = net(x, level, torch.tensor([k]))
        assert torch.equal(one, net(x, level, torch.full((6,), k)))
        assert torch.equal(one, net(x, level.expand(6), torch.tensor([k])))
        assert torch.equal(one, net(x, level.expand(6), torch.full((6,), k)))
        assert torch.equal(one[:4], net(x[:4], level, torch.tensor([k])))
    assert torch.equal(one, net(x, level))
    several = net(x, level, torch.tensor([0, 1, 2, 3, 0, 1]))
    for k in range(4):
        assert torch.equal(several[k], net(x, level, torch.tensor([k]))[k])
    assert not torch.equal(several[0], several[4])


@pytest.mark.parametrize("levels, labels", [(2, 6), (6, 5), (1, 4), (3, 1)])
def test_as_many_labels_as_samples_or_one(levels, labels):
    with pytest.raises(ValueError, match="one, or one for each of the 6 samples"):
        labelled()(torch.zeros(6, *IMAGE), torch.ones(levels), torch.zeros(labels).long())


def test_rows_of_one_level_are_expanded():
    assert per_sample(torch.zeros(8, 2), torch.zeros(3, 2)).shape == (1, 2)


# ---- training ----

def trainer(**options):
    d = data.load("digits")
    return train.Trainer(d.train, kernels, 60, batch=64, levels=d.levels, labels=d.labels,
                         classes=10, **options)


def test_one_label_in_ten_is_not_told():
    """Of 64 x 60 labels a tenth, to 6 of its errors; which ones, seed and iteration say."""
    t, other = trainer(), trainer(seed=1)
    d = data.load("digits")
    told = []
    for t.step in range(60):
        chosen = train.batch_indices(len(t.x), 64, 0, t.step)
        told.append(t._told(chosen).numpy())
        untold = told[-1] == 10
        u = noise.uniform((64,), 0, step=t.step, tag=noise.LABEL)
        np.testing.assert_array_equal(untold, u < .1)
        np.testing.assert_array_equal(told[-1][~untold], d.labels[chosen][~untold])
    share = (np.stack(told) == 10).mean()
    assert abs(share - .1) < 6 * (.09 / (64 * 60))**.5
    other.step = t.step
    assert ((other._told(chosen).numpy() == 10) != (told[-1] == 10)).any()
    second = trainer()
    second.rows, second.step = slice(32, 64), t.step  # as of the second of two processes
    np.testing.assert_array_equal(second._told(chosen[32:]).numpy(), told[-1][32:])


@pytest.mark.parametrize("objective", ["denoising", "sliced"])
def test_every_objective_learns_the_classes(objective):
    """What is told moves the gradient of the classes' own vectors, and of no other class."""
    t = trainer(objective=objective)
    t.labels = np.full(len(t.x), 3)
    for _ in range(5):
        t.advance()
    moved = t.net.F_x.embed.label.abs().sum(1) > 0
    assert moved.tolist() == [k in (3, 10) for k in range(11)]


def test_a_run_is_resumed_with_its_labels_or_not_at_all(tmp_path, refused, capsys, monkeypatch):
    argv = ["train", "--batch", "32", "--steps", "4", "--save-every", "2"]
    whole = [*argv, "--labels", "--out", str(tmp_path / "whole")]
    assert main(whole) == 0
    state = str(tmp_path / "whole" / "state.previous")
    assert main([*argv, "--labels", "--resume", state, "--out", str(tmp_path / "half")]) == 0
    a, b = (weights.read(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert a[1] == b[1] and all(torch.equal(u, b[0][name]) for name, u in a[0].items())
    assert a[1]["classes"] == data.load("digits").counts()
    capsys.readouterr()
    refused("is of another run: classes", argv=[*argv, "--resume", state,
                                                "--out", str(tmp_path / "none")])
    images, labels = data.digits()
    monkeypatch.setattr(data, "digits", lambda: (images, (labels + 1) % 10))
    counts = data.load("digits").counts()
    monkeypatch.setattr(data.Data, "counts", lambda _: a[1]["classes"])
    assert counts != a[1]["classes"]
    refused("is of another run: labels", argv=[*argv, "--labels", "--resume", state,
                                               "--out", str(tmp_path / "none")])


def test_labels_that_nobody_knows_are_not_learned(refused, tmp_path):
    refused("--labels: of moons no classes are known; call them y, one for each sample",
            argv=["train", "--data", "moons", "--labels", "--out", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("classes", [[1, 2], {"a": 1}, {"a": -1, "b": 2}, {"a": 1.5, "b": 2},
                                     {"a": 0, "b": 0}, "ab", {"a": True, "b": 1}])
def test_a_model_of_classes_that_are_none_is_refused(classes, tmp_path):
    file = tmp_path / "m.safetensors"
    weights.save(file, labelled((2,), 2).state_dict(), {
        "shape": [2], "data": "x", "levels": None, "ends": [0., 1.], "seed": 0,
        "classes": classes})
    with pytest.raises(ValueError, match="not minidiff's"):
        weights.load_model(file)


def test_a_model_keeps_its_classes_or_has_none(tmp_path):
    said = {"shape": [2], "data": "x", "levels": None, "ends": [0., 1.], "seed": 0}
    file = tmp_path / "m.safetensors"
    net = labelled((2,), 2)
    weights.save(file, net.state_dict(), said | {"classes": SHARES})
    found, saved = weights.load_model(file)
    assert found.classes == 2 and list(saved["classes"]) == ["left", "right"]
    assert torch.equal(found.F_x.embed.label, net.F_x.embed.label)
    weights.save(file, ScoreNet((2,)).state_dict(), said)  # as before 0.7.0
    found, saved = weights.load_model(file)
    assert found.classes == 0 and saved["classes"] is None


# ---- which class a sample is asked to be of ----

def test_classes_are_as_often_as_in_the_data():
    """To 6 of their errors; sample 17 has the same one, however many are drawn."""
    labels = Conditions({"a": 5, "b": 0, "c": 15}).labels(10_000, 3)
    counts = np.bincount(labels, minlength=3) / 10_000
    assert counts[1] == 0 and abs(counts[0] - .25) < 6 * (.25 * .75 / 10_000)**.5
    some = Conditions({"a": 5, "b": 0, "c": 15})
    np.testing.assert_array_equal(some.labels(20, 3, 100), labels[100:120])
    np.testing.assert_array_equal(some.labels(2, [3, 3]), labels[[0, 0]])  # seeds of their own
    assert (some.labels(10_000, 4) != labels).any()


def test_a_label_is_that_class_alone_and_no_weight_is_no_class():
    for name, k in (("left", 0), ("right", 1)):
        assert (Conditions(SHARES, name).labels(100) == k).all()
    assert Conditions(SHARES, "left", 0.).labels(100) is None
    assert Conditions().labels(100) is None
    known = np.zeros((1, 2))
    assert Conditions(SHARES, known=known).labels(100) is None  # it follows from what is known
    assert (Conditions(SHARES, "right", known=known).labels(100) == 1).all()


def test_a_networks_samples_are_guides():
    """Conditions asks a network for what `guidance.guide` needs, and counts both."""
    net = labelled((2,), 2)
    for w, asked in ((0., 1), (1., 1), (2.5, 2)):
        score = NetScore(net)
        *_, found = chunks.states(score, (2,), "ddim", 7, 9, kernels, evaluations=5, seed=3,
                                  conditions=Conditions(SHARES, None, w))
        assert score.evaluations == 5 * asked
        label = torch.from_numpy(Conditions(SHARES).labels(9, 3, 7))
        given, engine = guidance.guide(
            lambda x, sigma: net(x, torch.tensor([sigma]).float()),
            lambda x, sigma: net(x, torch.tensor([sigma]).float(), label), w,  # noqa: B023
            kernels.Fused(3, 7))
        z = kernels.normal((9, 2), device="cpu", seed=3, sample=7)
        *_, want = chunks.FAMILIES["ddim"](given, z, 5, engine)
        assert torch.equal(found, want)


def test_samples_are_of_the_class_that_is_asked_for(trained):
    """Sides are 10 std apart: no sample of a trained network lies on the wrong one, but for
    one in a hundred, which 1,000 iterations may leave."""
    found = sample(trained, "--n", "2000", "--family", "heun")
    right = found["x"][:, 0] > 0
    assert found["y"].dtype.kind == "U" and set(found["y"]) == {"left", "right"}
    assert ((found["y"] == "right") == right).mean() > .99
    assert abs((found["y"] == "right").mean() - .75) < 6 * (.75 * .25 / 2000)**.5
    for side, at in (("left", -.5), ("right", .5)):
        x = sample(trained, "--n", "1000", "--label", side)["x"]
        # std .1 of 1,000 points: .02 is 6 errors of a mean; the rest is the network's
        assert abs(x[:, 0].mean() - at) < .05 and x[:, 0].std() == pytest.approx(.1, rel=.5)
    none = sample(trained, "--n", "1000", "--guidance", "0")
    assert list(none) == ["x"] and .6 < (none["x"][:, 0] > 0).mean() < .9
    far = sample(trained, "--n", "1000", "--label", "left", "--guidance", "3")["x"]
    near = sample(trained, "--n", "1000", "--label", "left")["x"]
    assert far[:, 0].mean() <= near[:, 0].mean() + .01 and (far != near).mean() > .9


def test_a_sample_is_the_same_however_many_are_drawn_and_by_its_seed(trained):
    few, many = (sample(trained, "--n", str(n), "--guidance", "2") for n in (3, 1030))
    np.testing.assert_array_equal(few["x"], many["x"][:3])
    np.testing.assert_array_equal(few["y"], many["y"][:3])
    by_seed = sample(trained, "--seeds", "5,0,5", "--guidance", "2")
    assert by_seed["y"][0] == by_seed["y"][2] and by_seed["y"][1] == many["y"][0]
    np.testing.assert_allclose(by_seed["x"][1], many["x"][0], atol=1e-5)  # another batch
    np.testing.assert_array_equal(by_seed["x"][0], by_seed["x"][2])


def test_what_a_model_does_not_know_is_one_line(trained, model, refused):
    own = str(trained / "model.safetensors")
    for argv, said in (
            (["--model", own, "--label", "middle"],
             f"--label middle: {own} knows left, right"),
            (["--model", model, "--label", "7"],
             f"--label: {model} was trained without classes; see train --labels"),
            (["--model", model, "--guidance", "2"], "--guidance: "),
            (["--model", own, "--label", "left,right"], "--label left,right: "),
            (["--model", own, "--label", "left", "--guidance", "0"],
             "--guidance 0 forgets the class, and --label asks for one")):
        refused(said, argv=["sample", *argv, "--out", str(trained / "no.npz")])
    refused("without --backend, --evaluations, --family and --guidance",
            argv=["eval", "--model", own, "--likelihood", "--guidance", "0"])
    assert not (trained / "no.npz").exists()


@pytest.mark.parametrize("argv, said", [
    (["--guidance", "nan"], "must be within a million of 0, got nan"),
    (["--guidance=-1e7"], "must be within a million of 0, got -1e7"),
    (["--guidance", "much"], "invalid guidance value: 'much'"),
    (["--label", ""], "must not be empty")])
def test_a_word_that_is_no_option_is_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", *argv])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_eval_says_how_many_are_as_asked(trained, tmp_path, capsys):
    """Beside held-out data, and for data of other classes not at all."""
    argv = ["eval", "--model", str(trained / "model.safetensors"), "--samples", "200",
            "--json", str(tmp_path / "e.json")]
    assert main([*argv, "--guidance", "2", "--family", "dpmpp_2m"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["named"] > .98 and found["evaluations"] == 40 and found["real"]["named"] > .98
    assert re.search(r"as asked\ndpmpp_2m .*(\d\.\d{3}) \+- \d\.\d{3}$", out, re.M)
    x, y = sides()
    np.savez(tmp_path / "other.npz", x=x, y=np.where(y == "left", "a", "b"))
    assert main([*argv, "--data", str(tmp_path / "other.npz")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["named"] is None
    assert "as asked" not in capsys.readouterr().out


def test_a_likelihood_is_told_the_classes_that_are_known(trained, tmp_path, capsys):
    """-log2 p(x | y) is less than -log2 p(x) by what a side tells: at least half of its .81
    bits, over two coordinates, where a network of 1,000 iterations is right to some .1."""
    argv = ["eval", "--model", str(trained / "model.safetensors"), "--likelihood",
            "--samples", "500", "--json", str(tmp_path / "l.json")]
    assert main(argv) == 0
    assert "held-out samples given their classes" in capsys.readouterr().out
    given = json.loads((tmp_path / "l.json").read_text())
    x, _ = sides()
    np.savez(tmp_path / "alone.npz", x=x)
    assert main([*argv, "--data", str(tmp_path / "alone.npz")]) == 0
    assert "given" not in capsys.readouterr().out
    alone = json.loads((tmp_path / "l.json").read_text())
    assert given["bits_per_dim"] < alone["bits_per_dim"] - .2


# ---- what is known of a sample ----

def test_a_grey_level_is_seen_as_the_middle_of_what_it_becomes():
    """Mean and std of `data.dequantized`, whatever its noise."""
    x = np.linspace(-1, 1, 17)[:, None] * np.ones((17, 4000))
    seen, std = conditions.as_seen(x, 17)
    by_noise = data.dequantized(x, 17, seed=5)
    # uniform noise of std .034: 6 errors of a mean of 4,000
    np.testing.assert_allclose(seen[:, 0], by_noise.mean(1), atol=6 * std / 4000**.5)
    assert std == pytest.approx((by_noise - seen).std(), rel=.02)
    point, no_std = conditions.as_seen(x, None)
    assert no_std == .01 and (point == x).all() and point is not x


def test_what_is_known_is_the_references_posterior():
    """Of a Gaussian, a network's score in tensors: exact for few numbers, PiGDM's for many."""
    for D, sigma_data in ((2, None), (9, .5)):
        V = .3 + .7 * np.eye(D)
        known = np.full((2, D), np.nan)
        known[0, 0], known[1, 1] = .5, -.2

        def net(x, sigma, label=None, V=V):
            P = np.linalg.inv(V + sigma**2 * np.eye(len(V)))
            return -x @ torch.tensor(P, dtype=x.dtype)

        def linearize(x, sigma, V=V):
            P = np.linalg.inv(V + sigma**2 * np.eye(len(V)))
            return -x @ P, lambda v: -v @ P

        of_known = Conditions(known=known, noise_std=.1)
        score, engine = of_known(net, kernels.Fused(0), 5, 3)  # rows 1, 0, 1
        want = guidance.posterior(linearize, known[[1, 0, 1]], lambda s: (1., s),
                                  noise_std=.1, sigma_data=sigma_data)
        x = torch.randn(3, D)
        for sigma in (.01, .5, 20.):
            np.testing.assert_allclose(score(x, sigma).numpy(), want(x.double().numpy(), sigma),
                                       rtol=2e-4, atol=2e-4 / sigma)  # float32, 1/sigma large


def test_guided_and_known_at_once():
    """The guided score, then what is known: both of the whole."""
    net = labelled((2,), 2)
    known = np.array([[.2, np.nan]])
    both = Conditions(SHARES, "left", 3., known=known)
    score, _ = both(NetScore(net), kernels.Fused(0), 0, 4)
    x = torch.randn(4, 2)

    def whole(x, sigma):
        level = torch.full((1,), sigma)
        s, s_y = net(x, level), net(x, level, torch.zeros(1).long())
        return guidance.guided(s, s_y, 3.)

    want = guidance.posterior(conditions.linearized(whole, (2,), "cpu"),
                              known.repeat(4, 0), lambda s: (1., s))
    np.testing.assert_allclose(score(x, .5).numpy(), want(x.double().numpy(), .5), rtol=1e-5)


def known_file(folder, x, name="known.npz"):
    np.savez(folder / name, x=x)
    return str(folder / name)


def test_samples_are_completed(trained):
    """What is known stays, and the rest is of the side that it tells: x = .5 is right's."""
    x = np.array([[.5, np.nan], [-.45, np.nan], [np.nan, np.nan]])
    file = known_file(trained, x)
    for family in ("ddim", "reverse_sde_vp", "pc_ve", "edm_churn"):
        found = sample(trained, "--known", file, "--family", family, "--n", "600")
        rows = found["x"].reshape(200, 3, 2)
        assert list(found) == ["x"]
        np.testing.assert_allclose(rows[:, :2, 0], np.broadcast_to(x[:2, 0], (200, 2)),
                                   rtol=1e-6)
        # std .2 of 200: 6 errors are .085; the rest is the network's and the sampler's
        assert abs(rows[:, 0, 1].mean() + .1) < .12 and abs(rows[:, 1, 1].mean() - .1) < .12
        assert .1 < rows[:, 0, 1].std() < .3
        assert .55 < (rows[:, 2, 0] > 0).mean() < .92  # nothing is known: any side
    assert len(sample(trained, "--known", file)["x"]) == 3  # as many as there are rows
    told = sample(trained, "--known", known_file(trained, x[2:]), "--label", "left",
                  "--guidance", "2", "--n", "200")
    assert (told["x"][:, 0] < 0).mean() > .97 and set(told["y"]) == {"left"}


@pytest.mark.parametrize("units", ["model", "data"])
def test_known_pixels_are_kept_in_either_units(units, model, tmp_path):
    grey = np.arange(64).reshape(1, 8, 8) % 17
    x = grey.astype(float) if units == "data" else grey / 8. - 1
    x[:, 3:] = np.nan
    assert main(["sample", "--model", model, "--known", known_file(tmp_path, x), "--n", "2",
                 "--units", units, "--evaluations", "3", "--out", str(tmp_path / "s")]) == 0
    found = np.load(tmp_path / "s.npz")["x"]
    assert found.shape == (2, 1, 8, 8)
    np.testing.assert_allclose(found[:, :, :3], np.broadcast_to(x[None, :, :3], (2, 1, 3, 8)),
                               atol=1e-6)
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("x, said", [
    (np.full((2, 1, 8, 8), np.inf), "x holds inf"),
    (np.where(np.eye(8)[None] > 0, 1.2, np.nan),
     "x has values outside -1 to 1, those of the model; see --units"),
    (np.zeros((2, 8, 8), int), "x has no NaN, so nothing is unknown"),
    (np.full((2, 4, 4), np.nan), r"the model's samples are (n, 1, 8, 8)"),
    (np.full((2, 5), np.nan), r"the model's samples are (n, 1, 8, 8)"),
    (np.full((0, 1, 8, 8), np.nan), r"the model's samples are (n, 1, 8, 8)"),
    (np.array(["a"] * 8), "no numeric array")])
def test_a_file_of_something_else_is_one_line(x, said, model, tmp_path, refused):
    refused(said, argv=["sample", "--model", model, "--known", known_file(tmp_path, x),
                        "--out", str(tmp_path / "no.npz")])
    assert not (tmp_path / "no.npz").exists()


def test_what_cannot_complete_is_one_line(trained, refused):
    argv = ["sample", "--model", str(trained / "model.safetensors"), "--known"]
    file = known_file(trained, np.full((2, 2), np.nan))
    refused("--known: the steps of pf_ode_adaptive are the batch's: choose another --family",
            argv=[*argv, file, "--family", "pf_ode_adaptive"])
    refused("--guidance: with --known it is for a --label", argv=[*argv, file, "--guidance", "2"])
    far = known_file(trained, np.array([[.5, np.nan], [1e30, np.nan]]), "far.npz")
    refused(f"{far}: row 1 of x is far outside -1 to 1", argv=[*argv, far])
    refused("none.npz: no such file", argv=[*argv, "none.npz"])


# ---- where classes come from ----

@pytest.mark.parametrize("labels, names", [
    (np.arange(900) % 3 + 5, ("5", "6", "7")), (np.arange(900) % 12, tuple(map(str, range(12)))),
    ((np.arange(900) % 2).astype(float), ("0", "1")), (np.arange(900) % 2 == 0, ("0", "1")),
    (np.eye(3)[np.arange(900) % 3], ("0", "1", "2")),
    (np.array([b"d\xfe", b"d\xff"])[np.arange(900) % 2], ("d\\xfe", "d\\xff")),
    (np.array(["cat", "dog"])[np.arange(900) % 2], ("cat", "dog"))])
def test_classes_are_called_as_the_file_calls_them(labels, names, tmp_path):
    """In their own order, 10 after 9."""
    x = np.arange(900.)[:, None] * np.ones(2) / 7
    np.savez(tmp_path / "d.npz", x=x, y=labels)
    d = data.load(tmp_path / "d.npz")
    assert d.classes == names and sum(d.counts().values()) == len(d.train)
    again = npz.numbered(labels, names)
    np.testing.assert_array_equal(again, npz.source(tmp_path / "d.npz").labels)
    own = np.round(d.in_own_units(d.held)[:, 0] * 7).astype(int)
    np.testing.assert_array_equal(d.held_labels, again[own])


@pytest.mark.parametrize("beside, used", [
    ("y_test", True), ("labels_test", False), ("y_val", False)])
def test_a_test_arrays_labels_are_those_called_like_the_trainings(beside, used, tmp_path):
    x = np.arange(1800.).reshape(900, 2) / 7
    names = np.array(["a", "b", "c"])
    np.savez(tmp_path / "d.npz", x_train=x, x_test=x[:300] + .01, y_train=names[np.arange(900) % 3],
             **{beside: names[np.arange(300) % 3]})
    d = data.load(tmp_path / "d.npz")
    assert (d.held_labels is not None) == used
    assert (f"in y_train and {beside}" in d.about) == used
    if used:
        own = np.round(d.in_own_units(d.held)[:, 0] * 7 / 2 - .035).astype(int)
        np.testing.assert_array_equal(d.held_labels, own % 3)


def test_a_tests_label_that_training_never_saw_is_not_used(tmp_path):
    x = np.arange(1800.).reshape(900, 2) / 7
    np.savez(tmp_path / "d.npz", x_train=x, x_test=x[:300] + .01, y_train=np.arange(900) % 3,
             y_test=np.arange(300) % 4)
    d = data.load(tmp_path / "d.npz")
    assert d.held_labels is None and "not used: y_test (labels)" in d.about


# ---- the demo ----

def test_a_demo_of_classes_shows_each_and_completes_images(tmp_path, capsys, monkeypatch):
    few = {name: demo.FAMILIES[name] for name in (demo.TRAJECTORY, demo.QUICK)}
    monkeypatch.setattr(demo, "FAMILIES", few)
    monkeypatch.setattr(demo, "CURVE", ())
    monkeypatch.setattr(demo, "likelihood", lambda *a: None)
    drawn = {}
    from minidiff import plot
    picture, completions = plot.picture, plot.completions
    monkeypatch.setattr(plot, "picture", lambda file, d, samples, *more: (
        drawn.update(samples), picture(file, d, samples, *more)))
    monkeypatch.setattr(plot, "completions", lambda file, rows: (
        drawn.update(rows), completions(file, rows)))
    assert main(["demo", "--steps", "4", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for k in range(10):
        assert drawn[f"{k}, w = 2"].shape[1:] == IMAGE
    assert sum(len(drawn[f"{k}, w = 2"]) for k in range(10)) == 360
    assert re.search(r"^dpmpp_2m, w = 2 +40 ", out, re.M) and "as asked" in out
    d = data.load("digits")
    for way in ("completed", "its class told", "by replacement"):
        np.testing.assert_allclose(drawn[way][:, :, :4], d.held[:120, :, :4], atol=1e-6)
        assert re.search(rf"^covered images, {way}: .\.... \+- .\.... of the right class$",
                         out, re.M)
    assert np.isnan(drawn["covered"][:, :, 4:]).all()
    assert (tmp_path / "completed.png").read_bytes().startswith(b"\x89PNG")
    _, saved = weights.load_model(tmp_path / "model.safetensors")
    assert saved["classes"] == d.counts()


def test_a_few_samples_of_a_class_leave_the_rest_of_the_row_white():
    from minidiff import plot
    figure = plot._image_rows({"$x_{": np.ones((2, 1, 4, 4)), "b": np.ones((20, 1, 4, 4))}, 5)
    few, many = (axis.images[0].get_array() for axis in figure.axes)
    assert few.shape == many.shape == (6, 30)
    assert (few[:, :12] == many[:, :12]).all() and (few[:, 12:] == -1).all()
    assert figure.axes[0].get_ylabel() == "$x {"
    figure.savefig("/dev/null", format="png")  # a name is no formula
    plot.plt.close(figure)


def test_shares_of_what_was_asked_are_judged_by_the_datas_numbers():
    d = data.load("digits")
    asked = demo.labels_asked(d, 50, 3, Conditions(d.counts()))
    np.testing.assert_array_equal(asked, Conditions(d.counts()).labels(50, 3))
    assert demo.labels_asked(d, 50, 3, Conditions(SHARES)) is None
    assert demo.labels_asked(d, 50, 3, None) is None
    rows = [demo.Measured("ddim", 5, 1., Quality(.5, .01, 1., .7, .02, .8, .03))]
    text = demo.table(rows, Judge(d).of_data(100), .9)
    assert "0.800 +- 0.030" in text and "as asked" in text.splitlines()[0]


def test_one_class_of_a_chunk_is_one_class_of_all():
    """`partial` over rows: a label a sample is the label of each alone."""
    net = labelled()
    x = torch.randn(8, *IMAGE)
    label = np.arange(8) % 3
    whole = partial(NetScore(net), label=label)(x, .5)
    for k in range(3):
        alone = NetScore(net)(x, .5, np.full(8, k))
        assert torch.equal(whole[label == k], alone[label == k])

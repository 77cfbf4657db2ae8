"""How good samples are: figures known by construction, at any number of samples."""

import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

from minidiff import data, demo, kernels, noise, plot, train, weights
from minidiff.__main__ import main
from minidiff.demo import Trained
from minidiff.quality import (
    CLEAR,
    Judge,
    Quality,
    classifier,
    nearest_distance,
    share_of,
    svm_accuracy,
)

DIGITS = data.load("digits")


def test_quality_figures_know_good_from_bad():
    good, _ = svm_accuracy(DIGITS.train[:360], DIGITS.held)
    bad, _ = svm_accuracy(noise.normal((360, 1, 8, 8)), DIGITS.held)
    assert good < .58 and bad > .95
    assert nearest_distance(DIGITS.train[:50], DIGITS.train) == 0
    assert nearest_distance(DIGITS.held, DIGITS.train) > 1


def test_one_block_is_the_plain_five_fold_accuracy():
    x, held = DIGITS.train[:360], DIGITS.held[:360]
    points = np.concatenate((x, held)).reshape(720, -1)
    split = StratifiedKFold(5, shuffle=True, random_state=0)
    folds = cross_val_score(SVC(), points, np.arange(720) < 360, cv=split)
    assert svm_accuracy(x, held) == (folds.mean(), folds.std(ddof=1) / 5**.5)


def shifted(n, seed, by=0.):
    """n normal points in five dimensions, shifted along the first."""
    x = noise.normal((n, 5), seed)
    x[:, 0] += by
    return x


def test_more_samples_make_the_accuracys_error_smaller_and_not_another_figure():
    """Of two normals apart by .8 the best rule is right with probability Phi(.4) = .655.

    A machine that saw 288 of each comes to some .02 less. Sixteen blocks have a quarter of one
    block's error; errors themselves are uncertain, by 1 / sqrt(2 * 4) of one block's 5 folds.
    """
    found = {n: svm_accuracy(shifted(n, 1, .8), shifted(n, 2)) for n in (360, 16 * 360)}
    (few, error_of_few), (many, error) = found.values()
    assert .6 < many < .655
    # 2 * 5,760 points, each told right or wrong on its own: .0044
    assert error == pytest.approx((.63 * .37 / (2 * 5760))**.5, rel=.45)
    assert error < error_of_few and abs(few - many) < 5 * error_of_few


@pytest.mark.parametrize("n, blocks", [(5, 1), (360, 1), (539, 1), (541, 2), (1000, 3)])
def test_blocks_have_about_one_size(n, blocks, monkeypatch):
    sizes = []

    def score(machine, points, is_sample, cv):
        sizes.append((is_sample.sum(), (~is_sample).sum()))
        return [.5] * 5
    monkeypatch.setattr("sklearn.model_selection.cross_val_score", score)
    assert svm_accuracy(np.zeros((n, 2)), np.ones((n, 2))) == (.5, 0)
    assert len(sizes) == blocks and np.sum(sizes) == 2 * n
    assert all(a == b and abs(a - n / blocks) < 1 for a, b in sizes)


def test_the_nearest_sample_is_found_in_blocks():
    x, others = shifted(700, 3), shifted(300, 4)
    every = np.linalg.norm(x[:, None] - others, axis=-1).min(1)
    assert nearest_distance(x, others) == pytest.approx(np.median(every), rel=1e-6)


def test_the_classifier_knows_digits_and_no_noise():
    """Most of held-out digits it names clearly; noise has no class, nor has the middle of two
    digits as often. With the labels of other digits it is right for one in ten."""
    classify, right = classifier(DIGITS.train, DIGITS.labels)
    held = classify(DIGITS.held)
    assert held.shape == (377, 10) and held.sum(1) == pytest.approx(1)
    last = DIGITS.train[1278:], DIGITS.labels[1278:]  # 142, which it did not see
    assert right == (classify(last[0]).argmax(1) == last[1]).mean() > .93
    share, error = share_of(held.max(1) >= CLEAR)
    assert share > .88 and error == pytest.approx((share * (1 - share) / 377)**.5)
    between = (DIGITS.train[:360] + DIGITS.train[360:720]) / 2
    assert (classify(between).max(1) >= CLEAR).mean() < .4
    static = np.clip(noise.normal((360, 1, 8, 8)), -1, 1)
    assert (classify(static).max(1) >= CLEAR).mean() < .1
    _, by_chance = classifier(DIGITS.train, np.roll(DIGITS.labels, 1))
    assert by_chance < .1 + 4.9 * (.09 / 142)**.5


def test_a_share_has_a_binomials_error():
    assert share_of(np.array([True, False, True, False])) == (.5, .25)
    assert share_of(np.array([True, True])) == (1, 0)


def test_a_clear_class_has_nine_tenths_and_the_one_asked_for_is_the_likeliest():
    some = SimpleNamespace(train=shifted(50, 5), held=shifted(50, 6), labels=None,
                           held_labels=None)
    judge = Judge(some)
    judge.classify = lambda x: np.array([[.9, .1], [.89, .11], [.05, .95], [.49, .51]] * 2)
    x = shifted(8, 7)
    found = judge(x, np.array([0, 0, 0, 1] * 2))
    assert (found.clear, found.named) == (.5, .75)
    assert found.named_error == pytest.approx((.75 * .25 / 8)**.5)
    assert judge(x).clear == .5 and judge(x).named is None


def test_a_classifier_of_many_samples_sees_sixty_thousand_ten_times(monkeypatch):
    """And never the last tenth, of which it tells how many it names right: class 1 alone."""
    seen = []

    class Model:
        def partial_fit(self, x, labels, classes):
            seen.append((len(x), len(labels), list(classes)))
            assert x[:, 0].tolist() == list(range(len(x)))

        def predict(self, x):
            seen.append(len(x))
            return np.ones(len(x))
    monkeypatch.setattr("sklearn.neural_network.MLPClassifier", lambda *a, **kw: Model())
    for n, first, passes in ((100, 90, 50), (66_000, 59_400, 10), (70_000, 60_000, 10)):
        seen.clear()
        x = np.stack((np.arange(n), np.zeros(n)), 1)
        assert classifier(x, np.arange(n) % 2)[1] == .5
        assert seen == [(first, first, [0, 1])] * passes + [n // 10]


def test_a_judge_measures_all_and_compares_as_many_as_are_held_out():
    """The SVM has the first 40 pairs; the other figures are of all 100 samples."""
    some = SimpleNamespace(train=shifted(300, 5), held=shifted(40, 6), labels=None,
                           held_labels=None)
    x = shifted(100, 7, .5)
    found = Judge(some)(x)
    assert found[:2] == svm_accuracy(x[:40], some.held)
    assert found.nearest == nearest_distance(x, some.train)
    assert found.clear is found.clear_error is None
    best = Judge(some).of_data(100)
    assert best[:2] == svm_accuracy(some.train[:40], some.held)
    assert best.nearest == nearest_distance(some.held, some.train)


def test_a_judge_with_labels_says_how_many_are_clear():
    judge = Judge(DIGITS)
    best = judge.of_data(100)
    of_held = judge.classify(DIGITS.held[:100])
    clear = share_of(of_held.max(1) >= CLEAR)
    right = share_of(of_held.argmax(1) == DIGITS.held_labels[:100])
    assert best[3:] == (*clear, *right)
    assert best.named > .9 and judge(DIGITS.held[:100]).named is None
    of_others = judge(DIGITS.held[:100], np.roll(DIGITS.held_labels[:100], 1))
    assert of_others.named < .1 + 4.9 * (.09 / 100)**.5
    static = np.clip(noise.normal((100, 1, 8, 8)), -1, 1)
    assert judge(static).clear < .1 < best.clear
    assert judge.right > .93
    alone = SimpleNamespace(train=DIGITS.train, held=DIGITS.held, labels=0 * DIGITS.labels)
    assert Judge(alone).classify is Judge(alone).right is None  # one class says nothing


def test_eval_measures_more_samples_than_are_held_out(model, tmp_path, capsys):
    """Beside held-out data's own figures, in the table and in the file."""
    net, saved = weights.load_model(model)
    saved |= {"digest": DIGITS.digest, "split": DIGITS.split}
    weights.save(model, net.state_dict(), saved)
    out = tmp_path / "e.json"
    argv = ["eval", "--model", model, "--evaluations", "2", "--n", "400", "--json", str(out)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "377 compared with as many held out of digits" in said and "400 samples" in said
    lines = said.splitlines()
    header, = [line for line in lines if line.startswith("family")]
    assert header.endswith("clear class")
    assert any(line.startswith("train | held-out") for line in lines)
    found = json.loads(out.read_text())
    assert found["n"] == 400 and found["accuracy"] > .9  # nobody trained it
    assert set(found["real"]) == set(Quality._fields) and found["real"]["clear"] > .88


def test_a_training_is_judged_on_the_way(monkeypatch):
    """After 1/16, 1/8, 1/4 and 1/2 of its iterations, by the average network's samples; time
    that judging takes is not the training's. The training's bits are those of one unjudged."""
    moons = data.load("moons")

    def trainer():
        return train.Trainer(moons.train, kernels, 32, batch=64, seed=1)
    judged, alone, measured = trainer(), trainer(), []
    waits = iter(range(0, 10_000, 100))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(waits)))
    points, seconds = demo.learn(judged, Judge(moons), 50, kernels, seed=1)
    assert [point.iterations for point in points] == [2, 4, 8, 16]
    # the clock advances by 100 a look: one look from start or judging to the next judging
    assert [point.seconds for point in points] == [100, 200, 300, 400] and seconds == 500
    assert all(0 <= point.quality.accuracy <= 1 for point in points)
    for _ in train.iterations(alone):
        pass
    for name, u in alone.state().items():
        assert torch.equal(u, judged.state()[name]), name
    del measured[:]
    again = trainer()
    monkeypatch.setattr(demo, "measure", lambda net, *a, **kw: (
        measured.append(net) or (demo.Measured("", 0, 0., Quality(.5, 0., 1.)),)))
    demo.learn(again, Judge(moons), 50, kernels, seed=1)
    assert all(net is again.average.module for net in measured) and len(measured) == 4


def test_training_is_drawn_with_its_time(tmp_path, monkeypatch):
    """Both figures of labelled data, one of others; iterations below, seconds above."""
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    for labelled in (True, False):
        clear = [(.8, .03), (.9, .04), (.95, .01)] if labelled else [(None, None)] * 3
        points = [Trained(10, 2.4, Quality(.6, .01, 2., *clear[0])),
                  Trained(20, 4.8, Quality(.55, .02, 2., *clear[1]))]
        plot.training(tmp_path / "t.png", points, Quality(.5, .01, 2., *clear[2]))
        figure = plot.plt.gcf()
        assert len(figure.axes) == 1 + labelled
        shown = [((.6, .55), (.01, .02), .5), ((.8, .9), (.03, .04), .95)]
        for axis, (values, errors, best) in zip(figure.axes, shown):
            line, _, (bars,) = axis.containers[0]
            np.testing.assert_allclose(line.get_xydata(), list(zip((10, 20), values)))
            ends = [segment[:, 1] for segment in bars.get_segments()]
            np.testing.assert_allclose(np.ptp(ends, 1) / 2, errors)
            above, = axis.child_axes
            assert [text.get_text() for text in above.get_xticklabels()] == ["2 s", "5 s"]
            assert axis.lines[-1].get_ydata() == [best, best]
        figure.clear()
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_a_fixed_size_are_named_in_the_table():
    real = Quality(.5, .01, 1.99, .95, .01)
    row = demo.Measured("heun", 39, 1.5, Quality(.52, .02, 2.1, .8, .03))
    lines = demo.table([row], real, .97).splitlines()
    assert re.fullmatch("heun +39 +1.5 +0.520 .- 0.020 +2.10 +0.800 .- 0.030", lines[1])
    assert re.fullmatch("train . held-out +0.500 .- 0.010 +1.99 +0.950 .- 0.010", lines[2])
    assert len({len(line) for line in lines[:3]}) == 1
    assert "probability 0.9 or more" in lines[-2] and "named 0.970 of others right" in lines[-1]
    assert "clear" not in demo.table([row], real)


def test_a_demo_that_is_interrupted_leaves_what_was_learnt(tmp_path, capsys, monkeypatch):
    """After the iteration that runs: a model like any other, of so many iterations."""
    def measure(*a, **kw):
        os.kill(os.getpid(), signal.SIGINT)
        return demo.Measured("", 0, 0., Quality(.5, 0., 1.)),
    monkeypatch.setattr(demo, "measure", measure)
    argv = ["demo", "--data", "moons", "--steps", "32", "--out", str(tmp_path)]
    assert main(argv) == 130
    said = capsys.readouterr().out
    assert "stopped at iteration 3; " in said and "model.safetensors is what was learnt" in said
    _, saved = weights.load_model(tmp_path / "model.safetensors")
    assert saved["steps"] == 3
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == [
        "model.safetensors"]


@pytest.mark.parametrize("steps, expected", [(1, [1]), (3, [1, 3]), (32, [2, 4, 8, 16, 32])])
def test_a_trainings_figure_ends_with_its_end(steps, expected, tmp_path, monkeypatch):
    drawn = []
    few = {name: demo.FAMILIES[name] for name in (demo.TRAJECTORY, demo.QUICK)}
    monkeypatch.setattr(demo, "FAMILIES", few)
    monkeypatch.setattr(demo, "CURVE", ())
    monkeypatch.setattr(demo, "likelihood", lambda *a: None)
    monkeypatch.setattr(plot, "training", lambda file, points, real: (
        file.write_bytes(b""), drawn.extend(points)))
    argv = ["demo", "--data", "moons", "--steps", str(steps), "--out", str(tmp_path)]
    assert main(argv) == 0
    assert (tmp_path / "evaluations.png").exists()
    assert [point.iterations for point in drawn] == expected
    assert all(a.seconds < b.seconds for a, b in zip(drawn, drawn[1:]))
    monkeypatch.setattr(demo, "FEW_PIXELS", 0)  # as of large images, which take long
    assert main([*argv[:-1], str(tmp_path / "large")]) == 0
    assert (tmp_path / "large" / "demo.png").exists()
    assert not (tmp_path / "large" / "evaluations.png").exists()

"""Training: what is learnt, resumed bit for bit, and kept whatever happens."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from minidiff import __version__, data, kernels, noise, train, weights
from minidiff.__main__ import main
from minidiff.chunks import NetScore, samples
from minidiff.net import ScoreNet

ROOT = Path(__file__).parents[2]
POINTS = data.load("mixture").train


def trainer(steps=6, **options):
    return train.Trainer(POINTS, kernels, steps, batch=64, seed=3, **options)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 28, 28), (1, 7, 9), (1, 1, 1)])
def test_network_starts_at_the_score_of_the_prior(shape):
    """F_x = 0 at first, so s = -x / (sigma^2 + sigma_data^2): six roundings, and two of c_in
    squared by half, stay below 8 of 2^-24."""
    net = ScoreNet(shape)
    x, sigma = torch.randn(4, *shape), torch.tensor([.1, 1., 10., 100.])
    v = sigma.view(-1, *[1] * len(shape))**2
    expected = -x.double() / (v.double() + net.sigma_data**2)
    assert ((net(x, sigma) - expected).abs() <= 8 * 2**-24 * expected.abs()).all()


def test_training_lowers_the_loss():
    """On the same draws before and after: the start is the best linear score, already good."""
    def mean_loss(net):
        probe = trainer()
        probe.network = net
        losses = []
        for probe.step in range(1000, 1010):
            losses.append(probe.objective()[1].item())
        return np.mean(losses)
    run = trainer(steps=200)
    before = mean_loss(run.net)
    for _ in range(200):
        run.advance()
    assert mean_loss(run.net) < .9 * before


def test_perturbation_and_its_noise_are_the_same_draw():
    run = trainer()
    x0 = torch.from_numpy(POINTS[:7])
    draw_of = {"seed": run.seed, "step": 5, "tag": noise.PERTURBATION}
    x = kernels.apply("perturb", x0, a=1., sigma=np.full(7, 2.), **draw_of)
    z = kernels.normal(x.shape, device="cpu", **draw_of)
    assert torch.equal(x, x0 + 2. * z)


def test_every_sample_is_seen_once_an_epoch():
    seen = np.concatenate([train.batch_indices(100, 10, 0, k) for k in range(20)])
    assert (np.bincount(seen[:100]) == 1).all() and (np.bincount(seen[100:]) == 1).all()
    assert (seen[:100] != seen[100:]).any()


def test_resumed_training_returns_the_same_bits(tmp_path):
    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(6):
        whole.advance()
    for _ in range(3):
        first.advance()
    weights.save(tmp_path / "s.safetensors", first.state(), {"step": first.step})
    tensors, saved = weights.read(tmp_path / "s.safetensors")
    second.restore(tensors, saved["step"])
    for _ in range(3):
        second.advance()
    a, b = whole.state(), second.state()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_damaged_state_is_refused():
    run = trainer()
    for _ in range(2):
        run.advance()
    good = run.state()
    narrow = {k: v.half() if v.is_floating_point() else v for k, v in good.items()}
    adam = {k: v for k, v in good.items() if k.startswith("adam.")}
    wrong = {"adam.0.exp_avg": torch.zeros(3)}
    for flat, step in ((good, -3), (good, 1.5), (good, None), (good, 7), (good, 0),
                       ({k: v for k, v in good.items() if k not in adam}, 2), (good | wrong, 2),
                       (narrow, 2), (good | {"more": torch.ones(1)}, 2), (good, True)):
        with pytest.raises(ValueError, match="not a state of this network"):
            trainer().restore(flat, step)


def start_training(folder, *more):
    return subprocess.Popen([sys.executable, "-m", "minidiff", "train", "--data", "mixture",
                             "--steps", "100000", "--save-every", "5", "--out", str(folder), *more],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def wait_for(file, process, seconds=120):
    end = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(.05)


def test_sigkill_leaves_two_readable_saves_and_resume_goes_on(tmp_path):
    p = start_training(tmp_path)
    wait_for(tmp_path / "state.previous", p)
    p.kill()
    p.wait()
    (_, last), (_, before) = (weights.read(tmp_path / f"state.{end}")
                              for end in ("safetensors", "previous"))
    assert last["step"] > before["step"] >= 5
    p = start_training(tmp_path, "--resume")
    end = time.monotonic() + 120
    while weights.read(tmp_path / "state.safetensors")[1]["step"] <= last["step"]:
        assert p.poll() is None and time.monotonic() < end
        time.sleep(.05)
    p.send_signal(signal.SIGINT)  # Ctrl-C: finish the iteration, save, exit 130
    assert p.wait(timeout=60) == 130 and "--resume" in p.stdout.read()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_training_before_a_weight_changes(what):
    """A loss may be finite while its gradient is not."""
    run = trainer()
    run.advance()
    plain = run.objective

    def broken():
        fitted, loss, gradient = plain()
        if what == "loss":
            return fitted, loss * float("nan"), gradient
        gradient[3, 0] = float("inf")
        return fitted, loss, gradient
    run.objective = broken
    before = {name: u.clone() for name, u in run.state().items()}
    with pytest.raises(FloatingPointError, match="norm .* at iteration 1: lower --lr"):
        run.advance()
    assert run.step == 1 and all(torch.equal(u, before[k]) for k, u in run.state().items())


def test_a_run_that_diverges_keeps_its_last_save(tmp_path, capsys):
    """At such a rate the second iteration sees weights of 1e37."""
    argv = ["train", "--data", "moons", "--steps", "60", "--save-every", "1", "--lr", "1e38",
            "--out", str(tmp_path)]
    assert main(argv) == 2
    assert "lower --lr" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()
    for file in tmp_path.glob("state.*"):
        weights.read(file)  # finite


def test_the_circumstances_are_kept_and_a_change_is_said(tmp_path, capsys):
    """torch sums in another order where it has another number of threads."""
    argv = ["train", "--data", "moons", "--steps", "4", "--batch", "64", "--out", str(tmp_path)]
    assert main(argv) == 0
    _, saved = weights.read(tmp_path / "state.safetensors")
    threads = torch.get_num_threads()
    assert saved["circumstances"] == {
        "minidiff": __version__, "torch": torch.__version__, "threads": threads,
        "processes": 1, "device": "cpu"}
    _, saved = weights.read(tmp_path / "model.safetensors")
    assert saved["circumstances"]["threads"] == threads
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 0
    assert "written with" not in capsys.readouterr().out
    try:
        torch.set_num_threads(threads + 1)
        assert main([*argv, "--resume"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (f"was written with threads {threads}, now {threads + 1}: the bits may differ"
            in capsys.readouterr().out)


def test_an_iteration_costs_no_more_with_more_data():
    """Of a billion samples no list is made; each epoch keeps a table of the square root."""
    n = 10**9
    chosen = [train.batch_indices(n, 512, 7, k) for k in (0, 1, n // 512 - 1, n // 512)]
    assert len(np.unique(chosen)) > 2040 and np.max(chosen) < n


def test_a_permutation_is_one_and_a_random_one():
    """Every index once, for any n. Over 4,096 seeds an index goes everywhere equally often,
    and so does the way from it to its neighbour's place: chi-square below its quantile of
    1 - 1e-6."""
    for n in (1, 2, 3, 50, 97, 1420, 10_007):
        for step in (0, 1):
            assert (np.sort(data.permuted(np.arange(n), n, 3, step)) == np.arange(n)).all()
    n, seeds = 37, 4096
    places = np.array([data.permuted(np.arange(n), n, seed) for seed in range(seeds)])
    ways = (places[:, 1:] - places[:, :-1]) % n
    for k in (0, 1, 17, 35):
        for found, kinds in ((places[:, k], n), (ways[:, k] - 1, n - 1)):
            counts = np.bincount(found, minlength=kinds)
            chi2 = ((counts - seeds / kinds)**2 / (seeds / kinds)).sum()
            assert chi2 < scipy.stats.chi2.ppf(1 - 1e-6, kinds - 1), (k, chi2)


def test_a_second_interrupt_is_at_once():
    """The first waits for the iteration, even of a run that a shell put into the background."""
    with pytest.raises(KeyboardInterrupt), train.stop_on_interrupt() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped == [True]
        signal.raise_signal(signal.SIGINT)
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.stop_on_interrupt() as stopped:
            signal.raise_signal(signal.SIGINT)
        assert stopped == [True] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("objective", ["denoising", "sliced", "implicit"])
def test_a_users_defaults_change_no_bit_of_training_or_sampling(objective):
    """A default device without memory, a default dtype of more digits."""
    points = data.load("moons")

    def run():
        trainer = train.Trainer(points.train, kernels, 10, batch=64, objective=objective)
        losses = [trainer.advance() for _ in range(3)]
        net = trainer.average.module.eval().requires_grad_(False)
        x, = samples(NetScore(net), points.shape, "ddim", 4, kernels, 6)
        return losses, [torch.from_numpy(x), *trainer.state().values()]
    losses, tensors = run()
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        again, found = run()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert again == losses
    for a, b in zip(found, tensors, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)

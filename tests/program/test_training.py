"""Training: what is learnt, resumed bit for bit, and kept whatever happens."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import data, demo, kernels, noise, train
from minidiff.net import ScoreNet

ROOT = Path(__file__).parents[2]
POINTS = data.load("mixture").train


def trainer(steps=6, **options):
    return train.Trainer(POINTS, kernels, steps, batch=64, seed=3, **options)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 28, 28)])
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
        probe.net = net
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
    train.save(tmp_path / "s.safetensors", first.state(), {"step": first.step})
    tensors, saved = train.read(tmp_path / "s.safetensors")
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
    adam = {k: v for k, v in good.items() if k.startswith("adam.")}
    wrong = {"adam.0.exp_avg": torch.zeros(3)}
    for flat, step in ((good, -3), (good, 1.5), (good, None), (good, 7), (good, 0),
                       ({k: v for k, v in good.items() if k not in adam}, 2), (good | wrong, 2)):
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
    (_, last), (_, before) = (train.read(tmp_path / f"state.{end}")
                              for end in ("safetensors", "previous"))
    assert last["step"] >= before["step"] >= 5
    p = start_training(tmp_path, "--resume")
    end = time.monotonic() + 120
    while train.read(tmp_path / "state.safetensors")[1]["step"] <= last["step"]:
        assert p.poll() is None and time.monotonic() < end
        time.sleep(.05)
    p.send_signal(signal.SIGINT)  # Ctrl-C: finish the iteration, save, exit 130
    assert p.wait(timeout=60) == 130 and "--resume" in p.stdout.read()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    train.save(file, {"x": torch.ones(2)}, {"step": 1})
    old = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="not saved, the old file is untouched .No space left"):
        train.save(file, {"x": torch.zeros(2)}, {"step": 2})
    assert file.read_bytes() == old and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("objective", ["denoising", "sliced", "implicit"])
def test_a_users_defaults_change_no_bit_of_training_or_sampling(objective):
    """A default device without memory, a default dtype of more digits."""
    points = data.load("moons")

    def run():
        trainer = train.Trainer(points.train, kernels, 10, batch=64, objective=objective)
        losses = [trainer.advance() for _ in range(3)]
        net = trainer.average.module.eval().requires_grad_(False)
        *_, x = demo.sample(demo.NetScore(net), points.shape, "ddim", 4, kernels, 6)
        return losses, [x, *trainer.state().values()]
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

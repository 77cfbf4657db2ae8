"""Any number of samples: a chunk after the other, each of one size."""

import resource
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from untrained import IMAGE, network

from minidiff import chunks, data, ddpm, demo, files, kernels, noise
from minidiff.__main__ import main
from minidiff.chunks import NetScore, chunk_size, in_chunks, samples
from minidiff.families import FAMILIES
from minidiff.net import EQUAL_ROWS


def drawn(n, family="ddim", shape=IMAGE, evaluations=3, **options):
    parts = samples(NetScore(network(shape)), shape, family, n, kernels, evaluations,
                    show=False, **options)
    return np.concatenate([*parts])


def same(a, b):
    return a.shape == b.shape and (a.view(np.int32) == b.view(np.int32)).all()


# ---- chunks ----

@pytest.mark.parametrize("n, size", [(1, 4), (4, 4), (5, 4), (12, 4), (3, 1)])
def test_chunks_are_whole_and_what_is_too_much_is_dropped(n, size):
    asked = []

    def chunk(first):
        asked.append(first)
        return np.arange(first, first + size)
    parts = [*in_chunks(chunk, n, size, show=False)]
    assert (np.concatenate(parts) == np.arange(n)).all()
    assert asked == [*range(0, n, size)] and all(0 < len(x) <= size for x in parts)


def test_a_chunk_is_smaller_where_samples_are_large():
    assert [chunk_size((d,)) for d in (2, 1024, 4096, 1 << 21)] == [1024, 1024, 256, 1]
    assert [chunk_size(shape) for shape in (
        IMAGE, (3, 32, 32), (1, 64, 64), (3, 256, 256), (1, 2000, 2000))] == [120, 120, 32, 2, 1]


@pytest.mark.parametrize("family", ["ddim", "reverse_sde_vp", "edm_churn", "pf_ode_adaptive"])
def test_a_sample_is_the_same_however_many_are_drawn(family):
    """Also of a family that the batch couples: it is coupled within a chunk, a whole one."""
    many = drawn(250, family, evaluations=6)
    assert len(np.unique(many.reshape(250, -1), axis=0)) == 250
    for n in (1, 5, 120, 121):
        assert same(drawn(n, family, evaluations=6), many[:n])


@pytest.mark.parametrize("family", ["reverse_sde_vp", "ddpm_ancestral", "edm_churn", "pc_ve"])
def test_chunks_draw_the_noise_of_the_whole(family):
    """Of a score that computes each row alone, whatever the batch."""
    def score(x, sigma):
        return -x / (sigma**2 + .25)
    parts = samples(score, IMAGE, family, 130, kernels, 6, seed=3, show=False)
    z = kernels.normal((130, *IMAGE), device="cpu", seed=3)
    *_, whole = FAMILIES[family](score, z, 6, kernels.Fused(3))
    assert same(np.concatenate([*parts]), whole.numpy())


def test_a_seed_a_sample_goes_over_chunks():
    seeds = [*range(100, 230)]
    many = drawn(130, seed=seeds)
    assert same(drawn(3, seed=[105, 229, 100]), many[[5, 129, 0]])
    assert not same(many, drawn(130))


def test_points_of_several_chunks():
    many = drawn(2500, shape=(2,))
    assert same(drawn(1025, shape=(2,)), many[:1025])
    assert len(np.unique(many, axis=0)) == 2500


def test_one_and_two_threads_give_the_same_bits():
    """Measured of the torch that is installed; nothing promises it."""
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            large = network((1, 28, 28))(torch.ones(120, 1, 28, 28), torch.ones(1)).numpy()
            found.append([drawn(120), drawn(1024, shape=(2,)), large])
        assert all(map(same, *found))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(2,), (37,), IMAGE, (3, 12, 11), (1, 28, 28)])
def test_one_noise_levels_conditioning_is_any_batchs(shape):
    """Computed on 8 equal rows, from 4 rows on it has the bits of a row for each sample."""
    net = network(shape)
    for rows in (4, 5, EQUAL_ROWS, 9, 64, 128):
        x = torch.randn(rows, *shape)
        for sigma in (.01, .3, 2., 80.):
            level = torch.tensor([sigma])
            assert torch.equal(net(x, level), net(x, level.repeat(rows)))
    assert torch.equal(net(x[:1], level)[0], net(x[:1], level.view(1))[0])


def test_as_many_levels_as_samples_or_one():
    with pytest.raises(ValueError, match="sigma has 3 rows: one, or one for each of the 5"):
        network()(torch.randn(5, *IMAGE), torch.ones(3))


def test_a_networks_own_level_for_each_of_eight_rows():
    """Where there are as many levels as equal rows, none is taken for the others'."""
    net, x = network(), torch.randn(8, *IMAGE)
    sigma = torch.linspace(.1, 2, 8)
    each = [net(x, sigma[k:k + 1])[k] for k in range(8)]
    assert torch.equal(net(x, sigma), torch.stack(each))


def test_the_states_that_are_kept_are_the_first_samples():
    kept = []
    parts = samples(NetScore(network()), IMAGE, "ddim", 130, kernels, 5, show=False, kept=kept)
    x = np.concatenate([*parts])
    assert len(kept) == 5 and same(kept[-1], x[0])


def test_evaluations_are_a_chunks():
    score = NetScore(network())
    [*samples(score, IMAGE, "ddim", 130, kernels, 5, show=False)]
    assert score.evaluations == 10 and chunks.evaluations_of(score, IMAGE, 130) == 5


@pytest.mark.parametrize("of_samples", [demo.likelihood, demo.bound])
def test_a_held_out_samples_likelihood_is_its_own_chunks(of_samples, monkeypatch):
    """However many are measured; what fills the last chunk is not counted."""
    found = []

    def bits(log_p, *_):
        found.append(log_p)
        return log_p
    monkeypatch.setattr(demo, "bits_per_dim", bits)
    monkeypatch.setattr(chunks, "POINTS", 4)
    betas = ddpm.linear_betas(20)
    monkeypatch.setattr(ddpm, "linear_betas", lambda: betas)
    moons = data.load("moons")
    for n in (2, 5, 9):
        of_samples(network((2,)), moons, n)
    two, five, nine = found
    assert (len(two), len(five), len(nine)) == (2, 5, 9)
    assert (two == nine[:2]).all() and (five == nine[:5]).all()
    few, again = (replace(moons, held=held) for held in (
        moons.held[:6], moons.held[[*range(6), 0, 1]]))
    for of in few, again:
        of_samples(network((2,)), of, 6)
    assert (found[-2] == found[-1]).all()


def test_a_likelihoods_noise_is_that_of_the_whole(monkeypatch):
    """Of all that is held out, what was added to grey levels, and the probes."""
    drawn = {"dequantized": [], "rademacher": []}

    def recorded(name, plain):
        def draw(*given):
            drawn[name].append(plain(*given))
            return drawn[name][-1]
        return draw
    monkeypatch.setattr(demo, "dequantized", recorded("dequantized", data.dequantized))
    monkeypatch.setattr(noise, "rademacher", recorded("rademacher", noise.rademacher))
    monkeypatch.setattr(chunks, "IMAGES", 4)
    digits = data.load("digits")
    demo.likelihood(network(), digits, 10, seed=5)
    monkeypatch.undo()
    found = {name: np.concatenate(parts)[:10] for name, parts in drawn.items()}
    assert same(found["dequantized"], data.dequantized(digits.held[:10], digits.levels, 5))
    assert same(found["rademacher"], noise.rademacher((10, 64), 5))


def test_a_bounds_noise_is_that_of_the_whole(monkeypatch):
    """A sample's draws follow from its own id: chunks of 4 and of 12 give one bound, but for
    rounding of the network in another batch, some 1e-6 of a term."""
    betas = ddpm.linear_betas(20)
    monkeypatch.setattr(ddpm, "linear_betas", lambda: betas)
    moons, found = data.load("moons"), []
    for size in (4, 12):
        monkeypatch.setattr(chunks, "POINTS", size)
        found.append(demo.bound(network((2,)), moons, 12, seed=5)[:2])
    np.testing.assert_allclose(*found, rtol=1e-4)


# ---- the file ----

def test_a_file_in_parts_is_numpys(tmp_path):
    x = np.arange(300, dtype=np.float32).reshape(100, 3)
    np.savez(tmp_path / "whole.npz", x=x)
    files.write_samples(tmp_path / "parts.npz", 100, np.split(x, [64, 90]))
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_parts_are_written_as_they_come(tmp_path):
    """None is kept: memory is that of one part."""
    alive = []

    def parts():
        for k in range(20):
            assert sum(ref() is not None for ref in alive) <= 1
            x = np.full((50, 2), k)
            alive.append(weakref.ref(x))
            yield x
            del x
    files.write_samples(tmp_path / "x.npz", 1000, parts())
    assert (np.load(tmp_path / "x.npz")["x"][::50, 0] == np.arange(20)).all()


def test_what_ends_a_sampler_leaves_the_file_of_before(tmp_path):
    out = tmp_path / "x.npz"
    out.write_bytes(b"before")

    def parts():
        yield np.zeros((50, 2))
        raise FloatingPointError("samples are not finite")
    with pytest.raises(FloatingPointError):
        files.write_samples(out, 100, parts())
    assert out.read_bytes() == b"before" and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("limit", [1000, 1 << 20])
def test_a_disk_that_is_full_is_one_line(limit, tmp_path):
    """While parts are written, and while the file is."""
    out = tmp_path / "x.npz"
    out.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="x.npz: not written, what was there before is unt"):
            files.write_samples(out, 1 << 16, [np.zeros((1 << 16, 2))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"before" and [*tmp_path.iterdir()] == [out]


def test_what_has_no_room_is_refused_at_its_first_part(tmp_path):
    left = []

    def parts():
        yield np.zeros((1, 1 << 10))
        left.append(1)
    with pytest.raises(ValueError, match=r"x\.npz: \d+ MiB are needed there, \d+ are free"):
        files.write_samples(tmp_path / "x.npz", 1 << 50, parts())
    assert not left and not [*tmp_path.iterdir()]


def test_the_command_writes_chunks_and_says_the_rate(model, tmp_path, capsys, refused):
    argv = ["sample", "--model", model, "--evaluations", "3", "--out"]
    for n, units in ((3, "model"), (130, "model"), (130, "data")):
        assert main([*argv, str(tmp_path / f"{n}{units}.npz"), "--samples", str(n),
                     "--units", units]) == 0
    said = capsys.readouterr()
    assert "3 samples of digits, ddim, 3 evaluations, " in said.out
    assert " samples a second, torch " in said.out and "130/130" in said.err
    few, many, grey = (np.load(tmp_path / name)["x"]
                       for name in ("3model.npz", "130model.npz", "130data.npz"))
    assert same(few, many[:3]) and grey.dtype == np.uint8
    assert (grey == np.round((many + 1) * 8)).all()
    refused("--n 4294967297: a seed has 2^32 samples",
            argv=[*argv, str(tmp_path / "x.npz"), "--n", str(2**32 + 1)])

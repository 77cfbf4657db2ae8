"""The network follows the image: its resolutions, its padding, what mixes far places."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from untrained import network

from minidiff import data
from minidiff.__main__ import main
from minidiff.net import PLACES, REACH, ConvBlock, SelfAttention, channels_at

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 7, 9), (3, 27, 33), (1, 1, 1), (2, 2, 70),
          (1, 128, 96)]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_is_halved_until_its_places_can_all_ask_each_other(shape):
    _, H, W = shape
    channels = channels_at(H, W)
    halvings = len(channels) - 1
    assert halvings >= 1 and H * W / 4**halvings <= PLACES
    assert halvings == 1 or H * W / 4**(halvings - 1) > PLACES
    assert all(b in (2 * a, 192) for a, b in zip(channels, channels[1:]))
    net = network(shape).F_x
    seen = []
    net.mix.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1:]))
    net(torch.zeros(2, *shape), torch.zeros(2))
    (low, *places), = seen
    assert low == channels[-1] and places == [-(-side // 2**halvings) for side in (H, W)]
    assert isinstance(net.mix, SelfAttention) == (max(places) > REACH)


def test_two_blocks_reach_five_places_in_a_row():
    """So four by four of them need no attention, and seven by seven do."""
    blocks = [ConvBlock(8, 4), ConvBlock(8, 4)]
    for block in blocks:
        block.norm1 = block.norm2 = torch.nn.Identity()  # which mix places too
    x, e = torch.randn(1, 8, 1, 9, requires_grad=True), torch.randn(1, 4)
    h = blocks[1](blocks[0](x, e), e)
    gradient, = torch.autograd.grad(h[..., 0].sum(), x)
    seen = gradient.abs().sum((0, 1, 2)) > 0
    assert seen.tolist() == [True] * REACH + [False] * (9 - REACH)
    assert isinstance(network((1, 8, 8)).F_x.mix, torch.nn.Identity)
    assert isinstance(network((1, 28, 28)).F_x.mix, SelfAttention)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_of_any_sides_has_a_score_and_a_gradient(shape):
    net = network(shape).requires_grad_(True)
    x = torch.randn(3, *shape, requires_grad=True)
    s = net(x, torch.tensor([.1, 1., 10.]))
    assert s.shape == x.shape and s.isfinite().all()
    s.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert (x.grad != 0).all()


def test_every_resolution_is_added_on_the_way_up():
    """With nothing from below, what the way down kept is what the way up is given; attention
    stands between the two lowest blocks."""
    net, order = network((1, 28, 28)).F_x, []
    kept, given = [], []
    for up in net.up:
        torch.nn.init.zeros_(up.weight)
        torch.nn.init.zeros_(up.bias)
    for block in net.enter:
        block.register_forward_hook(lambda _, __, out: kept.append(out))
    for block in net.leave:
        block.register_forward_hook(lambda _, args, __: given.append(args[0]))
    for name in ("low1", "mix", "low2"):
        getattr(net, name).register_forward_hook(lambda *_, name=name: order.append(name))
    net(torch.randn(2, 1, 28, 28), torch.zeros(2))
    assert order == ["low1", "mix", "low2"] and len(kept) == len(given) == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, reversed(given)))


def test_an_odd_image_is_one_with_a_frame_of_zeros():
    """Its network's weights fit the padded image's; there they return the same, and more."""
    odd, padded = network((1, 7, 9)).F_x, network((1, 8, 10)).F_x
    padded.load_state_dict(odd.state_dict())
    x, level = torch.randn(5, 1, 7, 9), torch.randn(5)
    whole = padded(F.pad(x, (0, 1, 0, 1)), level)
    assert torch.equal(odd(x, level), whole[..., :7, :9])


def test_attention_is_a_mean_over_all_places_by_likeness():
    """Place by place in float64. A sum of 6 or 32 products in float32 has a relative error of
    some 2^-19; logits are of size 1, values too."""
    torch.manual_seed(0)
    attend = SelfAttention(32)
    h = torch.randn(2, 32, 2, 3)
    u = attend.norm(h).flatten(2).double()  # (2, 32, 6)
    W, b = attend.qkv.weight[:, :, 0, 0].double(), attend.qkv.bias.double()
    q, k, v = ((W @ u) + b[:, None]).reshape(2, 3, 4, 8, 6).unbind(1)
    mixed = torch.zeros_like(q)
    for to in range(6):
        logits = (q[..., to, None] * k).sum(2) / 8**.5  # (2, 4, 6)
        likeness = logits.exp() / logits.exp().sum(-1, keepdim=True)
        mixed[..., to] = (v * likeness[:, :, None]).sum(-1)
    W, b = attend.out.weight[:, :, 0, 0].double(), attend.out.bias.double()
    expected = h.double() + ((W @ mixed.reshape(2, 32, 6)) + b[:, None]).reshape(2, 32, 2, 3)
    torch.testing.assert_close(attend(h).double(), expected, rtol=0, atol=2**-18)


def test_attention_reaches_the_farthest_place():
    attend = SelfAttention(32)
    attend.norm = torch.nn.Identity()  # which mixes places too
    h = torch.randn(1, 32, 7, 7, requires_grad=True)
    gradient, = torch.autograd.grad(attend(h)[0, :, 0, 0].sum(), h)
    assert (gradient != 0).all()


@pytest.mark.parametrize("sides", [(7, 7), (5, 9)])
def test_odd_images_are_trained_on_and_sampled(sides, tmp_path):
    rng = np.random.default_rng(0)
    file, out = tmp_path / "odd.npz", tmp_path / "x.npz"
    np.savez(file, x=rng.integers(0, 256, (300, *sides, 3)).astype(np.uint8))
    assert data.load(file).shape == (3, *sides)
    argv = ["train", "--data", str(file), "--steps", "2", "--batch", "8", "--out", str(tmp_path)]
    assert main(argv) == 0
    argv = ["sample", "--model", str(tmp_path / "model.safetensors"), "--n", "3",
            "--evaluations", "2", "--out", str(out)]
    assert main(argv) == 0 and np.load(out)["x"].shape == (3, 3, *sides)

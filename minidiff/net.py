"""A lean noise-conditional score network: one constructor for images and for vectors."""

import math
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from .predictions import c_in, inverse, preconditioned


@contextmanager
def usual_defaults():
    """Inside this context, torch makes float32 tensors on the CPU unless told otherwise.

    A user's defaults are for the user's own tensors. They change no bit of a network.
    """
    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    on_cpu = nullcontext() if device.type == "cpu" else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with on_cpu:
            yield
    finally:
        torch.set_default_dtype(dtype)


EQUAL_ROWS = 8  # for one noise level: a product of 1 to 3 rows has other bits than of more


def per_sample(u, x):
    """A row of u for each sample of x: its own, or the first of one noise level's."""
    return u if len(u) == len(x) else u[:1]


class NoiseFeatures(nn.Module):
    """The conditioning vector e: cosines and sines of c_noise, then two small layers."""

    def __init__(self, width, n_freq=16):
        super().__init__()
        cycles = torch.logspace(-1, 1, n_freq, base=4.0)
        self.register_buffer("freq", math.pi * cycles)
        self.fc1 = nn.Linear(2 * n_freq, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, c_noise):
        """c_noise: (rows,). Returns e: (rows, width)."""
        phase = c_noise[:, None] * self.freq
        e = torch.cat([phase.cos(), phase.sin()], dim=1)
        e = F.silu(self.fc1(e))
        return F.silu(self.fc2(e))


class DenseBlock(nn.Module):
    """h + W2 silu((1 + scale(e)) W1 norm(h) + shift(e))."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cond = nn.Linear(width, 2 * width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, h, e):
        """h: (B, width), e: (rows, width) as in `per_sample`. Returns the next h."""
        scale, shift = per_sample(self.cond(e), h).chunk(2, dim=1)
        r = self.fc1(self.norm(h))
        return h + self.fc2(F.silu((1 + scale) * r + shift))


class VectorNet(nn.Module):
    """F_x on vectors: a residual multilayer perceptron."""

    def __init__(self, shape, width=128, depth=3):
        super().__init__()
        self.embed = NoiseFeatures(width)
        self.inp = nn.Linear(shape[0], width)
        self.blocks = nn.ModuleList(DenseBlock(width) for _ in range(depth))
        self.out = nn.Linear(width, shape[0])

    def forward(self, x, c_noise):
        """x: (B, D), c_noise: (rows,). Returns F_x: (B, D)."""
        e = self.embed(c_noise)
        h = self.inp(x)
        for block in self.blocks:
            h = block(h, e)
        return self.out(F.silu(h))


class ConvBlock(nn.Module):
    """h + conv(silu((1 + scale(e)) norm(conv(silu(norm(h)))) + shift(e)))."""

    def __init__(self, width, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.cond = nn.Linear(emb, 2 * width)

    def forward(self, h, e):
        """h: (B, width, H, W), e: (rows, emb) as in `per_sample`. Returns the next h."""
        scale, shift = per_sample(self.cond(e), h)[..., None, None].chunk(2, dim=1)
        r = self.conv1(F.silu(self.norm1(h)))
        r = self.norm2(r)
        return h + self.conv2(F.silu((1 + scale) * r + shift))


class ImageNet(nn.Module):
    """F_x on images: a U of two resolutions, H x W and half that with twice the channels.

    A learned map, added after the first convolution, tells every pixel where it is.
    """

    def __init__(self, shape, width=48):
        super().__init__()
        channels = shape[0]
        low = 2 * width  # channels at the lower resolution
        self.embed = NoiseFeatures(low)
        self.inp = nn.Conv2d(channels, width, 3, padding=1)
        self.place = nn.Parameter(0.1 * torch.randn(1, width, *shape[1:]))
        self.enter = ConvBlock(width, low)
        self.leave = ConvBlock(width, low)
        self.down = nn.Conv2d(width, low, 2, stride=2)
        self.low1 = ConvBlock(low, low)
        self.low2 = ConvBlock(low, low)
        self.up = nn.ConvTranspose2d(low, width, 2, stride=2)
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, c_noise):
        """x: (B, channels, H, W), c_noise: (rows,). Returns F_x, shaped like x."""
        e = self.embed(c_noise)
        top = self.enter(self.inp(x) + self.place, e)
        h = self.low1(self.down(top), e)
        h = self.low2(h, e)
        h = self.leave(top + self.up(h), e)
        return self.out(F.silu(self.norm(h)))


class ScoreNet(nn.Module):
    """The score s(x, sigma) of data blurred by N(0, sigma^2), by EDM's preconditioning.

    The inner network F_x(c_in x; c_noise) with c_noise = ln(sigma) / 4 has an input and a
    target of unit variance. It returns `predictions.preconditioned`, whose inverse gives
    the score. [EDM eq. 7 and table 1]

    shape is one sample's: (D,) for vectors; (channels, H, W), H and W even, for images.
    """

    def __init__(self, shape, sigma_data=.5, **options):
        super().__init__()
        self.sigma_data = sigma_data
        network = VectorNet if len(shape) == 1 else ImageNet
        self.F_x = network(shape, **options)
        nn.init.zeros_(self.F_x.out.weight)
        nn.init.zeros_(self.F_x.out.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, sigma):
        """The score of x, shaped like it.

        x: (B, *shape); sigma: (B,), or (1,) for all, else ValueError. What follows from one
        sigma alone is computed on EQUAL_ROWS rows: its bits are those of any batch, and its
        cost is small.
        """
        if len(sigma) == 1:
            sigma = sigma.expand(EQUAL_ROWS)
        elif len(sigma) != len(x):
            raise ValueError(f"sigma has {len(sigma)} levels: one, or one for each of the "
                             f"{len(x)} samples")
        column = per_sample(sigma, x).reshape(-1, *[1] * (x.dim() - 1))
        F_x = self.F_x(c_in(column, self.sigma_data) * x, sigma.log() / 4)
        score = inverse(preconditioned)
        return score(x, F_x, a=1., sigma=column, sigma_data=self.sigma_data)

"""Noise for k-diffusion and diffusers: a row's follows from its own seed, on any device,
alone and in any batch."""

from ..noise import PREDICTOR, integers
from .updates import normal


def one_each(seeds):
    """The seeds, (B,), a copy. TypeError for one number, whose rows would be its ids."""
    found = integers("seeds", seeds)
    if isinstance(found, int):
        raise TypeError(f"seeds must be a list, a seed a sample, got {seeds}")
    return found


class NoiseSampler:
    """noise_sampler(sigma, sigma_next) of k-diffusion's samplers, from a seed a sample.

    x: what the sampler starts from, a tensor (B, ...); seeds: B whole numbers. A row draws
    what `Fused(seed=seeds)` would at step `calls`, the number of calls so far: independent
    draws, as `default_noise_sampler`'s are, not pieces of a Brownian path. One object
    serves one run: ValueError where sigma rises between calls.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 3)
        >>> draw, alone = NoiseSampler(x, [7, 5]), NoiseSampler(x[1:], [5])
        >>> print((draw(2., 1.)[1:] == alone(2., 1.)).all().item())
        True
    """

    def __init__(self, x, seeds):
        self.shape = tuple(x.shape)
        self.device = x.device
        self.dtype = x.dtype
        self.seeds = one_each(seeds)
        self.calls = 0
        self.sigma = float("inf")

    def __call__(self, sigma, sigma_next):
        """z ~ N(0, I) like x, another one each time."""
        if not sigma <= self.sigma:
            raise ValueError(f"sigma rises to {float(sigma)}: "
                             "each run takes its own object")
        z = normal(self.shape, device=self.device, seed=self.seeds, step=self.calls,
                   tag=PREDICTOR)
        self.sigma = sigma
        self.calls += 1
        return z.to(self.dtype)


def latents(pipe, shape, seeds):
    """A diffusers pipeline's `latents`, (len(seeds), *shape): `normal`'s, in its dtype.

    shape: one sample's. They are on the CPU unless the pipeline is on a CUDA GPU; it moves
    and scales them itself.
    """
    seeds = one_each(seeds)
    device = pipe.device if pipe.device.type == "cuda" else "cpu"
    return normal((len(seeds), *shape), device=device, seed=seeds).to(pipe.dtype)

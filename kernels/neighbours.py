"""Noise for samplers that are not ours: the same for a seed, alone or in any batch.

k-diffusion and diffusers draw a batch's noise from one generator, on a CPU and on a GPU
from different ones. So a sample cannot be made again by itself, or elsewhere. Here a row's
noise follows from its own seed, on every device.
"""

from ..noise import PREDICTOR
from .updates import normal


class NoiseSampler:
    """noise_sampler(sigma, sigma_next) of k-diffusion's samplers, from a seed a sample.

    x: what the sampler starts from, a tensor (B, ...) on a CPU or a GPU; seeds: B whole
    numbers. A row draws what `Fused(seed=seeds)` would at step `calls`, the number of calls
    so far. So draws are independent, as `default_noise_sampler`'s are, not pieces of a
    Brownian path. One object serves one run: ValueError where sigma rises again.

    Example:
        >>> import torch
        >>> draw = NoiseSampler(torch.zeros(2, 3), seeds=[7, 5])
        >>> alone = NoiseSampler(torch.zeros(1, 3), seeds=[5])
        >>> print((draw(2., 1.)[1:] == alone(2., 1.)).all().item())
        True
    """

    def __init__(self, x, seeds):
        self.shape = tuple(x.shape)
        self.device = x.device
        self.dtype = x.dtype
        self.seeds = seeds
        self.calls = 0
        self.sigma = float("inf")

    def __call__(self, sigma, sigma_next):
        """z ~ N(0, I) like x, another one each time."""
        if not sigma <= self.sigma:
            raise ValueError(f"sigma rises from {float(self.sigma):g} to {float(sigma):g}: "
                             "another run takes a NoiseSampler of its own")
        z = normal(self.shape, device=self.device, seed=self.seeds, step=self.calls,
                   tag=PREDICTOR)
        self.sigma = sigma
        self.calls += 1
        return z.to(self.dtype)


def latents(pipe, shape, seeds):
    """What a pipeline of diffusers takes as its `latents`, (len(seeds), *shape).

    shape: one sample's, as the pipeline's model takes it. The numbers are `normal`'s of
    those seeds, rounded to the pipeline's dtype: equal on a CPU and a GPU. A pipeline that
    is elsewhere, or offloaded, moves them itself; each scales them as its scheduler asks.
    """
    device = pipe.device if pipe.device.type == "cuda" else "cpu"
    z = normal((len(seeds), *shape), device=device, seed=seeds)
    return z.to(pipe.dtype)

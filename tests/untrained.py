"""A network that nobody trained, and a file of it."""

import pytest
import torch

from minidiff import weights
from minidiff.net import ScoreNet

IMAGE = 1, 8, 8


def network(shape=IMAGE):
    """Its F_x is not 0, as it is before training."""
    torch.manual_seed(0)
    net = ScoreNet(shape).eval().requires_grad_(False)
    torch.nn.init.normal_(net.F_x.out.weight, std=.02)
    return net


@pytest.fixture
def model(tmp_path):
    """The path of a model of images of 8 by 8 with 17 grey levels."""
    file = tmp_path / "model.safetensors"
    weights.save(file, network().state_dict(), {
        "shape": list(IMAGE), "data": "digits", "levels": 17, "ends": [0., 16.], "seed": 0})
    return str(file)

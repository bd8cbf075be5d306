"""Autoencoders of diffusers with random weights, and comparison with them."""

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

# Two and three stages, narrow enough to compile in a second.
SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and the parameters of norms random too: those that start at 0 or 1 hide what is not applied."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def make_kl(seed: int = 0, **changes) -> AutoencoderKL:
    """diffusers' KL autoencoder, small unless changed."""
    torch.manual_seed(seed)
    config = {**SMALL, **changes}
    stages = len(config["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages}
    return randomised(AutoencoderKL(**config, **types))


def make_tiny(**changes) -> AutoencoderTiny:
    """diffusers' TAESD of width 8."""
    torch.manual_seed(0)
    config = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, **changes}
    return randomised(AutoencoderTiny(**config))


def normal(*shape: int) -> np.ndarray:
    """float32 values."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def image(size: int, channels: int = 3) -> np.ndarray:
    """Two images in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (2, size, size, channels)).astype(np.float32)


def in_torch(function, x_BHWC: np.ndarray) -> np.ndarray:
    """What a function of NCHW tensors makes of an NHWC array."""
    with torch.no_grad():
        return function(torch.from_numpy(np.array(x_BHWC.transpose(0, 3, 1, 2)))).numpy().transpose(0, 2, 3, 1)

"""What the devices decide about the network: where values lie, and which kernel computes attention."""

import jax
from jax.sharding import Mesh

from sddit_jax.errors import ConfigError
from sddit_jax.models.attention import cudnn_attention, product_attention
from sddit_jax.models.layers import Hooks
from sddit_jax.models.transformer import ModelConfig
from sddit_jax.parallel.sharding import make_constrain

KERNELS = {"products": product_attention, "cudnn": cudnn_attention}


def make_hooks(mesh: Mesh, model: ModelConfig, *, whole: bool = False) -> Hooks:
    """The hooks of a network that is computed on a mesh. Raises ConfigError for a kernel that the devices lack.

    whole: all parameters lie on every device, as for sampling, so that nothing has to be gathered.
    """
    kernel = KERNELS[attention_kernel(model, mesh.devices.flat[0])]
    return Hooks(attend=kernel) if whole else Hooks(make_constrain(mesh), kernel)


def attention_kernel(model: ModelConfig, device: jax.Device) -> str:
    """What `model.attention` means on a device: 'products' or 'cudnn'.

    'auto' is cudnn where it can be: on NVIDIA's GPUs since Ampere, in bfloat16, for heads of multiples of 8 channels up
    to 128. Raises ConfigError where cudnn is asked for and cannot be.
    """
    if model.attention == "products":
        return "products"
    stacks = [(model.width, model.heads)] + [(model.decoder_width, model.decoder_heads)] * (model.decoder_depth > 0)
    channels = [width // heads for width, heads in stacks]
    lacks = ""
    if not has_cudnn_attention(device):
        lacks = f"{device.device_kind} has no such kernel: an NVIDIA GPU since Ampere has"
    elif model.dtype != "bfloat16":
        lacks = f"model.dtype is {model.dtype}: it computes in bfloat16"
    elif any(c % 8 or c > 128 for c in channels):
        lacks = f"heads have {' and '.join(map(str, channels))} channels: it takes multiples of 8 up to 128"
    if model.attention == "cudnn" and lacks:
        raise ConfigError(f"model.attention is 'cudnn', but {lacks}; set model.attention=products")
    return "products" if lacks else "cudnn"


def has_cudnn_attention(device: jax.Device) -> bool:
    """Whether a device is a GPU that cuDNN has a fused attention for, NVIDIA's since Ampere."""
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return cuda and float(device.compute_capability) >= 8

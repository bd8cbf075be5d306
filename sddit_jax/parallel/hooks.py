"""What the devices decide about the network: where values lie, and which kernel computes attention."""

import jax
from jax.sharding import Mesh

from sddit_jax.errors import ConfigError
from sddit_jax.models.attention import cudnn_attention, product_attention
from sddit_jax.models.layers import Hooks
from sddit_jax.models.transformer import ModelConfig
from sddit_jax.parallel.sharding import make_constrain


def make_hooks(mesh: Mesh, model: ModelConfig, *, whole: bool = False, trained: bool = False) -> Hooks:
    """The hooks of a network that is computed on a mesh. Raises ConfigError for a kernel that the devices lack.

    whole: all parameters lie on every device, as for sampling, so that nothing has to be gathered. trained: see
    `attention_kernel`.
    """
    kernel = attention_kernel(model, mesh.devices.flat[0], trained=trained)
    attend = {"products": product_attention, "cudnn": _cudnn_where_it_fits}[kernel]
    return Hooks(attend=attend) if whole else Hooks(make_constrain(mesh), attend)


def attention_kernel(model: ModelConfig, device: jax.Device, *, trained: bool = False) -> str:
    """What `model.attention` means on a device: 'products' or 'cudnn'.

    'auto' is cudnn where it can be: on NVIDIA's GPUs since Ampere, in bfloat16, in a stack whose heads have a multiple
    of 8 channels up to 128. Raises ConfigError where cudnn is asked for and cannot be, unless the network is `trained`:
    then it may be used on any device.
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
    elif not any(map(_fits, channels)):
        lacks = f"heads have {' and '.join(map(str, channels))} channels: it takes multiples of 8 up to 128"
    if model.attention == "cudnn" and lacks and not trained:
        raise ConfigError(f"model.attention is 'cudnn', but {lacks}; set model.attention=products")
    return "products" if lacks else "cudnn"


def _fits(channels: int) -> bool:
    """Whether cuDNN's kernel takes heads of so many channels."""
    return channels % 8 == 0 and channels <= 128


def _cudnn_where_it_fits(q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array) -> jax.Array:
    """Attention by cuDNN's kernel, or by products in a stack whose heads it does not take."""
    return (cudnn_attention if _fits(q_BHNC.shape[-1]) else product_attention)(q_BHNC, k_BHNC, v_BHNC)


def has_cudnn_attention(device: jax.Device) -> bool:
    """Whether a device is a GPU that cuDNN has a fused attention for, NVIDIA's since Ampere."""
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return cuda and float(device.compute_capability) >= 8

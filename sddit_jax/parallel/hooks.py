"""The hooks of a network on given devices: the sharding of its values, and the kernel that computes attention."""

import jax
from jax.sharding import Mesh

from sddit_jax.errors import ConfigError
from sddit_jax.models.attention import cudnn_attention, product_attention
from sddit_jax.models.layers import Hooks
from sddit_jax.models.transformer import ModelConfig
from sddit_jax.parallel.sharding import make_constrain


def make_hooks(mesh: Mesh, model: ModelConfig, *, whole: bool = False, trained: bool = False) -> Hooks:
    """The hooks of a network that runs on a mesh.

    whole: every device holds all parameters, as for sampling, so that the network gathers nothing. trained: as for
    `attention_kernel`, which raises the ConfigErrors.
    """
    kernel = attention_kernel(model, mesh.devices.flat[0], trained=trained)
    attend = {"products": product_attention, "cudnn": _cudnn_where_it_fits}[kernel]
    return Hooks(attend=attend) if whole else Hooks(make_constrain(mesh), attend)


def attention_kernel(model: ModelConfig, device: jax.Device, *, trained: bool = False) -> str:
    """The kernel that `model.attention` stands for on a device: "products" or "cudnn".

    "auto" is cudnn on NVIDIA GPUs since Ampere, if the network computes in bfloat16 and the heads of the encoder or of
    the decoder have a multiple of 8 channels, at most 128. Raises ConfigError for "cudnn" where this does not hold,
    unless `trained`: a trained network may run on any device, and then products replace the kernel.
    """
    if model.attention == "products":
        return "products"
    stacks = [(model.width, model.heads)] + [(model.decoder_width, model.decoder_heads)] * (model.decoder_depth > 0)
    channels = [width // heads for width, heads in stacks]
    lacks = ""
    if not has_cudnn_attention(device):
        lacks = f"{device.device_kind} has no such kernel: NVIDIA GPUs since Ampere have it"
    elif model.dtype != "bfloat16":
        lacks = f"model.dtype is {model.dtype}, and the kernel computes in bfloat16"
    elif not any(map(_fits, channels)):
        lacks = f"heads have {' and '.join(map(str, channels))} channels, and the kernel takes multiples of 8 up to 128"
    if model.attention == "cudnn" and lacks and not trained:
        raise ConfigError(f"model.attention is 'cudnn', but {lacks}; set model.attention=products")
    return "products" if lacks else "cudnn"


def _fits(channels: int) -> bool:
    return channels % 8 == 0 and channels <= 128


def _cudnn_where_it_fits(q_BHNC: jax.Array, k_BHNC: jax.Array, v_BHNC: jax.Array) -> jax.Array:
    """Attention by cuDNN's kernel, or by products in a stack whose heads the kernel does not take."""
    return (cudnn_attention if _fits(q_BHNC.shape[-1]) else product_attention)(q_BHNC, k_BHNC, v_BHNC)


def has_cudnn_attention(device: jax.Device) -> bool:
    """Whether cuDNN has fused attention for a device: NVIDIA GPUs since Ampere, compute capability 8."""
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return cuda and float(device.compute_capability) >= 8

"""Which kernel of attention a device gets."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sddit_jax.config.schema import ParallelConfig
from sddit_jax.errors import ConfigError
from sddit_jax.models.attention import product_attention
from sddit_jax.models.layers import unconstrained
from sddit_jax.models.transformer import ModelConfig
from sddit_jax.parallel import hooks
from sddit_jax.parallel.hooks import attention_kernel, has_cudnn_attention, make_hooks
from sddit_jax.parallel.sharding import make_mesh

HOPPER = SimpleNamespace(
    platform="gpu", client=SimpleNamespace(platform_version="cuda 13000"), compute_capability="9.0", device_kind="H100"
)


@pytest.mark.parametrize(
    ("platform", "version", "capability", "has"),
    [
        ("gpu", "cuda 13000", "9.0", True),
        ("gpu", "cuda 12080", "12.0", True),
        ("gpu", "cuda 12080", "7.5", False),
        ("gpu", "rocm 60300", "gfx90a", False),
        ("tpu", "TFRT TPU v5e", None, False),
    ],
)
def test_where_cudnn_has_the_kernel(platform, version, capability, has):
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(platform=platform, client=client, compute_capability=capability)
    assert has_cudnn_attention(device) is has


@pytest.mark.parametrize(
    ("dtype", "width", "decoder_depth", "kernel"),
    [
        ("bfloat16", 72 * 16, 8, "cudnn"),
        ("float32", 72 * 16, 8, "products"),
        ("bfloat16", 36 * 16, 8, "cudnn"),  # of the decoder alone, whose heads have 32 channels
        ("bfloat16", 36 * 16, 0, "products"),
        ("bfloat16", 256 * 16, 0, "products"),
        ("bfloat16", 72 * 16, 0, "cudnn"),
    ],
)
def test_auto_is_the_kernel_where_heads_fit_it(dtype, width, decoder_depth, kernel):
    model = ModelConfig(dtype=dtype, width=width, decoder_depth=decoder_depth)
    assert attention_kernel(model, HOPPER) == kernel
    assert attention_kernel(dataclasses.replace(model, attention="products"), HOPPER) == "products"
    if kernel == "products":
        with pytest.raises(ConfigError, match=r"model.attention is 'cudnn', but (model.dtype is float32|heads have)"):
            attention_kernel(dataclasses.replace(model, attention="cudnn"), HOPPER)


def test_a_cpu_computes_products_and_has_no_other_kernel():
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    made = make_hooks(mesh, ModelConfig(dtype="bfloat16"))
    assert made.attend is product_attention
    assert made.constrain is unconstrained
    with pytest.raises(ConfigError, match=r"'cudnn', but cpu has no such kernel.*set model.attention=products"):
        make_hooks(mesh, ModelConfig(attention="cudnn"))
    assert make_hooks(mesh, ModelConfig(attention="cudnn"), trained=True).attend is product_attention


@pytest.mark.parametrize(("channels", "kernel"), [(72, "cudnn"), (36, "products"), (256, "products")])
def test_each_stack_is_computed_by_the_kernel_that_takes_its_heads(channels, kernel, monkeypatch):
    called = []
    for name in ("cudnn", "product"):
        monkeypatch.setattr(hooks, f"{name}_attention", lambda q, k, v, name=name: called.append(name) or q)
    operand = jnp.ones((1, 2, 3, channels), jnp.bfloat16)
    hooks._cudnn_where_it_fits(operand, operand, operand)
    assert called == [kernel.removesuffix("s")]

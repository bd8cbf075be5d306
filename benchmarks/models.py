"""The configs, the data and the train step that the benchmarks share."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.presets import imagenet
from sddit_jax.config.schema import Config
from sddit_jax.method.train_step import make_train_step
from sddit_jax.parallel.hooks import make_hooks
from sddit_jax.parallel.sharding import make_mesh

DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images in a step; a step of digits always has 48.", lower_bound=1)


def fastest() -> dict[str, Any]:
    """The keys that make a step fastest on CPUs: unrolled layers and no recomputation. On other devices none."""
    return {"model.scan": False, "model.remat": "none"} if jax.default_backend() == "cpu" else {}


def configuration(model: str, method: str, changes: dict | None = None) -> Config:
    """The config of a method, float32 on CPUs and bfloat16 elsewhere.

    model: digits, or a size such as S/2 for latents of 256-pixel images. changes: values by dotted key.
    """
    if model == "digits":
        config = runpy.run_path(str(DIGITS))["get_config"](method)
    else:
        config = imagenet(256, f"size={model},method={method}")
        with config.unlocked():
            config.batch_size = BATCH_SIZE.value
            config.parallel.data, config.parallel.fsdp = -1, 1
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config.update_from_flattened_dict(changes or {})
    return resolve(config)


def random_batch(config: Config) -> dict[str, jax.Array]:
    """A batch of random images or moments, as the loader would give it."""
    m, rng = config.model, np.random.default_rng(0)
    shape = (config.batch_size, m.image_size, m.image_size, m.channels)
    label_B = rng.integers(0, m.num_classes, config.batch_size, np.int32)
    if config.codec.name == "pixels":
        return jax.device_put({"image": rng.integers(0, 256, shape, np.uint8), "label": label_B})
    moments = rng.random((shape[0], 2, *shape[1:]), np.float32).astype(np.float16)
    return jax.device_put({"moments": moments, "label": label_B})


def train_step(config: Config, batch: dict[str, jax.Array]) -> Callable[[], Any]:
    """A function that does one train step, jitted as in train.py, on one device."""
    parts = make_parts(config, make_hooks(make_mesh(config.parallel, jax.devices()[:1]), config.model))
    step = jax.jit(make_train_step(parts), donate_argnums=0)
    state = jax.jit(parts.init_state)(jax.random.key(0))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return run

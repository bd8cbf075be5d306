"""Tiny networks with parameters that give every gradient, and what tests of the step share."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny_config

from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config
from sddit_jax.method.objectives.base import Drawn, Views
from sddit_jax.method.state import Parts, State
from sddit_jax.method.train_step import Batch, draw, make_train_step, student_views
from sddit_jax.models.layers import Constrain, Hooks, unconstrained

BATCH = 16
CHANGES = {
    "batch_size": BATCH,
    "steps": 100,
    "model.width": 16,
    "model.heads": 2,
    "ema.decay": 0.9,
    "optimizer.learning_rate": 1e-3,
    "objectives.label_dropout": 0.3,
    "objectives.discrimination.prototypes": 16,
    "objectives.discrimination.chunk": 5,
}
CONDITION = {"objectives.discrimination.centering": "condition", "objectives.discrimination.standardise": True}
# These networks compute for microseconds and compile for seconds: the flags make that three to seven times faster.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    # XLA's older emitters compile faster. Later versions have dropped them, and the flag.
    QUICK["xla_cpu_use_fusion_emitters"] = False
jit = functools.partial(jax.jit, compiler_options=QUICK)


def smallest_config(method: str, changes: dict[str, Any] | None = None) -> Config:
    """The config of `tiny_parts`."""
    config = tiny_config(method, CHANGES | (changes or {}))
    if jax.config.jax_enable_x64:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float64"))
    return config


def tiny_parts(method: str, changes: dict[str, Any] | None = None, constrain: Constrain = unconstrained) -> Parts:
    """The parts of a method at the tiny size, of float64 within `float64()`."""
    return make_parts(smallest_config(method, changes), Hooks(constrain))


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """All that is float32 in the package becomes float64.

    For what is equal only up to rounding. In float32 one ulp in the images moves gradients of the discrimination
    loss by up to 1e-5 of their norm, and Adam makes more of an element whose gradient is near 0; in float64 what is
    left is far below any mistake.
    """

    with (
        jax.enable_x64(True),
        mock.patch.object(jnp, "float32", jnp.float64),
    ):
        yield


def noise(tree: Any, seed: int) -> Any:
    """The tree plus N(0, 0.02) noise: a fresh adaLN-Zero network has no gradients, and nearly equal outputs."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.02 * rng.standard_normal(a.shape), jnp.float32), tree)


def noised_state(parts: Parts, step: int = 0) -> State:
    """A state in which parameters, EMA, teacher and centers are all different."""
    shapes = jax.eval_shape(parts.init_state, jax.random.key(0))
    rng = np.random.default_rng(0)

    def fresh(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """Matrices at the scale of their inputs; adaLN's and biases 0, as in a fresh network."""
        matrix = len(leaf.shape) > 1 and "modulation" not in jax.tree_util.keystr(path)
        return rng.standard_normal(leaf.shape) * (leaf.shape[-2] ** -0.5 if matrix else 0.0)

    # The network's numbers are drawn first, so that they do not depend on which objectives own parameters.
    ordered = {f"{name != 'network'}/{name}": tree for name, tree in shapes["params"].items()}
    ordered = noise(jax.tree_util.tree_map_with_path(fresh, ordered), 1)
    params = {key.partition("/")[2]: tree for key, tree in ordered.items()}
    aux = {objective.name: objective.init_state(params) for objective in parts.objectives}
    for own in aux.values():
        for seed, kind in enumerate(own.get("center", ()), 10):
            own["center"][kind] = noise(own["center"][kind], seed)
        if "teacher" in own:
            own["teacher"] = noise(own["teacher"], 3)
    return {
        "params": params,
        "ema": {"default": noise(params["network"], 2)},
        "opt_state": parts.optimizer.init(params),
        "aux": aux,
        "step": jnp.asarray(step, jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def make_batch(parts: Parts, seed: int = 0) -> Batch:
    """Random stored images and labels."""
    m, rng = parts.network.model, np.random.default_rng(seed)
    image = rng.integers(0, 256, (BATCH, m.image_size, m.image_size, m.channels), np.uint8)
    return {"image": image, "label": rng.integers(0, m.num_classes, len(image), np.int32)}


def draw_batch(parts: Parts, seed: int = 0) -> Drawn:
    """One drawn batch."""
    batch = make_batch(parts, seed)
    return jit(lambda key, x0, batch: draw(key, parts, x0, batch))(
        jax.random.key(seed), parts.codec.encode(batch["image"]), batch
    )


def make_views(parts: Parts, params: Any, seed: int = 0) -> Views:
    """The student's views of one drawn batch."""
    return jit(lambda params, drawn: student_views(params, parts, drawn))(params["network"], draw_batch(parts, seed))


@functools.cache
def compiled_step(method: str) -> tuple[Parts, Any]:
    """The parts of a method and its jitted step, compiled once for all tests."""
    parts = tiny_parts(method)
    return parts, jit(make_train_step(parts))


def assert_same_bits(a: Any, b: Any) -> None:
    """The same structure and the same bits in every leaf."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any, relative: float) -> None:
    """Every leaf of `a` is within `relative` times the norm of `b`'s leaf."""

    def check(path: tuple[Any, ...], a: jax.Array, b: jax.Array) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= relative * size, f"{jax.tree_util.keystr(path)}: off by {error:.3g} of {size:.3g}"

    jax.tree_util.tree_map_with_path(check, a, b)

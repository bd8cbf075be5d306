"""Schedules: functions of the step alone, which may be traced."""

import jax
import jax.numpy as jnp


def linear(step: jax.Array, start: float, end: float, steps: float) -> jax.Array:
    """A straight line from `start` at step 0 to `end` at step `steps`, constant after that."""
    return start + (end - start) * jnp.clip(step / max(steps, 1e-9), 0.0, 1.0)


def cosine(step: jax.Array, start: float, end: float, steps: float) -> jax.Array:
    """Half a cosine from `start` at step 0 to `end` at step `steps`, constant after that."""
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / max(steps, 1e-9), 0.0, 1.0)))


def between(step: jax.Array, kind: str, values: tuple[float, float], steps: tuple[int, int]) -> jax.Array | float:
    """From values[0] at steps[0] to values[1] at steps[1] by kind "linear" or "cosine", constant before and after.

    With kind "constant" it is values[0] at every step.
    """
    if kind == "constant":
        return values[0]
    (first, last), (start, stop) = values, steps
    return {"linear": linear, "cosine": cosine}[kind](step - start, first, last, stop - start)


def learning_rate(step: jax.Array, peak: float, kind: str, warmup_steps: int, steps: int) -> jax.Array:
    """A linear warm-up to `peak`, above 0 from step 0 on, then "constant", or "cosine" to 0 at step `steps`."""
    warmup = jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)
    if kind == "constant":
        return peak * warmup
    return peak * warmup * cosine(jnp.maximum(step - warmup_steps, 0), 1.0, 0.0, steps - warmup_steps)


def ema_decay(step: jax.Array, decay: float, warmup: bool = True) -> jax.Array:
    """min(decay, (1 + t) / (10 + t)) at step t, which forgets a random start; without `warmup` just `decay`."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else jnp.asarray(decay, jnp.float32)

"""The train step: state and batch in, state and metrics out, a pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sddit_jax.method import schedules
from sddit_jax.method.objectives.base import Metrics, Views
from sddit_jax.method.state import Parts, State
from sddit_jax.models.masking import sample_mask

Batch = dict[str, jax.Array]
TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
# (gradients, metrics, each objective's statistics)
Gradients = tuple[Any, Metrics, dict[str, Any]]
# Folded into a step's key for the codec's own random numbers. A small number would give one of the keys that `draw`
# splits the key into, and so the noise of the diffusion once more.
CODEC_STREAM = 2**32 - 1


def step_key(parts: Parts, step: jax.Array) -> jax.Array:
    """The key of all that is random in a step."""
    return jax.random.fold_in(jax.random.key(parts.config.seed), step)


def clean(parts: Parts, batch: Batch, step: jax.Array) -> jax.Array:
    """The clean images x0 of a step's batch; of latents, a sample of each image's Gaussian that the step draws."""
    return parts.codec.clean(batch, jax.random.fold_in(step_key(parts, step), CODEC_STREAM))


def draw(key: jax.Array, parts: Parts, x0_BHWC: jax.Array, label_B: jax.Array) -> dict[str, Any]:
    """All that is random in a step, for the whole batch: eps, sigma, mask, and which labels are dropped."""
    sigma_key, eps_key, mask_key, label_key = jax.random.split(key, 4)
    batch = x0_BHWC.shape[0]
    config = parts.config
    dropped_B = jax.random.uniform(label_key, (batch,)) < config.objectives.label_dropout
    ratio = config.masking.ratio
    return {
        "x0": x0_BHWC,
        "eps": jax.random.normal(eps_key, x0_BHWC.shape),
        "sigma": parts.diffusion.sample_sigma(sigma_key, batch),
        # Without classes every label is the null label, 0.
        "label": jnp.where(dropped_B, config.model.num_classes, jnp.minimum(label_B, config.model.num_classes)),
        "mask": sample_mask(mask_key, batch, parts.network.tokens, ratio) if ratio else None,
    }


def student_views(params: Any, parts: Parts, drawn: dict[str, Any]) -> Views:
    """The student's pass over one drawn batch."""
    network, diffusion = parts.network, parts.diffusion
    sigma_B, label_B, mask = drawn["sigma"], drawn["label"], drawn["mask"]
    noised = diffusion.noised(drawn["x0"], drawn["eps"], sigma_B)
    encoded = network.encode(params, *diffusion.network_input(noised, sigma_B), label_B, mask)
    denoised = diffusion.denoised(noised, network.decode(params, encoded, mask), sigma_B)
    return Views(
        x0=drawn["x0"], eps=drawn["eps"], noised=noised, sigma_B=sigma_B, label_B=label_B, mask=mask,
        encoded=encoded, denoised=denoised,
    )  # fmt: skip


def gradients_of(parts: Parts, state: State, drawn: dict[str, Any]) -> Gradients:
    """The gradient of the weighted sum of the objectives on one drawn batch."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Metrics, dict[str, Any]]]:
        views = student_views(params, parts, drawn)
        total, metrics, statistics = jnp.zeros(()), {}, {}
        for objective in parts.objectives:
            loss, own_metrics, statistics[objective.name] = objective.loss(
                params, state["aux"][objective.name], state["ema"]["default"], views, state["step"]
            )
            total += objective.weight * loss
            metrics |= own_metrics
        return total, (metrics | {"train/loss": total}, statistics)

    gradients, (metrics, statistics) = jax.grad(loss_fn, has_aux=True)(state["params"])
    return gradients, metrics, statistics


def accumulated_gradients_of(parts: Parts, state: State, drawn: dict[str, Any], microbatches: int) -> Gradients:
    """`gradients_of` as the mean over microbatches, one after another."""
    if microbatches == 1:
        return gradients_of(parts, state, drawn)
    # Row r goes to microbatch r % microbatches: each device keeps an equal share of the rows it already has.
    split = jax.tree.map(lambda a: a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), drawn)
    shapes = jax.eval_shape(lambda: gradients_of(parts, state, jax.tree.map(lambda a: a[0], split)))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def body(total: Any, part: dict[str, Any]) -> tuple[Any, None]:
        new = gradients_of(parts, state, part)
        return jax.tree.map(lambda t, x: t + x / microbatches, total, new), None

    return jax.lax.scan(body, zeros, split)[0]


def make_train_step(parts: Parts) -> TrainStep:
    """The step of one configuration: (state, batch) -> (state, metrics).

    batch: {image: uint8 [B, H, W, C], label: int32 [B]}, or of latents {moments: float16 [B, 2, H, W, C], label}.
    Everything random follows from (config.seed, state["step"]) and is drawn for the whole batch before it is split
    into microbatches. A step whose loss, gradients or update are not finite changes nothing but the step count and
    state["skipped"], how many such steps there were in a row; it is logged as train/skipped.
    """
    config = parts.config

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        step = state["step"]
        drawn = draw(step_key(parts, step), parts, clean(parts, batch, step), batch["label"])
        gradients, metrics, statistics = accumulated_gradients_of(parts, state, drawn, config.parallel.microbatches)

        o = config.optimizer
        learning_rate = schedules.learning_rate(step, o.learning_rate, o.schedule, o.warmup_steps, config.steps)
        updates, opt_state = parts.optimizer.update(gradients, state["opt_state"], state["params"])
        updates = jax.tree.map(lambda u: learning_rate * u, updates)
        metrics |= {f"grad_norm/{name}": optax.tree.norm(tree) for name, tree in gradients.items()}
        metrics["grad_norm/all"] = optax.tree.norm(gradients)
        metrics["train/update_norm"] = optax.tree.norm(updates)
        metrics["train/learning_rate"] = learning_rate
        finite = jnp.isfinite(metrics["train/loss"] + metrics["grad_norm/all"] + metrics["train/update_norm"])
        metrics["train/skipped"] = skipped = jnp.where(finite, 0, state["skipped"] + 1)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        # What follows is computed from the parameters that are kept, so that all can be written where the old lie.
        params = kept(optax.apply_updates(state["params"], updates), state["params"])
        decay = schedules.ema_decay(step, config.ema.decay, config.ema.warmup)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"]["default"], params)
        aux = {}
        for objective in parts.objectives:
            aux[objective.name], more = objective.update(
                state["aux"][objective.name], statistics[objective.name], params, step
            )
            metrics |= more
        return {
            "params": params,
            "ema": {"default": kept(ema, state["ema"]["default"])},
            "opt_state": kept(opt_state, state["opt_state"]),
            "aux": kept(aux, state["aux"]),
            "step": step + 1,
            "skipped": skipped,
        }, metrics

    return train_step

"""The train step, a pure function (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sddit_jax.errors import ConfigError
from sddit_jax.method.objectives.base import Drawn, Metrics, Views
from sddit_jax.method.state import Parts, State, by_owner
from sddit_jax.models.masking import sample_mask

Batch = dict[str, jax.Array]
TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
# (gradients, metrics, each objective's statistics)
Gradients = tuple[Any, Metrics, dict[str, Any]]
# Folded into a step's key for the random numbers of the codec. A small number would give a key that `draw` splits off
# too, and so the same random numbers twice.
CODEC_STREAM = 2**32 - 1


def step_key(parts: Parts, step: jax.Array) -> jax.Array:
    """The key of all random numbers of a step."""
    return jax.random.fold_in(jax.random.key(parts.seed), step)


def clean(parts: Parts, batch: Batch, step: jax.Array) -> jax.Array:
    """The clean images x0 of a step's batch, float32 [B, H, W, C]. Latents are samples that the step decides."""
    return parts.codec.clean(batch, jax.random.fold_in(step_key(parts, step), CODEC_STREAM))


def draw(key: jax.Array, parts: Parts, x0_BHWC: jax.Array, batch: Batch) -> Drawn:
    """The random variables of a step for the whole batch: eps, sigma, mask and dropped labels."""
    sigma_key, eps_key, mask_key, label_key = jax.random.split(key, 4)
    count, network, ratio = x0_BHWC.shape[0], parts.network, parts.mask_ratio
    dropped_B = jax.random.uniform(label_key, (count,)) < parts.label_dropout
    return Drawn(
        x0_BHWC=x0_BHWC,
        eps_BHWC=jax.random.normal(eps_key, x0_BHWC.shape),
        sigma_B=parts.diffusion.sample_sigma(sigma_key, count),
        # Without classes the null label is 0, and every label becomes it.
        label_B=jnp.where(dropped_B, network.null_label, jnp.minimum(batch["label"], network.null_label)),
        mask=sample_mask(mask_key, count, network.model.tokens, ratio) if ratio else None,
        features=_features(parts, batch),
    )


def _features(parts: Parts, batch: Batch) -> dict[str, jax.Array]:
    """The arrays of a batch that objectives need. Raises ConfigError for an array that the batch lacks."""
    features = {}
    for objective in parts.objectives:
        for name in objective.needs.features:
            if name not in batch:
                raise ConfigError(
                    f"objectives.{objective.name} needs {name} in every record, but records have {', '.join(batch)}"
                )
            features[name] = batch[name]
    return features


def student_views(params: Any, parts: Parts, drawn: Drawn) -> Views:
    """The student's pass over a drawn batch. params: of the network."""
    network, diffusion, sigma_B = parts.network, parts.diffusion, drawn.sigma_B
    taps = tuple(sorted({block for objective in parts.objectives for block in objective.needs.blocks}))
    noised_BHWC = diffusion.noised(drawn.x0_BHWC, drawn.eps_BHWC, sigma_B)
    inputs = diffusion.network_input(noised_BHWC, sigma_B)
    encoded = network.encode(params, *inputs, drawn.label_B, drawn.mask, taps)
    denoised_BHWC = diffusion.denoised(noised_BHWC, network.predict(params, encoded, drawn.mask), sigma_B)
    return Views(**vars(drawn), noised_BHWC=noised_BHWC, encoded=encoded, denoised_BHWC=denoised_BHWC)


def gradients_of(parts: Parts, state: State, drawn: Drawn) -> Gradients:
    """The gradient of the weighted sum of all objectives on a drawn batch."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Metrics, dict[str, Any]]]:
        views = student_views(params["network"], parts, drawn)
        total, metrics, statistics = jnp.zeros(()), {}, {}
        for objective in parts.objectives:
            loss, own_metrics, statistics[objective.name] = objective.loss(
                params, state["aux"][objective.name], state["ema"]["default"], views, state["step"]
            )
            weight = objective.weight(state["step"])
            total += weight * loss
            if objective.config.weight_schedule != "constant":
                own_metrics = own_metrics | {f"train/{objective.name}/weight": weight}
            if taken := own_metrics.keys() & (metrics.keys() | {"train/loss"}):
                raise ValueError(f"objective {objective.name} gives {', '.join(sorted(taken))}, a name that is taken")
            metrics |= own_metrics
        return total, (metrics | {"train/loss": total}, statistics)

    gradients, (metrics, statistics) = jax.grad(loss_fn, has_aux=True)(state["params"])
    return gradients, metrics, statistics


def accumulated_gradients_of(parts: Parts, state: State, drawn: Drawn, microbatches: int) -> Gradients:
    """The mean of `gradients_of` over microbatches, which are computed one after another."""
    if microbatches == 1:
        return gradients_of(parts, state, drawn)
    # Row r goes to microbatch r % microbatches, so that no row moves to another device.
    split = jax.tree.map(lambda a: a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), drawn)
    shapes = jax.eval_shape(lambda: gradients_of(parts, state, jax.tree.map(lambda a: a[0], split)))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def body(total: Any, part: Drawn) -> tuple[Any, None]:
        new = gradients_of(parts, state, part)
        return jax.tree.map(lambda t, x: t + x / microbatches, total, new), None

    return jax.lax.scan(body, zeros, split)[0]


def make_train_step(parts: Parts) -> TrainStep:
    """The train step of a configuration: train_step(state, batch) -> (state, metrics), a pure function.

    batch: {"image": uint8 [B, H, W, C], "label": int32 [B]}; latents have "moments", float16 [B, 2, H, W, C], in place
    of "image". All random numbers follow from the seed and state["step"]; they are drawn for the whole batch before it
    is split into microbatches. A step whose loss, gradients or update are not finite changes only state["step"] and
    state["skipped"], the number of such steps in a row, which is the metric train/skipped.

        train_step = jax.jit(make_train_step(parts), donate_argnums=0)
        state, metrics = train_step(parts.init_state(jax.random.key(0)), batch)
    """

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        step = state["step"]
        drawn = draw(step_key(parts, step), parts, clean(parts, batch, step), batch)
        gradients, metrics, statistics = accumulated_gradients_of(parts, state, drawn, parts.microbatches)
        learning_rate = parts.learning_rate(step)
        updates, opt_state = parts.optimizer.update(gradients, state["opt_state"], state["params"])
        updates = jax.tree.map(lambda u: learning_rate * u, updates)
        metrics |= {f"grad_norm/{name}": optax.tree.norm(tree) for name, tree in by_owner(gradients).items()}
        metrics["grad_norm/all"] = optax.tree.norm(gradients)
        metrics["train/update_norm"] = optax.tree.norm(updates)
        metrics["train/learning_rate"] = learning_rate
        finite = jnp.isfinite(metrics["train/loss"] + metrics["grad_norm/all"] + metrics["train/update_norm"])
        metrics["train/skipped"] = skipped = jnp.where(finite, 0, state["skipped"] + 1)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        # EMA and aux are computed from the parameters that are kept, so that their buffers can be reused.
        params = kept(optax.apply_updates(state["params"], updates), state["params"])
        decay = parts.ema_decay(step)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"]["default"], params["network"])
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

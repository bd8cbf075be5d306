"""What is measured when a run is done."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.config.schema import Config
from sddit_jax.data.image_sources import ImageSource
from sddit_jax.evaluation.metrics import nearest_neighbour_accuracy
from sddit_jax.method.objectives.discrimination import Discrimination
from sddit_jax.method.state import Parts, State
from sddit_jax.method.train_step import clean, step_key
from sddit_jax.parallel.sharding import replicated
from sddit_jax.sampling.labels import balanced_labels

log = logging.getLogger("sddit_jax")
Generate = Callable[[Any, int, np.ndarray], np.ndarray]


def discrimination_of(parts: Parts) -> Discrimination | None:
    """The discrimination objective of a run, if it has one."""
    return next((o for o in parts.objectives if isinstance(o, Discrimination)), None)


def diagnose(parts: Parts, state: State, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`Discrimination.diagnose` on a batch; its noise follows from the seed and the step. To be jitted."""
    x0_BHWC = clean(parts, batch, state["step"])
    eps_BHWC = jax.random.normal(step_key(parts, state["step"]), x0_BHWC.shape)
    objective = discrimination_of(parts)
    return objective.diagnose(
        state["aux"][objective.name], state["ema"]["default"], x0_BHWC, eps_BHWC, batch["label"], state["step"]
    )


def collapse(parts: Parts, metrics: dict[str, float]) -> str:
    """Why the teacher's assignments look collapsed, from metrics with a diagnosis; empty if they do not."""
    reasons = []
    objective = discrimination_of(parts)
    full = np.log(objective.config.prototypes) if objective else 0.0
    for kind in ("patch", "cls"):
        information = metrics.get(f"teacher/{kind}/information")
        if information is None:
            continue
        mean_entropy = metrics[f"teacher/{kind}/mean_entropy"]
        if information < 0.02:
            reasons.append(f"{kind} assignments tell {information:.3f} nats of the image beyond position and label")
        if mean_entropy < full / 4:
            reasons.append(f"{kind} assignments use few prototypes (entropy {mean_entropy:.2f} of {full:.2f})")
    return "; ".join(reasons)


def evaluate_digits(
    config: Config, parts: Parts, state: State, source: ImageSource, generate: Generate, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """The samples of the EMA weights against the real digits, and what the encoder knows of them.

    eval/{class_consistency, frechet_pixels, nearest_real, nearest_real_close}: means over the draws (see `judge`).
    eval/{patch,cls}/information: what the teacher's assignments of all real digits tell beyond position and label.
    eval/probe_cls, eval/probe_cls_untrained: 1-NN accuracy of [CLS] under the null label, of this encoder and of a
    fresh one.
    """
    from sddit_jax.evaluation.digits import judge  # loads scikit-learn's classifiers: slow, and only needed here

    everywhere = replicated(mesh)
    label_N = balanced_labels(config.eval.num_samples, source.num_classes)
    real = [source[i] for i in range(len(source))]
    image_BHWC = np.stack([record["image"] for record in real])
    real_label_B = np.stack([record["label"] for record in real])
    draws = [
        judge(generate(state["ema"]["default"], config.seed + 1 + draw, label_N), label_N, image_BHWC, real_label_B)
        for draw in range(config.eval.draws)
    ]
    results = {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}
    if discrimination_of(parts):
        found = jax.jit(lambda s, b: diagnose(parts, s, b), out_shardings=everywhere)(
            state, {"image": image_BHWC, "label": real_label_B}
        )
        results |= {key.replace("teacher/", "eval/"): float(value) for key, value in found.items()}
    if config.model.cls_token:

        def cls_features(params: Any) -> jax.Array:
            x0_BHWC = parts.codec.encode(image_BHWC)
            sigma_B = jnp.full(len(x0_BHWC), parts.diffusion.sigma_min, jnp.float32)
            null_B = jnp.full(len(x0_BHWC), parts.network.null_label, jnp.int32)
            return parts.network.encode(params, *parts.diffusion.network_input(x0_BHWC, sigma_B), null_B).cls_BD

        fresh = jax.jit(parts.network.init, out_shardings=everywhere)(jax.random.key(config.seed))
        for name, params in (("", state["ema"]["default"]), ("_untrained", fresh)):
            features = np.asarray(jax.jit(cls_features, out_shardings=everywhere)(params))
            results[f"eval/probe_cls{name}"] = nearest_neighbour_accuracy(features, real_label_B)
    return results


def digits_lines(results: dict[str, float]) -> list[str]:
    """The result in a few lines for a person."""
    r = {key.removeprefix("eval/"): value for key, value in results.items()}
    lines = [
        f"samples: {r['class_consistency']:.1%} recognised as the asked digit, Frechet distance in pixels "
        f"{r['frechet_pixels']:.3f} (two halves of the real digits: 0.07)",
        f"novelty: distance to the nearest real digit has a median of {r['nearest_real']:.2f} (real to real: 1.01), "
        f"{r['nearest_real_close']:.1%} are closer than 0.5",
    ]
    if "patch/information" in r:
        lines.append(
            f"encoder: assignments tell {r['patch/information']:.2f} nats (patches) beyond position and label"
            + (
                f", {r['cls/information']:.2f} nats ([CLS]); 1-NN of [CLS] under the null label {r['probe_cls']:.1%} "
                f"(untrained {r['probe_cls_untrained']:.1%})"
                if "cls/information" in r
                else ""
            )
        )
    return lines

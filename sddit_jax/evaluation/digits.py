"""Judges samples of digits by scikit-learn's 1,797 real digits, and probes the encoder with these."""

import logging
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from sddit_jax.evaluation.diagnosis import discrimination_of, make_diagnose
from sddit_jax.evaluation.metrics import frechet_distance, moments, nearest_distances, nearest_neighbour_accuracy
from sddit_jax.evaluation.protocol import Evaluator, Moment, Run
from sddit_jax.method.state import State
from sddit_jax.parallel.sharding import replicated
from sddit_jax.sampling.labels import balanced_labels

log = logging.getLogger("sddit_jax")


class Digits(Evaluator):
    """Measures samples of the EMA weights and the encoder by the real digits, at the last step.

    eval/{class_consistency, frechet_pixels, nearest_real, nearest_real_close}: see `judge`; means over `eval.draws`.
    eval/{patch,cls}/information: see `Discrimination.diagnose`; on all real digits.
    eval/probe_cls, eval/probe_cls_untrained: 1-NN accuracy of [CLS] under the null label, of the EMA's encoder and of a
    freshly initialised one.
    """

    name = "eval/class_consistency"

    @classmethod
    def make(cls, run: Run, start: int) -> Self | None:
        """None unless eval.name is digits."""
        return cls(run, start) if run.config.eval.name == "digits" else None

    def due(self, step: int) -> bool:
        """At the last step."""
        return step == self.run.config.steps

    def measure(self, state: State, moment: Moment) -> dict[str, float]:
        """The metrics that the class names, without those of parts that the network lacks."""
        run, count = self.run, len(self.run.source)
        real = run.source.read(np.arange(count), np.zeros(count, bool))
        image_BHWC, label_B = real["image"], real["label"]
        results = self._judged(state["ema"]["default"], image_BHWC, label_B, moment)
        if discrimination_of(run.parts):
            found = make_diagnose(run)(state, {"image": image_BHWC, "label": label_B})
            results |= {key.replace("teacher/", "eval/"): float(value) for key, value in found.items()}
        if run.config.model.cls_token:
            results |= self._probed(state["ema"]["default"], image_BHWC, label_B)
        return results

    def say(self, step: int, row: Mapping[str, float]) -> None:
        """Writes the results to the log, in up to three lines."""
        r = {key.removeprefix("eval/"): value for key, value in row.items()}
        log.info(
            f"samples: {r['class_consistency']:.1%} recognised as the asked digit, Frechet distance in pixels "
            f"{r['frechet_pixels']:.3f} (two halves of the real digits: 0.07)"
        )
        log.info(
            f"novelty: distance to the nearest real digit has a median of {r['nearest_real']:.2f} (real to real: "
            f"1.01), {r['nearest_real_close']:.1%} are closer than 0.5"
        )
        if "patch/information" in r:
            line = f"encoder: assignments tell {r['patch/information']:.2f} nats (patches) beyond position and label"
            if "cls/information" in r:
                line += (
                    f", {r['cls/information']:.2f} nats ([CLS]); 1-NN of [CLS] under the null label "
                    f"{r['probe_cls']:.1%} (untrained {r['probe_cls_untrained']:.1%})"
                )
            log.info(line)

    def _judged(self, ema: Any, image_BHWC: np.ndarray, label_B: np.ndarray, moment: Moment) -> dict[str, float]:
        config, draws = self.run.config, []
        asked_N = balanced_labels(config.eval.num_samples, self.run.source.num_classes)
        for draw in range(config.eval.draws):
            moment.check()
            samples_NHWC = self.run.generate(ema, config.seed + 1 + draw, asked_N)
            draws.append(judge(samples_NHWC, asked_N, image_BHWC, label_B))
        return {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}

    def _probed(self, ema: Any, image_BHWC: np.ndarray, label_B: np.ndarray) -> dict[str, float]:
        parts, everywhere = self.run.parts, replicated(self.run.mesh)

        def cls_features(params: Any) -> jax.Array:
            x0_BHWC = parts.codec.encode(image_BHWC)
            sigma_B = jnp.full(len(x0_BHWC), parts.diffusion.sigma_min, jnp.float32)
            null_B = jnp.full(len(x0_BHWC), parts.network.null_label, jnp.int32)
            return parts.network.encode(params, *parts.diffusion.network_input(x0_BHWC, sigma_B), null_B).cls_BD

        fresh = jax.jit(parts.network.init, out_shardings=everywhere)(jax.random.key(self.run.config.seed))
        results = {}
        for name, params in (("", ema), ("_untrained", fresh)):
            features = np.asarray(jax.jit(cls_features, out_shardings=everywhere)(params))
            results[f"eval/probe_cls{name}"] = nearest_neighbour_accuracy(features, label_B)
        return results


def vectors(images_BHWC: np.ndarray) -> np.ndarray:
    """uint8 images [B, H, W, C] as float64 rows [B, H * W * C] in [-0.5, 0.5]."""
    return images_BHWC.reshape(len(images_BHWC), -1) / 255.0 - 0.5


def judge(
    images_BHWC: np.ndarray, label_B: np.ndarray, real_BHWC: np.ndarray, real_label_B: np.ndarray
) -> dict[str, float]:
    """Compares samples, which were drawn with the labels `label_B`, with real digits. All images are uint8.

    eval/class_consistency: fraction of samples whose label a support vector classifier, fitted on the real digits,
    recognises (fitted on the first half of the real digits, it recognises 97 % of the second half).
    eval/frechet_pixels: Frechet distance to the real digits in pixels.
    eval/nearest_real: median distance of a sample to the nearest real digit (between real digits: 1.01).
    eval/nearest_real_close: fraction of samples nearer than 0.5, which would be copies.
    """
    from sklearn.svm import SVC  # slow to load, and only needed here

    samples, real = vectors(images_BHWC), vectors(real_BHWC)
    # In units of the original 0..16, gamma is the 0.001 that scikit-learn's own example uses.
    classifier = SVC(gamma=0.001 * 16**2).fit(real, real_label_B)
    nearest = nearest_distances(samples, real)
    return {
        "eval/class_consistency": float((classifier.predict(samples) == label_B).mean()),
        "eval/frechet_pixels": frechet_distance(*moments(samples), *moments(real)),
        "eval/nearest_real": float(np.median(nearest)),
        "eval/nearest_real_close": float((nearest < 0.5).mean()),
    }

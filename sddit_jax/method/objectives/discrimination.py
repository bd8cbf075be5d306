"""The discriminative objective: the student tells its tokens apart as the EMA teacher tells its own.

Student and teacher see two points of one PF-ODE trajectory: the student x_S = x0 + sigma_S * eps without its
invisible tokens, the teacher x_T = x0 + sigma_min * eps whole. Each token of the teacher is softly assigned to one of
K prototypes, and the student has to predict the assignment of the same position (SD-DiT, Zhu et al. 2024; iBOT, Zhou
et al. 2022).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sddit_jax.config import schema
from sddit_jax.method import schedules
from sddit_jax.method.diffusion import Diffusion
from sddit_jax.method.losses import HIGHEST, assignment_information, entropy, prototype_cross_entropy
from sddit_jax.method.objectives.base import Metrics, Views
from sddit_jax.models.masking import take
from sddit_jax.models.transformer import Encoded, Network

VARIANCE_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True)
class Discrimination:
    """L_D = cross-entropy of the visible tokens + cross-entropy of [CLS].

    Its state: `teacher`, the EMA of encoder and head (unless the teacher reads the sampling EMA); `center`, for patches
    and for [CLS] a table [cells, K] of running means of the raw logits; `variance`, the running mean square of the
    centered logits. With `centering` "mean" there is one cell; with "condition" each position has its own for patches,
    and each label (the null label too) for [CLS]. What position and label alone decide is then no information: the
    assignment has to come from the image.
    """

    config: schema.Discrimination
    network: Network
    diffusion: Diffusion
    steps: int
    name: str = "discrimination"

    @property
    def weight(self) -> float:
        """Weight in the total loss."""
        return self.config.weight

    def init(self, params: Any) -> dict[str, Any]:
        """The teacher is the student; centers are 0; variances those of products of random unit vectors."""
        c, model = self.config, self.network.model
        cells = {"patch": self.network.tokens}
        if model.cls_token:
            cells["cls"] = model.num_classes + 1
        if c.centering == "mean":
            cells = dict.fromkeys(cells, 1)
        aux = {
            "center": {kind: jnp.zeros((count, c.prototypes)) for kind, count in cells.items()},
            "variance": {kind: jnp.full((), 1 / c.bottleneck, jnp.float32) for kind in cells},
        }
        if c.teacher == "own":
            aux["teacher"] = {name: jax.tree.map(jnp.copy, params[name]) for name in ("encoder", "head")}
        return aux

    def loss(self, params: Any, aux: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """The sum of the terms. Gradients reach the student's encoder and head, and nothing of the teacher."""
        c = self.config
        teacher = jax.lax.stop_gradient(self.teacher(aux, ema))
        student_vectors, student_prototypes_KE = self._project(params, views.encoded)
        teacher_vectors, teacher_prototypes_KE = jax.lax.stop_gradient(
            self._project(teacher, self._encode(teacher, views.x0, views.eps, views.label_B))
        )
        total, metrics, statistics = jnp.zeros(()), {}, {}
        for kind, cell_BN in self._cells(views.label_B).items():
            teacher_BNE = teacher_vectors[kind]
            center_MK = aux["center"][kind]
            vectors_ME, count_M = _mean_by_cell(teacher_BNE, cell_BN, center_MK.shape[0])
            if kind == "patch" and views.mask is not None:
                teacher_BNE = take(teacher_BNE, views.mask.visible_BV)
                cell_BN = jnp.take_along_axis(cell_BN, views.mask.visible_BV, axis=1)
            loss, assignments = prototype_cross_entropy(
                student_vectors[kind], student_prototypes_KE, teacher_BNE, teacher_prototypes_KE, center_MK, cell_BN,
                c.student_temperature, self._temperature(aux, kind, step), c.chunk,
            )  # fmt: skip
            total += loss
            metrics |= {
                f"train/discrimination/{kind}": loss,
                f"teacher/{kind}/entropy": assignments.entropy,
                f"teacher/{kind}/agreement": assignments.agreement,
            }
            statistics[kind] = {
                "logits_MK": jnp.matmul(vectors_ME, teacher_prototypes_KE.T, precision=HIGHEST),
                "count_M": count_M,
                "variance": assignments.variance,
                "mean_K": assignments.mean_K,
            }
        return total, metrics, statistics

    def update(self, aux: Any, statistics: Any, params: Any, step: jax.Array) -> tuple[dict[str, Any], Metrics]:
        """One step of the running means, and of the teacher towards the student."""
        c, m = self.config, self.config.center_momentum
        new, metrics = {"center": {}, "variance": {}}, {}
        for kind, s in statistics.items():
            count_M1 = s["count_M"][:, None]
            mean_MK = s["logits_MK"] / jnp.maximum(count_M1, 1e-9)
            old_MK = aux["center"][kind]
            new["center"][kind] = jnp.where(count_M1 > 0, m * old_MK + (1 - m) * mean_MK, old_MK)
            new["variance"][kind] = m * aux["variance"][kind] + (1 - m) * s["variance"]
            metrics[f"teacher/{kind}/mean_entropy"] = entropy(s["mean_K"])
            metrics[f"teacher/{kind}/center_norm"] = jnp.linalg.norm(new["center"][kind], axis=-1).mean()
            metrics[f"teacher/{kind}/logit_std"] = jnp.sqrt(s["variance"])
        if c.teacher == "own":
            momentum = schedules.cosine(step, *c.teacher_momentum, self.steps)
            new["teacher"] = {
                name: jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, old, params[name])
                for name, old in aux["teacher"].items()
            }
            metrics["teacher/momentum"] = momentum
        return new, metrics

    def teacher(self, aux: Any, ema: Any) -> dict[str, Any]:
        """The teacher's parameters: {"encoder", "head"}."""
        source = aux["teacher"] if self.config.teacher == "own" else ema
        return {name: source[name] for name in ("encoder", "head")}

    def diagnose(
        self, aux: Any, ema: Any, x0_BHWC: jax.Array, eps_BHWC: jax.Array, label_B: jax.Array, step: jax.Array
    ) -> Metrics:
        """What the teacher's assignments of these images are worth, with their true labels.

        teacher/{patch,cls}/information: what they tell of the image beyond position and label, in nats (see
        `assignment_information`); NaN if no label comes twice.
        """
        label_B = jnp.minimum(label_B, self.network.model.num_classes)
        teacher = self.teacher(aux, ema)
        vectors, prototypes_KE = self._project(teacher, self._encode(teacher, x0_BHWC, eps_BHWC, label_B))
        metrics = {}
        for kind, cell_BN in self._cells(label_B).items():
            center_MK, temperature = aux["center"][kind], self._temperature(aux, kind, step)

            def at_position(
                xs: tuple[jax.Array, jax.Array],
                center_MK: jax.Array = center_MK,
                temperature: jax.Array = temperature,
            ) -> jax.Array:
                vectors_BE, cell_B = xs
                logits_BK = jnp.matmul(vectors_BE, prototypes_KE.T, precision=HIGHEST) - center_MK[cell_B]
                return assignment_information(jax.nn.softmax(logits_BK / temperature), label_B)

            by_position = jax.lax.map(at_position, (vectors[kind].swapaxes(0, 1), cell_BN.T))
            metrics[f"teacher/{kind}/information"] = by_position.mean()
        return metrics

    def _encode(self, teacher: Any, x0_BHWC: jax.Array, eps_BHWC: jax.Array, label_B: jax.Array) -> Encoded:
        """What the teacher sees, all tokens at the lowest noise level."""
        sigma_B = jnp.full(x0_BHWC.shape[0], self.diffusion.sigma_min, jnp.float32)
        noised = self.diffusion.noised(x0_BHWC, eps_BHWC, sigma_B)
        return self.network.encode(teacher, *self.diffusion.network_input(noised, sigma_B), label_B)

    def _project(self, params: Any, encoded: Encoded) -> tuple[dict[str, jax.Array], jax.Array]:
        """One pass of the head: unit vectors of each kind of token, [B, N, E] and [B, 1, E], and prototypes [K, E]."""
        tokens = encoded.tokens_BVD
        if encoded.cls_BD is None:
            vectors_BVE, prototypes_KE = self.network.project(params, tokens)
            return {"patch": vectors_BVE}, prototypes_KE
        tokens = jnp.concatenate([encoded.cls_BD[:, None], tokens], axis=1)
        vectors, prototypes_KE = self.network.project(params, tokens)
        cls_B1E, patch_BVE = jax.lax.split(vectors, (1, vectors.shape[1] - 1), axis=1)
        return {"patch": patch_BVE, "cls": cls_B1E}, prototypes_KE

    def _cells(self, label_B: jax.Array) -> dict[str, jax.Array]:
        """For each kind of token, the row of its center's table: int32 [B, N] and [B, 1]."""
        tokens, by_condition = self.network.tokens, self.config.centering == "condition"
        position_BN = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (label_B.shape[0], tokens))
        cells = {"patch": position_BN}
        if self.network.model.cls_token:
            cells["cls"] = label_B[:, None]
        return cells if by_condition else jax.tree.map(jnp.zeros_like, cells)

    def _temperature(self, aux: Any, kind: str, step: jax.Array) -> jax.Array:
        c = self.config
        first, last = c.teacher_temperature
        temperature = schedules.linear(step, first, last, c.teacher_temperature_warmup * self.steps)
        return temperature * jnp.sqrt(aux["variance"][kind] + VARIANCE_FLOOR) if c.standardise else temperature


def _mean_by_cell(vectors_BNE: jax.Array, cell_BN: jax.Array, cells: int) -> tuple[jax.Array, jax.Array]:
    """Sums of the vectors [M, E] and counts [M] of each cell, both divided by B, so that parts of a batch average.

    Cells are one for all, one for each position, or labels. Products and means, not scatter-adds, whose order is not
    fixed on every device.
    """
    if cells == 1:
        return vectors_BNE.mean(axis=(0, 1))[None], jnp.ones(1)
    if cells == vectors_BNE.shape[1]:
        return vectors_BNE.mean(axis=0), jnp.ones(cells)
    one_hot_BM = jax.nn.one_hot(cell_BN[:, 0], cells)
    sums_ME = jnp.matmul(one_hot_BM.T, vectors_BNE[:, 0], precision=HIGHEST)
    return sums_ME / len(cell_BN), one_hot_BM.mean(axis=0)

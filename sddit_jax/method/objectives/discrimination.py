"""The discriminative objective: the student tells its tokens apart as the EMA teacher tells its own.

Student and teacher see two points of one PF-ODE trajectory: the student x_S = x0 + sigma_S * eps without its
invisible tokens, the teacher x_T = x0 + sigma_min * eps whole. Each token of the teacher is softly assigned to one of
K prototypes, and the student has to predict the assignment of the same position (SD-DiT, Zhu et al. 2024; iBOT, Zhou
et al. 2022).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sddit_jax.method import schedules
from sddit_jax.method.losses import HIGHEST, assignment_information, entropy, prototype_cross_entropy
from sddit_jax.method.objectives.base import Metrics, Objective, ObjectiveConfig, Views
from sddit_jax.models import arithmetic
from sddit_jax.models.layers import layer_norm
from sddit_jax.models.masking import take
from sddit_jax.models.transformer import Encoded
from sddit_jax.settings import setting

VARIANCE_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True)
class DiscriminationConfig(ObjectiveConfig):
    """Self-distillation between the student's and the teacher's tokens."""

    weight: float = setting(0.1, "C", "weight in the total loss; always 0 trains without teacher and head", least=0)
    prototypes: int = setting(8192, "I", "number of prototypes K", least=2)
    head_width: int = setting(2048, "I", "hidden width of the projection head", least=1)
    bottleneck: int = setting(256, "I", "width of the head's normalised output", least=1)
    student_temperature: float = setting(0.1, "I", "temperature of the student's softmax", above=0)
    teacher_temperature: tuple[float, float] = setting(
        (0.04, 0.07), "I", "temperature of the teacher's softmax: first and last", above=0
    )
    teacher_temperature_warmup: float = setting(0.3, "I", "share of the run in which it rises", least=0, most=1)
    centering: str = setting(
        "mean",
        "S",
        "running mean of the logits: one 'mean' (DINO), or one per 'condition' (position, label)",
        choices=("mean", "condition"),
    )
    standardise: bool = setting(
        False, "C", "teacher temperatures in units of the running standard deviation of the centered logits"
    )
    center_momentum: float = setting(0.9, "I", "momentum of the running centers", least=0, most=1)
    teacher: str = setting("own", "C", "'own' EMA law, or 'ema': that of the sampling EMA", choices=("own", "ema"))
    teacher_momentum: tuple[float, float] = setting(
        (0.996, 1.0), "C", "own law: momentum, first and last, by cosine over the run", least=0, most=1
    )
    chunk: int = setting(16, "C", "token positions whose prototype logits exist at one time", least=1)


class Head(nn.Module):
    """The projection head: LayerNorm, a three-layer GELU MLP, and K prototypes of unit norm (DINO, iBOT).

    The residual stream that it reads has no norm of its own, hence the LayerNorm.
    """

    width: int
    bottleneck: int
    prototypes: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [..., D] -> unit vectors [..., E] and prototypes [K, E], float32; logits are their products."""

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.truncated_normal(0.02), name=name)

        hidden = nn.gelu(dense(self.width, "mlp_0")(layer_norm(tokens)), approximate=False)
        hidden = nn.gelu(dense(self.width, "mlp_1")(hidden), approximate=False)
        out = dense(self.bottleneck, "mlp_2")(hidden)
        bound = self.bottleneck**-0.5
        prototypes_KE = self.param(
            "prototypes",
            lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
            (self.prototypes, self.bottleneck),
        )
        return unit(out.astype(jnp.float32)), unit(prototypes_KE)


def unit(x: jax.Array) -> jax.Array:
    """x over its norm on the last axis, at least 1e-12, with a finite gradient at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


class Discrimination(Objective):
    """L_D = cross-entropy of the visible tokens + cross-entropy of [CLS].

    It owns the head. Its state: `teacher`, the EMA of encoder and head, or of the head alone where the sampling EMA is
    the teacher's encoder; `center`, for patches and for [CLS] a table [cells, K] of running means of the raw logits;
    `variance`, the running mean square of the centered logits. With `centering` "mean" there is one cell; with
    "condition" each position has its own for patches, and each label (the null label too) for [CLS]. What position and
    label alone decide is then no information: the assignment has to come from the image.
    """

    name = "discrimination"
    Config = DiscriminationConfig

    @functools.cached_property
    def head(self) -> Head:
        """The projection head, for student and teacher."""
        c = self.config
        return Head(c.head_width, c.bottleneck, c.prototypes, jnp.dtype(self.network.model.dtype))

    def init_params(self, key: jax.Array) -> Any:
        """A fresh head."""
        m = self.network.model
        return self.head.init(key, jnp.zeros((1, m.tokens, m.width), m.dtype))["params"]

    def init_state(self, params: Any) -> dict[str, Any]:
        """The teacher is the student; centers are 0; variances those of products of random unit vectors."""
        c, model = self.config, self.network.model
        cells = {"patch": model.tokens}
        if model.cls_token:
            cells["cls"] = self.network.null_label + 1
        if c.centering == "mean":
            cells = dict.fromkeys(cells, 1)
        return {
            "center": {kind: jnp.zeros((count, c.prototypes)) for kind, count in cells.items()},
            "variance": {kind: jnp.full((), 1 / c.bottleneck, jnp.float32) for kind in cells},
            "teacher": jax.tree.map(jnp.copy, self._taught(params)),
        }

    def loss(self, params: Any, state: Any, ema: Any, views: Views, step: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        """The sum of the terms. Gradients reach the student's encoder and head, and nothing of the teacher."""
        c = self.config
        teacher = jax.lax.stop_gradient(self.teacher(state, ema))
        student_vectors, student_prototypes_KE = self._project(params[self.name], views.encoded)
        teacher_vectors, teacher_prototypes_KE = jax.lax.stop_gradient(
            self._project(teacher["head"], self._encode(teacher, views.x0_BHWC, views.eps_BHWC, views.label_B))
        )
        total, metrics, statistics = jnp.zeros(()), {}, {}
        for kind, cell_BN in self._cells(views.label_B).items():
            teacher_BNE = teacher_vectors[kind]
            center_MK = state["center"][kind]
            vectors_ME, count_M = _mean_by_cell(teacher_BNE, cell_BN, center_MK.shape[0])
            if kind == "patch" and views.mask is not None:
                teacher_BNE = take(teacher_BNE, views.mask.visible_BV)
                cell_BN = jnp.take_along_axis(cell_BN, views.mask.visible_BV, axis=1)
            loss, assignments = prototype_cross_entropy(
                student_vectors[kind], student_prototypes_KE, teacher_BNE, teacher_prototypes_KE, center_MK, cell_BN,
                c.student_temperature, self._temperature(state, kind, step), c.chunk,
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

    def update(self, state: Any, statistics: Any, params: Any, step: jax.Array) -> tuple[dict[str, Any], Metrics]:
        """One step of the running means, and of the teacher towards the student."""
        c, m = self.config, self.config.center_momentum
        new, metrics = {"center": {}, "variance": {}}, {}
        for kind, s in statistics.items():
            count_M1 = s["count_M"][:, None]
            mean_MK = s["logits_MK"] / jnp.maximum(count_M1, 1e-9)
            old_MK = state["center"][kind]
            new["center"][kind] = jnp.where(count_M1 > 0, m * old_MK + (1 - m) * mean_MK, old_MK)
            new["variance"][kind] = m * state["variance"][kind] + (1 - m) * s["variance"]
            metrics[f"teacher/{kind}/mean_entropy"] = entropy(s["mean_K"])
            metrics[f"teacher/{kind}/center_norm"] = jnp.linalg.norm(new["center"][kind], axis=-1).mean()
            metrics[f"teacher/{kind}/logit_std"] = jnp.sqrt(s["variance"])
        if c.teacher == "own":
            momentum = schedules.cosine(step, *c.teacher_momentum, self.context.steps)
            metrics["teacher/momentum"] = momentum
        else:
            momentum = self.context.ema_decay(step)
        new["teacher"] = jax.tree.map(
            lambda t, s: momentum * t + (1 - momentum) * s, state["teacher"], self._taught(params)
        )
        return new, metrics

    def teacher(self, state: Any, ema: Any) -> dict[str, Any]:
        """The teacher's parameters: {"encoder", "head"}."""
        return {"encoder": ema["encoder"], **state["teacher"]}

    def _taught(self, params: Any) -> dict[str, Any]:
        """The student's parameters of which the state keeps an average."""
        head = {"head": params[self.name]}
        return {"encoder": params["network"]["encoder"], **head} if self.config.teacher == "own" else head

    def flops(self, visible: int) -> dict[str, float]:
        """Of the head and the prototypes, and the teacher's pass.

        Student: visible tokens and [CLS]. The teacher's head sees all, and its prototypes what the student sees.
        """
        c, m = self.config, self.network.model
        head = 2 * (m.width * c.head_width + c.head_width**2 + c.head_width * c.bottleneck)
        logits = 2 * c.bottleneck * c.prototypes
        return {
            "encoder": 3 * head * (visible + m.cls_token),
            "teacher": arithmetic.encoder(m, m.tokens) + head * (m.tokens + m.cls_token),
            "prototypes": (3 + 1) * logits * (visible + m.cls_token),
        }

    def diagnose(
        self, state: Any, ema: Any, x0_BHWC: jax.Array, eps_BHWC: jax.Array, label_B: jax.Array, step: jax.Array
    ) -> Metrics:
        """What the teacher's assignments of these images are worth, with their true labels.

        teacher/{patch,cls}/information: what they tell of the image beyond position and label, in nats (see
        `assignment_information`); NaN if no label comes twice.
        """
        label_B = jnp.minimum(label_B, self.network.null_label)
        teacher = self.teacher(state, ema)
        vectors, prototypes_KE = self._project(teacher["head"], self._encode(teacher, x0_BHWC, eps_BHWC, label_B))
        metrics = {}
        for kind, cell_BN in self._cells(label_B).items():
            center_MK, temperature = state["center"][kind], self._temperature(state, kind, step)

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
        diffusion = self.context.diffusion
        sigma_B = jnp.full(x0_BHWC.shape[0], diffusion.sigma_min, jnp.float32)
        noised_BHWC = diffusion.noised(x0_BHWC, eps_BHWC, sigma_B)
        return self.network.encode(teacher, *diffusion.network_input(noised_BHWC, sigma_B), label_B)

    def _project(self, params: Any, encoded: Encoded) -> tuple[dict[str, jax.Array], jax.Array]:
        """One pass of the head: unit vectors of each kind of token, [B, N, E] and [B, 1, E], and prototypes [K, E]."""
        tokens, cls_BD = encoded.tokens_BVD, encoded.cls_BD
        if cls_BD is not None:
            tokens = jnp.concatenate([cls_BD[:, None], tokens], axis=1)
        constrain = self.network.hooks.constrain
        vectors, prototypes_KE = self.head.apply({"params": constrain(params, "weights")}, tokens)
        vectors = constrain(vectors, "tokens")
        if cls_BD is None:
            return {"patch": vectors}, prototypes_KE
        cls_B1E, patch_BVE = jax.lax.split(vectors, (1, vectors.shape[1] - 1), axis=1)
        return {"patch": patch_BVE, "cls": cls_B1E}, prototypes_KE

    def _cells(self, label_B: jax.Array) -> dict[str, jax.Array]:
        """For each kind of token, the row of its center's table: int32 [B, N] and [B, 1]."""
        tokens, by_condition = self.network.model.tokens, self.config.centering == "condition"
        position_BN = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (label_B.shape[0], tokens))
        cells = {"patch": position_BN}
        if self.network.model.cls_token:
            cells["cls"] = label_B[:, None]
        return cells if by_condition else jax.tree.map(jnp.zeros_like, cells)

    def _temperature(self, state: Any, kind: str, step: jax.Array) -> jax.Array:
        c = self.config
        first, last = c.teacher_temperature
        temperature = schedules.linear(step, first, last, c.teacher_temperature_warmup * self.context.steps)
        return temperature * jnp.sqrt(state["variance"][kind] + VARIANCE_FLOOR) if c.standardise else temperature


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

"""The discriminative objective: the student predicts how the EMA teacher assigns its tokens to prototypes.

Student and teacher see two points of one trajectory of the probability-flow ODE: the student the visible tokens of
x_S = x0 + sigma_S * eps, the teacher all tokens of x_T = x0 + sigma_min * eps. The teacher assigns each of its tokens
softly to K prototypes, and the student's token at the same position predicts the assignment (SD-DiT, Zhu et al. 2024;
iBOT, Zhou et al. 2022).
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
    """The discrimination: the student predicts which prototypes the teacher assigns its visible tokens and [CLS] to."""

    weight: float = setting(
        0.1, "C", "weight in the loss; if it is 0 at every step, there is no teacher and no head", least=0
    )
    prototypes: int = setting(
        8192, "I", "number of prototypes, K, to which student and teacher assign each token by a softmax", least=2
    )
    head_width: int = setting(
        2048, "I", "hidden width of the projection head, a three-layer MLP on each token", least=1
    )
    bottleneck: int = setting(
        256, "I", "width of the projection head's output, a vector of norm 1 that is compared with prototypes", least=1
    )
    student_temperature: float = setting(
        0.1, "I", "temperature of the student's softmax: logits, which are in [-1, 1], are divided by it", above=0
    )
    teacher_temperature: tuple[float, float] = setting(
        (0.04, 0.07),
        "I",
        "temperature of the teacher's softmax, first and last; a lower one gives sharper assignments",
        above=0,
    )
    teacher_temperature_warmup: float = setting(
        0.3, "I", "fraction of the run in which teacher_temperature goes from first to last, linearly", least=0, most=1
    )
    centering: str = setting(
        "mean",
        "S",
        "running mean that is subtracted from the teacher's logits: 'mean', one for patches and one for [CLS] "
        "(DINO), or 'condition', one for each position of a patch and one for each label of a [CLS]",
        choices=("mean", "condition"),
    )
    standardise: bool = setting(
        False, "C", "whether teacher_temperature is in running standard deviations of the centered logits"
    )
    center_momentum: float = setting(
        0.9, "I", "fraction of the running means, and of the running variance, that a step keeps", least=0, most=1
    )
    teacher: str = setting(
        "own",
        "C",
        "weights of the teacher: 'own', an EMA of encoder and head with teacher_momentum; 'ema', the encoder of the "
        "sampling EMA, and an EMA of the head with its decay",
        choices=("own", "ema"),
    )
    teacher_momentum: tuple[float, float] = setting(
        (0.996, 1.0),
        "C",
        "for teacher 'own': fraction of its weights that a step keeps, first and last, by a cosine over the run",
        least=0,
        most=1,
    )
    chunk: int = setting(
        16, "C", "token positions whose logits are in memory at one time; fewer take less device memory", least=1
    )


class Head(nn.Module):
    """The projection head of DINO and iBOT: a three-layer GELU MLP and K prototypes of unit norm.

    A LayerNorm comes first, since the encoder's blocks end without one.
    """

    width: int
    bottleneck: int
    prototypes: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [..., D] -> unit vectors [..., E] and prototypes [K, E], float32. Their products are the logits."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.truncated_normal(0.02))
        hidden = nn.gelu(dense(self.width, name="mlp_0")(layer_norm(tokens)), approximate=False)
        hidden = nn.gelu(dense(self.width, name="mlp_1")(hidden), approximate=False)
        out = dense(self.bottleneck, name="mlp_2")(hidden)
        bound = self.bottleneck**-0.5
        prototypes_KE = self.param(
            "prototypes",
            lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
            (self.prototypes, self.bottleneck),
        )
        return unit(out.astype(jnp.float32)), unit(prototypes_KE)


def unit(x: jax.Array) -> jax.Array:
    """x divided by its norm on the last axis. The norm is at least 1e-12, so that the gradient at 0 is finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


class Discrimination(Objective):
    """L_D = cross-entropy of the visible patch tokens + cross-entropy of [CLS].

    Its parameters are the head. Its state has

      teacher: the EMA of encoder and head; of the head alone if the encoder of the sampling EMA is the teacher's;
      center: for patches and for [CLS] a table [cells, K] of running means of the teacher's raw logits;
      variance: for patches and for [CLS] the running mean square of the centered logits.

    With `centering` "mean" a table has one cell. With "condition" it has a cell for each position (patches), or for
    each label and the null label ([CLS]). Position and label then tell nothing about the assignment: the student has to
    read it from the image. docs/discrimination.md compares the two.
    """

    name = "discrimination"
    Config = DiscriminationConfig

    @functools.cached_property
    def head(self) -> Head:
        """The projection head of student and teacher."""
        c = self.config
        return Head(c.head_width, c.bottleneck, c.prototypes, jnp.dtype(self.network.model.dtype))

    def init_params(self, key: jax.Array) -> Any:
        """The parameters of a fresh head."""
        m = self.network.model
        return self.head.init(key, jnp.zeros((1, m.tokens, m.width), m.dtype))["params"]

    def init_state(self, params: Any) -> dict[str, Any]:
        """The teacher is a copy of the student, centers are 0, variances those of products of random unit vectors."""
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
        """The sum of the two terms. Its gradient reaches the student's encoder and the head, not the teacher."""
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
        """One step of the running means, and one step of the teacher towards the student."""
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
        """The teacher's parameters: {"encoder": ..., "head": ...}. ema: the sampling EMA of the network."""
        return {"encoder": ema["encoder"], **state["teacher"]}

    def _taught(self, params: Any) -> dict[str, Any]:
        """The student's parameters that the teacher's EMA follows."""
        head = {"head": params[self.name]}
        return {"encoder": params["network"]["encoder"], **head} if self.config.teacher == "own" else head

    def flops(self, visible: int) -> dict[str, float]:
        """FLOPs of head, prototypes and teacher.

        The student's head and the prototypes see the visible tokens and [CLS]; the teacher's head sees all tokens.
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
        """teacher/{patch,cls}/information: how much the teacher's assignments tell about images, in nats.

        See `assignment_information`. label_B: the true labels of the images, int32.
        """
        label_B = jnp.minimum(label_B, self.network.null_label)
        teacher = self.teacher(state, ema)
        vectors, prototypes_KE = self._project(teacher["head"], self._encode(teacher, x0_BHWC, eps_BHWC, label_B))

        def information(kind: str, cell_BN: jax.Array) -> jax.Array:
            center_MK, temperature = state["center"][kind], self._temperature(state, kind, step)

            def at_position(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
                vectors_BE, cell_B = xs
                logits_BK = jnp.matmul(vectors_BE, prototypes_KE.T, precision=HIGHEST) - center_MK[cell_B]
                return assignment_information(jax.nn.softmax(logits_BK / temperature), label_B)

            return jax.lax.map(at_position, (vectors[kind].swapaxes(0, 1), cell_BN.T)).mean()

        cells = self._cells(label_B)
        return {f"teacher/{kind}/information": information(kind, cell_BN) for kind, cell_BN in cells.items()}

    def _encode(self, teacher: Any, x0_BHWC: jax.Array, eps_BHWC: jax.Array, label_B: jax.Array) -> Encoded:
        """The teacher's encoder on all tokens at the lowest noise level."""
        diffusion = self.context.diffusion
        sigma_B = jnp.full(x0_BHWC.shape[0], diffusion.sigma_min, jnp.float32)
        noised_BHWC = diffusion.noised(x0_BHWC, eps_BHWC, sigma_B)
        return self.network.encode(teacher, *diffusion.network_input(noised_BHWC, sigma_B), label_B)

    def _project(self, params: Any, encoded: Encoded) -> tuple[dict[str, jax.Array], jax.Array]:
        """The head in one pass: unit vectors of patches [B, N, E] and [CLS] [B, 1, E], and prototypes [K, E]."""
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
        """The row of each token in its table of centers: int32, [B, N] for patches and [B, 1] for [CLS]."""
        tokens = self.network.model.tokens
        cells = {"patch": jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (label_B.shape[0], tokens))}
        if self.network.model.cls_token:
            cells["cls"] = label_B[:, None]
        return cells if self.config.centering == "condition" else jax.tree.map(jnp.zeros_like, cells)

    def _temperature(self, state: Any, kind: str, step: jax.Array) -> jax.Array:
        c = self.config
        first, last = c.teacher_temperature
        temperature = schedules.linear(step, first, last, c.teacher_temperature_warmup * self.context.steps)
        return temperature * jnp.sqrt(state["variance"][kind] + VARIANCE_FLOOR) if c.standardise else temperature


def _mean_by_cell(vectors_BNE: jax.Array, cell_BN: jax.Array, cells: int) -> tuple[jax.Array, jax.Array]:
    """Sum of the vectors [M, E] and number of vectors [M] of each cell, both divided by B.

    Divided by B, the mean over microbatches is that of the batch. A cell is all tokens, a position, or a label. Written
    as products and means, since the order of scatter-adds is not fixed on every device.
    """
    if cells == 1:
        return vectors_BNE.mean(axis=(0, 1))[None], jnp.ones(1)
    if cells == vectors_BNE.shape[1]:
        return vectors_BNE.mean(axis=0), jnp.ones(cells)
    one_hot_BM = jax.nn.one_hot(cell_BN[:, 0], cells)
    sums_ME = jnp.matmul(one_hot_BM.T, vectors_BNE[:, 0], precision=HIGHEST)
    return sums_ME / len(cell_BN), one_hot_BM.mean(axis=0)

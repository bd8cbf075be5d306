"""The formulas of the losses: arrays in, float32 arrays out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def patch_mean(error_BHWC: jax.Array, patch: int) -> jax.Array:
    """The mean over the pixels and channels of each patch: [B, N], patches in raster order."""
    batch, height, width, channels = error_BHWC.shape
    grid = error_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return grid.mean(axis=(2, 4, 5)).reshape(batch, -1)


def denoising_error(denoised_BHWC: jax.Array, x0_BHWC: jax.Array, weight_B: jax.Array) -> jax.Array:
    """EDM's weighted squared error: [B, H, W, C] (Karras et al. 2022, Eq. 2 and Table 1)."""
    return weight_B[:, None, None, None] * jnp.square(denoised_BHWC - x0_BHWC)


def reconstruction_error(prediction_BNP: jax.Array, target_BNP: jax.Array) -> jax.Array:
    """Mean squared error to target patches, each normalised by its own mean and unbiased variance: [B, N].

    With noisy images as targets this is the auxiliary loss of MaskDiT (Zheng et al. 2023), with clean ones MAE's loss.
    """
    variance = target_BNP.var(axis=-1, ddof=1, keepdims=True)
    normalised = (target_BNP - target_BNP.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(variance + 1e-6)
    return jnp.square(prediction_BNP - normalised).mean(axis=-1)


def entropy(p: jax.Array) -> jax.Array:
    """-sum p ln p over the last axis, in nats, where 0 ln 0 = 0."""
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)


class Assignments(NamedTuple):
    """Statistics of the teacher's assignments: means over images and tokens."""

    entropy: jax.Array  # of an assignment, in nats
    mean_K: jax.Array  # the mean assignment
    variance: jax.Array  # mean square of the centered logits
    agreement: jax.Array  # fraction of tokens for which teacher and student have the same most likely prototype


def assignment_information(p_BK: jax.Array, label_B: jax.Array) -> jax.Array:
    """The mutual information of image and prototype given the label, in nats.

    I = H(mean assignment of the label) - mean H(assignment), averaged over the images whose label comes at least twice.
    p_BK: assignments p(k | image). With n images of a label, I is at most ln n, so few images give too low a value. NaN
    if no label comes twice.
    """
    same_BB = (label_B[:, None] == label_B[None]).astype(jnp.float32)
    count_B = same_BB.sum(axis=1)
    mean_BK = jnp.matmul(same_BB, p_BK, precision=HIGHEST) / count_B[:, None]
    shared_B = count_B > 1
    return jnp.where(shared_B, entropy(mean_BK) - entropy(p_BK), 0.0).sum() / shared_B.sum()


def prototype_cross_entropy(
    student_BVE: jax.Array,
    student_prototypes_KE: jax.Array,
    teacher_BVE: jax.Array,
    teacher_prototypes_KE: jax.Array,
    center_MK: jax.Array,
    cell_BV: jax.Array,
    student_temperature: jax.Array | float,
    teacher_temperature: jax.Array | float,
    chunk: int,
) -> tuple[jax.Array, Assignments]:
    """The mean of -sum_k P_T log P_S over images and tokens, and statistics of the teacher's assignments P_T.

    P_T = softmax((z_T - center) / teacher_temperature) and P_S = softmax(z_S / student_temperature), where the logits z
    are products of vectors [B, V, E] and prototypes [K, E] (DINO, Caron et al. 2021, Eq. 2; iBOT, Zhou et al. 2022,
    Eq. 2). The center of a token is row `cell_BV` (int32) of `center_MK`. No gradient flows to the teacher's arguments.

    Logits are computed for `chunk` token positions at a time, in the backward pass too: for 204 visible tokens of 256
    images and 8192 prototypes, those of student and teacher would be two arrays of 1.7 GB.
    """
    batch, tokens, _ = student_BVE.shape
    chunk = min(chunk, tokens)
    padding = -tokens % chunk

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(student_BCE: jax.Array, teacher_BCE: jax.Array, cell_BC: jax.Array, valid_C: jax.Array) -> tuple:
        s_BCK = jnp.matmul(student_BCE, student_prototypes_KE.T, precision=HIGHEST) / student_temperature
        t_BCK = jnp.matmul(teacher_BCE, teacher_prototypes_KE.T, precision=HIGHEST)
        t_BCK -= center_MK[cell_BC] if center_MK.shape[0] > 1 else center_MK[None]
        t_BCK = jax.lax.stop_gradient(t_BCK)
        p_BCK = jax.nn.softmax(t_BCK / teacher_temperature)
        of_tokens = (
            jax.nn.logsumexp(s_BCK, axis=-1) - (p_BCK * s_BCK).sum(axis=-1),
            entropy(p_BCK),
            jnp.square(t_BCK).mean(axis=-1),
            s_BCK.argmax(axis=-1) == p_BCK.argmax(axis=-1),
        )
        return (p_BCK * valid_C[None, :, None]).sum(axis=(0, 1)), *((x * valid_C[None]).sum() for x in of_tokens)

    def body(sums: tuple, xs: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, one(*xs)), None

    valid = (jnp.arange(tokens + padding) < tokens).astype(jnp.float32).reshape(-1, chunk)
    zeros = (jnp.zeros(center_MK.shape[1]), *(jnp.zeros(()) for _ in range(4)))
    sums, _ = jax.lax.scan(body, zeros, (chunks(student_BVE), chunks(teacher_BVE), chunks(cell_BV), valid))
    mean_K, loss, teacher_entropy, variance, agreement = (x / (batch * tokens) for x in sums)
    return loss, Assignments(teacher_entropy, mean_K, variance, agreement)

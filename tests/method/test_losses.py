import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax, xlogy

from sddit_jax.method.diffusion import EDM
from sddit_jax.method.losses import (
    assignment_information,
    denoising_error,
    entropy,
    patch_mean,
    prototype_cross_entropy,
    reconstruction_error,
)
from sddit_jax.method.objectives.base import Context, Views
from sddit_jax.method.objectives.denoising import Denoising, DenoisingConfig
from sddit_jax.models.masking import sample_mask
from sddit_jax.models.transformer import ModelConfig, Network

B, V, E, K = 3, 7, 5, 11
STUDENT_T, TEACHER_T = 0.1, 0.05


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def vectors():
    """Student's tokens and prototypes, teacher's tokens and prototypes."""
    return [unit(normal(seed, *shape, E)) for seed, shape in enumerate([(B, V), (K,), (B, V), (K,)])]


def cells(kind):
    """A table of centers and each token's row: one for all, per position, or per image and position."""
    count = {"one": 1, "position": V, "token": B * V}[kind]
    cell_BV = np.broadcast_to(np.arange(B * V).reshape(B, V) % count, (B, V)).astype(np.int32)
    return jnp.asarray(0.3 * normal(9, count, K)), jnp.asarray(cell_BV)


def naive(student, student_prototypes, teacher, teacher_prototypes, center_MK, cell_BV):
    """The formulas in float64: the loss, P_T and the gradients for the student's arguments."""
    s, sk, t, tk = (np.asarray(x, np.float64) for x in (student, student_prototypes, teacher, teacher_prototypes))
    logits_S = s @ sk.T / STUDENT_T
    p_T = softmax((t @ tk.T - np.asarray(center_MK, np.float64)[cell_BV]) / TEACHER_T, axis=-1)
    loss = -(p_T * log_softmax(logits_S, axis=-1)).sum(-1).mean()
    slope = (softmax(logits_S, axis=-1) - p_T) / STUDENT_T / (B * V)
    return loss, p_T, logits_S, (slope @ sk, np.einsum("bvk,bve->ke", slope, s))


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
@pytest.mark.parametrize("kind", ["one", "position", "token"])
def test_prototype_cross_entropy(vectors, kind, chunk):
    table = cells(kind)

    @jax.jit
    def run(*vectors):
        def loss(*vectors):
            return prototype_cross_entropy(*vectors, *table, STUDENT_T, TEACHER_T, chunk)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*vectors)

    (loss, assignments), gradients = run(*vectors)
    expected, p_T, logits_S, expected_gradients = naive(*vectors, *table)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    for got, want in zip(gradients[:2], expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    assert not gradients[2].any()
    assert not gradients[3].any()
    np.testing.assert_allclose(assignments.entropy, -xlogy(p_T, p_T).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(assignments.mean_K, p_T.mean((0, 1)), rtol=2e-5, atol=1e-7)
    agreement = (logits_S.argmax(-1) == p_T.argmax(-1)).mean()
    np.testing.assert_allclose(assignments.agreement, agreement, rtol=1e-6)


def test_uniform_student_costs_ln_k(vectors):
    student = np.zeros_like(vectors[0])
    loss, _ = prototype_cross_entropy(student, *vectors[1:], *cells("one"), STUDENT_T, TEACHER_T, 4)
    np.testing.assert_allclose(loss, np.log(K), rtol=1e-6)


def wave(shape, a, b):
    return np.sin(a * np.arange(np.prod(shape)) + b).astype(np.float32).reshape(shape)


def logits_loss(student_BVK, teacher_BVK):
    """iBOT's loss at epoch 0 of logits, which identity prototypes make of vectors."""
    eye, cell_BV = np.eye(8, dtype=np.float32), np.zeros(student_BVK.shape[:2], np.int32)
    center_MK = np.zeros((1, 8), np.float32)
    return prototype_cross_entropy(student_BVK, eye, teacher_BVK, eye, center_MK, cell_BV, 0.1, 0.04, 16)[0]


def test_ibot_class_loss():
    student, teacher = wave((4, 1, 8), 0.7, 0.1), wave((4, 1, 8), 0.9, 0.4)
    # Rows are (crop, image); the teacher's crop is never the student's.
    loss = logits_loss(student[[2, 3, 0, 1]], teacher)
    np.testing.assert_allclose(loss, 14.0608892, rtol=1e-6)


def test_ibot_patch_loss():
    student, teacher = wave((4, 4, 8), 0.3, 0.2), wave((4, 4, 8), 0.5, 0.6)
    masked = [[0, 3], [0, 1], [], [0, 1, 2]]
    total = sum(logits_loss(student[b, None, m], teacher[b, None, m]) for b, m in enumerate(masked) if m)
    np.testing.assert_allclose(total / 4, 4.6339908, rtol=1e-6)


def test_entropy():
    p = jnp.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(entropy(p), [0, np.log(4), np.log(2)], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda p: entropy(p).sum())(p)).all()


def information(p, label):
    return float(assignment_information(jnp.asarray(p, jnp.float32), jnp.asarray(label)))


def test_information_of_assignments():
    label = np.repeat([0, 1], 4)
    of_label = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]])[label]
    assert abs(information(of_label, label)) < 1e-6
    one_hot = np.tile(np.eye(4), (2, 1))
    np.testing.assert_allclose(information(one_hot, label), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(information(0.5 * one_hot + 0.125, label), np.log(4) - 1.0735428, rtol=1e-5)
    # Two images per label cannot show more than ln 2, and a label that comes once shows nothing.
    np.testing.assert_allclose(information(one_hot, np.repeat(range(4), 2)), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(information(one_hot, [0, 0, 0, 0, 1, 2, 3, 4]), np.log(4), rtol=1e-6)
    assert np.isnan(information(one_hot, range(8)))


@given(st.integers(0, 10**6))
def test_information_is_between_zero_and_ln_k(seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(4, 0.3), 12)
    assert -1e-6 <= information(p, rng.integers(0, 3, 12)) <= np.log(4) + 1e-6


def test_reconstruction_error_by_hand():
    # Mean 2, unbiased variance 4, so normalised -1, 0, 1 (to within the 1e-6 added to the variance).
    target = jnp.array([[[0.0, 2.0, 4.0], [5.0, 5.0, 5.0]]])
    prediction = jnp.array([[[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]]])
    error = reconstruction_error(prediction, target)
    np.testing.assert_allclose(error, [[2 / 3, 14 / 3]], rtol=1e-6)


def test_reconstruction_error_ignores_shift_and_scale_of_the_target():
    target, prediction = normal(0, 2, 4, 16), normal(1, 2, 4, 16)
    normalised = (target - target.mean(-1, keepdims=True)) / target.std(-1, ddof=1, keepdims=True)
    expected = np.square(prediction - normalised).mean(-1)
    for t in (target, 5 * target - 3):
        np.testing.assert_allclose(reconstruction_error(prediction, jnp.asarray(t)), expected, rtol=1e-5)


def test_patch_mean():
    error = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    means = patch_mean(error, 2)
    expected = [[error[b, r : r + 2, c : c + 2].mean() for r in (0, 2) for c in (0, 2)] for b in range(2)]
    np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_denoising_loss_over_all_or_visible_patches():
    x0, denoised = normal(0, 3, 8, 8, 2), normal(1, 3, 8, 8, 2)
    sigma_B = jnp.array([0.1, 0.5, 2.0])
    mask = sample_mask(jax.random.key(0), 3, 16, 0.3)
    views = Views(
        x0_BHWC=x0,
        eps_BHWC=None,
        sigma_B=sigma_B,
        label_B=None,
        mask=mask,
        features={},
        noised_BHWC=None,
        encoded=None,
        denoised_BHWC=denoised,
    )
    weight = np.array([0.26 / 0.0025, 8, 4.25])
    error = weight[:, None, None, None] * np.square(denoised - x0, dtype=np.float64)
    np.testing.assert_allclose(denoising_error(denoised, x0, EDM().weight(sigma_B)), error, rtol=1e-5)
    by_patch = error.reshape(3, 4, 2, 4, 2, 2).mean((2, 4, 5)).reshape(3, 16)
    network = Network(ModelConfig(image_size=8, channels=2, width=4, heads=1, decoder_width=4, decoder_heads=1))
    for scope, expected in [
        ("all", error.mean()),
        ("visible", np.mean([by_patch[b, mask.visible_BV[b]].mean() for b in range(3)])),
    ]:
        objective = Denoising(DenoisingConfig(scope=scope), Context(network, EDM(), steps=1, ema_decay=None))
        loss, metrics, _ = objective.loss({}, {}, {}, views, jnp.int32(0))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        assert metrics == {"train/denoising": loss}

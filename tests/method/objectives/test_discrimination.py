"""The discrimination objective against its formulas, computed in float64 from the network's outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax, xlogy
from tiny import (
    CONDITION,
    assert_close,
    assert_same_bits,
    draw_batch,
    float64,
    jit,
    make_batch,
    make_views,
    noise,
    noised_state,
    tiny_parts,
)

from sddit_jax.method.train_step import accumulated_gradients_of, make_train_step

MEAN = {"objectives.discrimination.centering": "mean", "objectives.discrimination.standardise": False}
EMA_TEACHER = {"objectives.discrimination.teacher": "ema"}
VARIANTS = {
    "mean": MEAN,
    "condition": MEAN | {"objectives.discrimination.centering": "condition"},
    "standardise": MEAN | {"objectives.discrimination.standardise": True},
    "condition, standardise, ema": CONDITION | EMA_TEACHER,
}


class Case:
    """One variant's objective on one drawn batch, and what its networks give."""

    def __init__(self, changes):
        self.parts = tiny_parts("sd_dit", changes)
        self.objective = next(o for o in self.parts.objectives if o.name == "discrimination")
        self.config = self.objective.config
        self.state = noised_state(self.parts)
        self.aux = self.state["aux"]["discrimination"]
        # Variances that are neither equal nor those at the start.
        self.aux["variance"] = {"patch": jnp.asarray(4.0), "cls": jnp.asarray(2.0)}
        self.views = make_views(self.parts, self.state["params"])
        self.loss = jit(
            lambda step: self.objective.loss(
                self.state["params"], self.aux, self.state["ema"]["default"], self.views, step
            )
        )

    @functools.cached_property
    def outputs(self):
        """Raw logits in float64: student's, and teacher's of all tokens, for patch and cls."""
        network, views, head = self.parts.network, self.views, self.objective.head
        teacher = {"encoder": self.state["ema"]["default"]["encoder"], **self.aux["teacher"]}
        own = self.state["params"]["discrimination"]
        sigma = 0.002
        x_T = (views.x0_BHWC + sigma * views.eps_BHWC) / np.sqrt(sigma**2 + 0.5**2)

        @jit
        def project(x_T):
            encoded = network.encode(teacher, x_T, jnp.full(len(x_T), np.log(sigma) / 4), views.label_B)
            tokens = {"patch": encoded.tokens_BVD, "cls": encoded.cls_BD[:, None]}
            student = {"patch": views.encoded.tokens_BVD, "cls": views.encoded.cls_BD[:, None]}
            return {
                kind: (
                    head.apply({"params": own}, student[kind]),
                    head.apply({"params": teacher["head"]}, tokens[kind]),
                )
                for kind in tokens
            }

        logits = {}
        for kind, pairs in project(x_T).items():
            logits[kind] = [np.asarray(e, np.float64) @ np.asarray(k, np.float64).T for e, k in pairs]
        return logits

    def cells(self, kind):
        """Each teacher token's row of the table of centers: [B, tokens]."""
        label_B, tokens = np.asarray(self.views.label_B), self.outputs[kind][1].shape[1]
        if self.config.centering == "mean":
            return np.zeros((len(label_B), tokens), int)
        return np.broadcast_to(np.arange(tokens), (len(label_B), tokens)) if kind == "patch" else label_B[:, None]

    def temperature(self, kind, step):
        """0.04 rising to 0.07 in the first 30 of the 100 steps."""
        temperature = 0.04 + 0.03 * min(step / 30, 1.0)
        return (
            temperature * np.sqrt(float(self.aux["variance"][kind]) + 1e-6) if self.config.standardise else temperature
        )

    def terms(self, kind, step):
        """The cross-entropy, the teacher's assignments and centered logits, all of visible tokens."""
        student, teacher = self.outputs[kind]
        centered = teacher - np.asarray(self.aux["center"][kind], np.float64)[self.cells(kind)]
        if kind == "patch":
            centered = np.take_along_axis(centered, np.asarray(self.views.mask.visible_BV)[:, :, None], axis=1)
        p_T = softmax(centered / self.temperature(kind, step), axis=-1)
        cross_entropy = -(p_T * log_softmax(student / 0.1, axis=-1)).sum(-1).mean()
        return cross_entropy, p_T, centered


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    return Case(VARIANTS[request.param])


@pytest.fixture(scope="module")
def by_condition():
    return Case(CONDITION)


@pytest.mark.parametrize("step", [0, 15, 60])
def test_loss_is_the_sum_of_the_cross_entropies_of_visible_tokens_and_cls(case, step):
    loss, metrics, _ = case.loss(step)
    expected = {kind: case.terms(kind, step) for kind in ("patch", "cls")}
    assert case.outputs["patch"][0].shape[1] == 12  # visible of 16
    for kind, (cross_entropy, p_T, _) in expected.items():
        np.testing.assert_allclose(metrics[f"train/discrimination/{kind}"], cross_entropy, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"teacher/{kind}/entropy"], -xlogy(p_T, p_T).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(loss, expected["patch"][0] + expected["cls"][0], rtol=1e-5)


def test_teacher_sees_all_tokens_at_sigma_min_with_the_students_noise_and_label(monkeypatch):
    case = Case(MEAN)
    views, encode, calls = case.views, case.parts.network.encode, []
    monkeypatch.setattr(case.parts.network, "encode", lambda *inputs: calls.append(inputs) or encode(*inputs))
    inputs = jit(lambda: (case.loss.__wrapped__(jnp.asarray(0)), calls[0][1:]))()[1]
    assert len(calls) == 1
    assert len(inputs) == 3  # no mask
    x_BHWC, c_noise_B, label_B = inputs
    x_T = np.asarray(views.x0_BHWC, np.float64) + 0.002 * np.asarray(views.eps_BHWC, np.float64)
    np.testing.assert_allclose(x_BHWC, x_T / np.sqrt(0.002**2 + 0.25), rtol=0, atol=1e-6)
    np.testing.assert_allclose(c_noise_B, np.log(0.002) / 4, rtol=1e-6)
    np.testing.assert_array_equal(label_B, views.label_B)
    dropped = np.asarray(label_B) == case.parts.network.null_label
    assert dropped.any()
    assert not dropped.all()
    np.testing.assert_allclose(
        views.noised_BHWC,
        views.x0_BHWC + np.asarray(views.sigma_B)[:, None, None, None] * views.eps_BHWC,
        rtol=1e-5,
        atol=1e-6,
    )


def test_update_moves_centers_and_variances_by_their_momentum(case):
    """Centers: raw logits of all teacher tokens, visible or not. Variances: centered logits of the tokens compared."""
    _, _, statistics = case.loss(0)
    new, metrics = case.objective.update(case.aux, statistics, case.state["params"], jnp.asarray(0))
    for kind in ("patch", "cls"):
        _, p_T, centered = case.terms(kind, 0)
        logits, cells = case.outputs[kind][1], case.cells(kind)
        expected = np.asarray(case.aux["center"][kind], np.float64)
        for cell in np.unique(cells):
            expected[cell] = 0.9 * expected[cell] + 0.1 * logits[cells == cell].mean(axis=0)
        np.testing.assert_allclose(new["center"][kind], expected, rtol=1e-5, atol=1e-6)
        variance = 0.9 * float(case.aux["variance"][kind]) + 0.1 * np.square(centered).mean()
        np.testing.assert_allclose(new["variance"][kind], variance, rtol=1e-5)
        mean_K = p_T.mean(axis=(0, 1))
        np.testing.assert_allclose(metrics[f"teacher/{kind}/mean_entropy"], -xlogy(mean_K, mean_K).sum(), rtol=1e-4)


def test_center_of_a_label_that_is_not_in_the_batch_stays(by_condition):
    case, num_classes = by_condition, by_condition.parts.network.model.num_classes
    label_B = jnp.where(case.views.label_B == 1, num_classes, case.views.label_B)
    views = case.views.replace(label_B=label_B)
    _, _, statistics = jit(case.objective.loss)(
        case.state["params"], case.aux, case.state["ema"]["default"], views, jnp.asarray(0)
    )
    new, _ = case.objective.update(case.aux, statistics, case.state["params"], jnp.asarray(0))
    before, after = (np.asarray(aux["center"]["cls"]) for aux in (case.aux, new))
    assert before.shape == (num_classes + 1, case.config.prototypes)
    unseen = [label for label in range(num_classes + 1) if label not in np.asarray(label_B)]
    assert 1 in unseen
    for label in range(num_classes + 1):
        assert np.array_equal(before[label], after[label]) == (label in unseen)


@pytest.mark.parametrize("step", [0, 3, 50, 99, 100])
def test_own_teacher_follows_the_student_by_the_cosine_momentum(by_condition, step):
    case = by_condition
    momentum = 1.0 + (0.996 - 1.0) * 0.5 * (1 + np.cos(np.pi * step / 100))
    params = noise(case.state["params"], 20)
    new, metrics = case.objective.update(case.aux, case.loss(0)[2], params, jnp.asarray(step))
    np.testing.assert_allclose(metrics["teacher/momentum"], momentum, rtol=1e-6)
    assert set(new["teacher"]) == {"encoder", "head"}
    students = {"encoder": params["network"]["encoder"], "head": params["discrimination"]}
    expected = jax.tree.map(
        lambda t, s: momentum * np.float64(t) + (1 - momentum) * np.float64(s), case.aux["teacher"], students
    )
    assert_close(new["teacher"], expected, 1e-6)


def test_a_teacher_that_reads_the_sampling_ema_keeps_an_average_of_the_head_alone(case):
    if case.config.teacher == "ema":
        assert set(case.aux["teacher"]) == {"head"}
        new, metrics = case.objective.update(case.aux, case.loss(0)[2], case.state["params"], jnp.asarray(50))
        decay = 51 / 60  # the sampling EMA's law
        expected = jax.tree.map(
            lambda t, s: decay * np.float64(t) + (1 - decay) * np.float64(s),
            case.aux["teacher"]["head"],
            case.state["params"]["discrimination"],
        )
        assert_close(new["teacher"], {"head": expected}, 1e-6)
        assert "teacher/momentum" not in metrics
    else:
        assert set(case.aux["teacher"]) == {"encoder", "head"}


@pytest.mark.slow
def test_microbatches_change_no_loss_gradient_or_statistic():
    """The centers stay while a batch's parts are computed, and the statistics are those of the whole batch."""
    with float64():
        parts = tiny_parts("sd_dit", CONDITION)
        state, drawn = noised_state(parts), draw_batch(parts)
        whole, split = (
            jit(functools.partial(accumulated_gradients_of, parts, microbatches=count))(state, drawn)
            for count in (1, 4)
        )
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(whole))
        assert_close(split, whole, 1e-12)


@pytest.mark.parametrize("centering", [MEAN, CONDITION])
@pytest.mark.slow
def test_one_step_with_microbatches_is_one_update_of_centers_and_teacher(centering):
    with float64():
        states = []
        for count in (1, 2, 4):
            parts = tiny_parts("sd_dit", centering | {"parallel.microbatches": count, "optimizer.name": "sgd"})
            states.append(jit(make_train_step(parts))(noised_state(parts), make_batch(parts))[0])
        for state in states[1:]:
            assert_close(state, states[0], 1e-12)


def information_by_hand(p_BK, label_B):
    """H(mean assignment of the label) - mean H(assignment), averaged over images that share a label."""
    terms = []
    for label in label_B:
        same = p_BK[label_B == label]
        if len(same) > 1:
            mean_K = same.mean(axis=0)
            terms.append(-xlogy(mean_K, mean_K).sum() + xlogy(same, same).sum(-1).mean())
    return np.mean(terms)


def diagnose(case, aux):
    views = case.views
    return jit(case.objective.diagnose)(
        aux, case.state["ema"]["default"], views.x0_BHWC, views.eps_BHWC, views.label_B, jnp.asarray(15)
    )


def test_diagnosis_is_the_information_of_the_assignments(case):
    metrics = diagnose(case, case.aux)
    label_B = np.asarray(case.views.label_B)
    for kind in ("patch", "cls"):
        logits = case.outputs[kind][1] - np.asarray(case.aux["center"][kind], np.float64)[case.cells(kind)]
        p_BNK = softmax(logits / case.temperature(kind, 15), axis=-1)
        expected = np.mean([information_by_hand(p_BNK[:, n], label_B) for n in range(p_BNK.shape[1])])
        assert expected > 0.005
        np.testing.assert_allclose(metrics[f"teacher/{kind}/information"], expected, rtol=1e-3)


def test_a_teacher_that_ignores_the_image_has_no_information(by_condition):
    case = by_condition
    last = case.aux["teacher"]["head"]["mlp_2"]
    blind = case.aux["teacher"]["head"] | {"mlp_2": last | {"kernel": jnp.zeros_like(last["kernel"])}}
    metrics = diagnose(case, case.aux | {"teacher": case.aux["teacher"] | {"head": blind}})
    for kind in ("patch", "cls"):
        np.testing.assert_allclose(metrics[f"teacher/{kind}/information"], 0.0, atol=1e-6)


def test_the_teacher_starts_as_a_copy_of_the_student_with_centers_of_zero(by_condition):
    case = by_condition
    aux, params = case.objective.init_state(case.state["params"]), case.state["params"]
    student = {"encoder": params["network"]["encoder"], "head": params["discrimination"]}
    assert_same_bits(aux["teacher"], student)
    for leaf, source in zip(jax.tree.leaves(aux["teacher"]), jax.tree.leaves(student), strict=True):
        assert leaf is not source
    assert not any(np.any(center) for center in aux["center"].values())
    assert {kind: center.shape[0] for kind, center in aux["center"].items()} == {"patch": 16, "cls": 5}

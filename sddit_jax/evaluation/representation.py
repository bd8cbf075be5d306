"""What the encoder knows of images: its features at any noise level, and how well they tell the classes apart.

The condition is always the null label: adaLN would put the label itself into the features.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sddit_jax.config.border import resolve
from sddit_jax.config.parts import make_parts
from sddit_jax.config.schema import Config
from sddit_jax.data.image_sources import Source
from sddit_jax.data.sources import held_out_split, open_source
from sddit_jax.errors import DataError, UserError
from sddit_jax.evaluation.diagnosis import discrimination_of
from sddit_jax.evaluation.metrics import linear_probe, neighbour_votes
from sddit_jax.method.codec import check_codec
from sddit_jax.method.state import Parts
from sddit_jax.parallel.rows import OverDevices
from sddit_jax.parallel.sharding import abstract_state, shardings
from sddit_jax.runs.folder import open_checkpoints, read_config, restore_run
from sddit_jax.runs.pictures import principal_pictures

log = logging.getLogger("sddit_jax")

# The encoders of a run, and where they are in its state; a teacher that is the EMA itself has no place of its own.
STATE_PATHS = {
    "ema": "ema/default/encoder",
    "params": "params/network/encoder",
    "teacher": "aux/discrimination/teacher/encoder",
}
WEIGHTS = tuple(STATE_PATHS)
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Features on the host at one time; more blocks than fit are computed in several passes.
FEATURE_BYTES = 4e9
# Of a dataset that is not split: every fifth image is for testing.
TEST_SHARE = 5
# The stream of random words that splits a dataset; the loader's are numbered by epochs.
SPLIT_STREAM = 2**63


def encode(
    parts: Parts,
    encoder: Any,
    batch: Mapping[str, jax.Array],
    index_B: jax.Array,
    key: jax.Array,
    sigma: jax.Array,
    blocks: Sequence[int],
) -> tuple[jax.Array | None, jax.Array]:
    """[CLS] [B, blocks, D], or None if the encoder has none, and patch tokens [B, blocks, N, D], float32, at sigma.

    encoder: its parameters. batch: stored images, or moments of latents, of which the means are used. blocks: whose
    outputs, the first block being 1. The noise of an image follows from `key` and its index.
    """
    m = parts.network.model
    x0_BHWC = parts.codec.expected(batch)
    eps_BHWC = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), x0_BHWC.shape[1:]))(index_B)
    sigma_B = jnp.full(len(x0_BHWC), sigma, jnp.float32)
    null_B = jnp.full(len(x0_BHWC), parts.network.null_label, jnp.int32)
    noised = parts.diffusion.noised(x0_BHWC, eps_BHWC, sigma_B)
    inputs = *parts.diffusion.network_input(noised, sigma_B), null_B
    if tuple(blocks) == (m.depth,):
        encoded = parts.network.encode({"encoder": encoder}, *inputs)
        tokens_BKND = encoded.tokens_BVD[:, None]
        cls_BKD = encoded.cls_BD[:, None] if m.cls_token else None
    else:
        tapped = parts.network.encode({"encoder": encoder}, *inputs, taps=tuple(blocks)).tapped
        tapped_BKND = jnp.stack([tapped[block] for block in blocks], axis=1)
        tokens_BKND = tapped_BKND[:, :, 1:] if m.cls_token else tapped_BKND
        cls_BKD = tapped_BKND[:, :, 0] if m.cls_token else None
    return None if cls_BKD is None else cls_BKD.astype(jnp.float32), tokens_BKND.astype(jnp.float32)


def pooled(cls_BKD: jax.Array | None, tokens_BKND: jax.Array) -> dict[str, jax.Array]:
    """A vector for each image and block: [CLS], if there is one, and the mean of the patch tokens: [B, blocks, D]."""
    features = {"mean": tokens_BKND.mean(axis=2)}
    return features if cls_BKD is None else {"cls": cls_BKD} | features


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Stored images with labels and numbers, on the host.

    batch: {image: uint8 [n, H, W, C]} or {moments: float16 [n, 2, H, W, C]}. index_n: their numbers in the source,
    which their noise follows from. stream: that of the noise, another for each source and split.
    """

    batch: dict[str, np.ndarray]
    label_n: np.ndarray
    index_n: np.ndarray
    stream: int

    def keep(self, rows: np.ndarray | slice) -> "LabelledImages":
        """The images of some rows."""
        batch = {name: x[rows] for name, x in self.batch.items()}
        return LabelledImages(batch, self.label_n[rows], self.index_n[rows], self.stream)


class FeatureExtractor:
    """Computes features of any number of images, in batches that are split over all devices; on every host.

    batch_size: images of one device at a time.
    """

    def __init__(self, parts: Parts, mesh: Mesh, seed: int, batch_size: int = 32) -> None:
        self.parts, self.mesh, self.seed = parts, mesh, seed
        self._batch_size = batch_size * mesh.size
        self._compiled = functools.cache(self._program)

    def pooled(
        self, encoder: Any, images: LabelledImages, sigma: float, blocks: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """{cls, mean}, of each [n, blocks, D] float32; see `pooled`."""
        return self._map(pooled, encoder, images, sigma, blocks)

    def patches(self, encoder: Any, images: LabelledImages, sigma: float, block: int) -> np.ndarray:
        """The patch tokens of a block, [n, N, D] float32."""
        _, tokens_n1ND = self._map(_unpooled, encoder, images, sigma, (block,))
        return tokens_n1ND[:, 0]

    def _map(
        self, kind: Callable[..., Any], encoder: Any, images: LabelledImages, sigma: float, blocks: Sequence[int]
    ) -> Any:
        key = jax.random.fold_in(jax.random.key(self.seed), images.stream)
        rows = images.batch, images.index_n.astype(np.int32)
        return self._compiled(kind, tuple(blocks)).map((encoder, key, np.float32(sigma)), rows)

    def _program(self, kind: Callable[..., Any], blocks: tuple[int, ...]) -> OverDevices:
        def features(encoder: Any, key: Any, sigma: Any, batch: Any, index_B: Any) -> Any:
            return kind(*encode(self.parts, encoder, batch, index_B, key, sigma, blocks))

        return OverDevices(features, self.mesh, self._batch_size)


def _unpooled(cls_BKD: jax.Array | None, tokens_BKND: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    return cls_BKD, tokens_BKND


def load_encoders(
    workdir: Path, mesh: Mesh, weights: Sequence[str] = (), step: int | None = None
) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """The configuration of a run, encoders by their names (see `WEIGHTS`), and the record of the checkpoint.

    weights: empty for the EMA, and the teacher if the run has one of its own. The EMA alone is read without the rest
    of the state. Raises UserError for a teacher that the run does not have, and CheckpointError.
    """
    parts = make_parts(read_config(workdir))
    objective = discrimination_of(parts)
    own_teacher = objective is not None and objective.config.teacher == "own"
    if not weights:
        weights = ("ema", "teacher") if own_teacher else ("ema",)
    if "teacher" in weights and not own_teacher:
        raise UserError(f"{workdir} has no teacher of its own; choose ema or params")
    if set(weights) == {"ema"}:
        abstract = abstract_state(parts, mesh)["ema"]
        ema, meta = open_checkpoints(workdir).restore_ema(abstract, step)
        return resolve(meta["config"]), {"ema": ema["default"]["encoder"]}, meta
    config, state, meta = restore_run(workdir, mesh, step)
    found = {"ema": state["ema"]["default"], "params": state["params"]["network"]}
    if own_teacher:
        found["teacher"] = state["aux"][objective.name]["teacher"]
    return config, {name: found[name]["encoder"] for name in weights}, meta


def untrained_encoder(parts: Parts, mesh: Mesh) -> Any:
    """The encoder that the run's network starts from, drawn with the run's seed."""

    def init(key: jax.Array) -> Any:
        return parts.network.init(key)["encoder"]

    layout = shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=layout)(jax.random.key(parts.seed))


def load_images(
    config: Config,
    codec: Mapping[str, Any],
    *,
    source: str = "",
    split: str = "",
    test_source: str = "",
    test_split: str = "",
    num_train: int = 50_000,
    num_test: int = 10_000,
    seed: int = 0,
) -> tuple[LabelledImages, LabelledImages, dict[str, Any]]:
    """Images to fit a probe and images to test it, and the record of both.

    The training images are of `source` and `split`, or of the run's if they are empty. The test images are of
    `test_source` and `test_split`; if these are empty, of a split that the source comes with (see `held_out_split`);
    and if it has none, a random fifth of the same images. At most `num_train` and `num_test`, random ones. An image
    that comes twice, such as in place of one that cannot be read, is used once.

    codec: that of the run's data. Raises DataError if the data has no labels or is not what the network takes.
    """
    spec = source or config.data.source
    split = split or ("train" if source else config.data.split)
    train = _open(spec, split, config, codec)
    if not test_split:
        test_split = "train" if test_source else held_out_split(spec, split) or ""
    order_N = _shuffled(len(train), seed)
    if test_split == split and (test_source or spec) == spec:
        raise DataError(f"{train.name} is to fit a probe and to test it; leave the split of one of them out")
    if test_split:
        test = _open(test_source or spec, test_split, config, codec)
        if test.class_names != train.class_names:
            raise DataError(f"{test.name} and {train.name} have different classes")
        parts = {"train": (train, order_N), "test": (test, _shuffled(len(test), seed))}
        rule = "split of its own"
    else:
        tested = len(train) // TEST_SHARE
        parts = {"train": (train, order_N[tested:]), "test": (train, order_N[:tested])}
        rule = f"a random 1/{TEST_SHARE} of the images, drawn with the seed, that the probe does not see"
    record: dict[str, Any] = {"rule_of_test": rule, "seed": seed, "classes": train.num_classes}
    images, seen = {}, np.zeros(0, np.int64)
    for stream, (name, most) in enumerate((("train", num_train), ("test", num_test))):
        opened, index_n = parts[name]
        read, number_n = _read(opened, index_n[:most], stream, config.data.num_threads)
        once = np.zeros(len(number_n), bool)
        once[np.unique(number_n, return_index=True)[1]] = True
        if not test_split:
            once &= ~np.isin(number_n, seen)
            seen = number_n
        if not once.any():
            raise DataError(f"{opened.name}: no images for the {name} part of a probe; there are {len(opened)}")
        images[name] = read.keep(once)
        record[name] = {
            "source": opened.name,
            "count": int(once.sum()),
            "of": len(opened),
            "sha256_of_indices": hashlib.sha256(images[name].index_n.astype("<i8").tobytes()).hexdigest(),
        }
    return images["train"], images["test"], record


def _open(spec: str, split: str, config: Config, codec: Mapping[str, Any]) -> Source:
    m = config.model
    source = open_source(spec, split=split, image_size=m.image_size, channels=m.channels, download=config.data.download)
    check_codec("the network", codec, source.name, source.codec or {"name": "pixels"})
    if source.num_classes < 2:
        raise DataError(f"{source.name} has {source.num_classes} classes; a probe needs at least 2")
    return source


def _shuffled(count: int, seed: int) -> np.ndarray:
    """0, ..., count - 1 in random order; Philox's words are the same in every version of NumPy."""
    words = np.random.Philox(key=np.array([seed, SPLIT_STREAM], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


def _read(source: Source, index_n: np.ndarray, stream: int, num_threads: int) -> tuple[LabelledImages, np.ndarray]:
    """These images, and the numbers of those that were read in fact."""
    chunks = [index_n[i : i + 256] for i in range(0, len(index_n), 256)] or [index_n]
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(lambda index_b: source.read(index_b, np.zeros(len(index_b), bool)), chunks))
    read = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    label_n, number_n = read.pop("label"), read.pop("index")
    return LabelledImages(read, label_n, index_n, stream), number_n


def chance(train: LabelledImages, test: LabelledImages) -> float:
    """The accuracy of always naming the most frequent class of the training images."""
    return float((test.label_n == np.bincount(train.label_n).argmax()).mean())


def probe(
    features: FeatureExtractor,
    encoders: Mapping[str, Any],
    untrained: Any,
    train: LabelledImages,
    test: LabelledImages,
    sigmas: Sequence[float],
    blocks: Sequence[int],
) -> list[dict[str, Any]]:
    """Accuracies on the test images: a row for each of encoders, sigmas, blocks and features (see `pooled`).

    knn, linear: see `neighbour_votes` and `linear_probe`. knn_untrained, linear_untrained: the same of the untrained
    encoder, all of whose blocks give the same, since adaLN-Zero makes them the identity; for the same reason its [CLS]
    is the same for every image, and tells nothing.
    """
    rows = []
    for sigma in sigmas:
        fresh = _accuracies(features, untrained, train, test, sigma, [features.parts.network.model.depth])
        fresh_of = {row["feature"]: {f"{key}_untrained": row[key] for key in ("knn", "linear")} for row in fresh}
        for name, encoder in encoders.items():
            found = _accuracies(features, encoder, train, test, sigma, blocks)
            rows += [{"weights": name, **row, **fresh_of[row["feature"]]} for row in found]
            log.info("probed %s at sigma %g", name, sigma)
    return sorted(rows, key=lambda row: list(encoders).index(row["weights"]))


def _accuracies(
    features: FeatureExtractor,
    encoder: Any,
    train: LabelledImages,
    test: LabelledImages,
    sigma: float,
    blocks: Sequence[int],
) -> list[dict[str, Any]]:
    width = features.parts.network.model.width
    at_a_time = max(1, int(FEATURE_BYTES / (8 * width * (len(train.index_n) + len(test.index_n)))))
    rows = []
    for start in range(0, len(blocks), at_a_time):
        group = blocks[start : start + at_a_time]
        known, asked = (features.pooled(encoder, images, sigma, group) for images in (train, test))
        for i, block in enumerate(group):
            for kind in known:
                x_ND, y_MD = known[kind][:, i], asked[kind][:, i]
                classes = int(max(train.label_n.max(), test.label_n.max())) + 1
                votes = neighbour_votes(x_ND, train.label_n, y_MD, classes, NEIGHBOURS, TEMPERATURE)
                predicted, l2 = linear_probe(x_ND, train.label_n, y_MD)
                rows.append(
                    {
                        "sigma": sigma,
                        "block": block,
                        "feature": kind,
                        "knn": float((votes.argmax(axis=1) == test.label_n).mean()),
                        "linear": float((predicted == test.label_n).mean()),
                        "linear_l2": l2,
                    }
                )
    return rows


def probe_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of `probe` as lines to read."""
    lines = [
        f"{'weights':<8} {'sigma':>7} {'block':>5}  {'feature':<7} "
        f"{'k-NN':>6} {'untrained':>9} {'linear':>7} {'untrained':>9}"
    ]
    for row in rows:
        feature = {"cls": "[CLS]", "mean": "patches"}[row["feature"]]
        lines.append(
            f"{row['weights']:<8} {row['sigma']:>7g} {row['block']:>5}  {feature:<7} {row['knn']:>6.1%} "
            f"{row['knn_untrained']:>9.1%} {row['linear']:>7.1%} {row['linear_untrained']:>9.1%}"
        )
    return lines


def principal_rows(
    features: FeatureExtractor,
    encoders: Mapping[str, Any],
    images: LabelledImages,
    sigmas: Sequence[float],
    block: int,
    size: int,
) -> np.ndarray:
    """`principal_pictures` of the patch tokens, n for each sigma and encoder: uint8 [rows * n, size, size, 3]."""
    return np.concatenate(
        [
            principal_pictures(features.patches(encoder, images, sigma, block), size)
            for sigma in sigmas
            for encoder in encoders.values()
        ]
    )

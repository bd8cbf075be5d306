"""Probes of the encoder: its features at any noise level, and how well classifiers of these features do.

The condition is always the null label: adaLN would put the label itself into the features.
"""

import dataclasses
import functools
import hashlib
import logging
import operator
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
from sddit_jax.data.loader import random_words
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

# The encoders of a run, and their places in its state. A teacher that is the EMA has no place of its own.
STATE_PATHS = {
    "ema": "ema/default/encoder",
    "params": "params/network/encoder",
    "teacher": "aux/discrimination/teacher/encoder",
}
WEIGHTS = tuple(STATE_PATHS)
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Memory for features on the host. The blocks are divided among as many passes as they need.
FEATURE_BYTES = 4e9
# One in so many images of a dataset without a test split is for testing.
TEST_SHARE = 5
# The stream of random words that shuffles a dataset. The loader's streams are numbered by epochs, and far below.
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
    """Outputs of blocks at noise level sigma: [CLS] [B, blocks, D] and patch tokens [B, blocks, N, D], float32.

    encoder: its parameters. batch: stored images, or moments of latents, of which the means are used. index_B: the
    noise of an image follows from `key` and its index. blocks: numbers from 1. [CLS] is None if the encoder has none.
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
    """{cls: [CLS], if there is one, mean: the mean of the patch tokens}, each [B, blocks, D]."""
    features = {"mean": tokens_BKND.mean(axis=2)}
    return features if cls_BKD is None else {"cls": cls_BKD} | features


def _patch_tokens(cls_BKD: jax.Array | None, tokens_BKND: jax.Array) -> jax.Array:
    """The tokens [B, N, D] of one block."""
    del cls_BKD
    return tokens_BKND[:, 0]


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Stored images with labels and numbers, on the host.

    batch: {image: uint8 [n, H, W, C]} or {moments: float16 [n, 2, H, W, C]}. index_n: numbers in the source. stream: a
    number for each source and split; the noise of an image follows from its number and the stream.
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
    """Computes features of any number of images on all devices, and gives them to every host.

    seed: of the noise. batch_size: images of one device at a time.
    """

    def __init__(self, parts: Parts, mesh: Mesh, seed: int, batch_size: int = 32) -> None:
        self.parts, self.mesh, self.seed = parts, mesh, seed
        self._batch_size = batch_size * mesh.size
        self._compiled = functools.cache(self._program)

    def pooled(
        self, encoder: Any, images: LabelledImages, sigma: float, blocks: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """{cls, mean}, each float32 [n, blocks, D]; see `pooled`."""
        return self._map(pooled, encoder, images, sigma, blocks)

    def patches(self, encoder: Any, images: LabelledImages, sigma: float, block: int) -> np.ndarray:
        """The patch tokens of a block, float32 [n, N, D]."""
        return self._map(_patch_tokens, encoder, images, sigma, (block,))

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


def load_encoders(
    workdir: Path, mesh: Mesh, weights: Sequence[str] = (), step: int | None = None
) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """The configuration of a run, its encoders by name, and the record of the checkpoint.

    weights: of `WEIGHTS`; empty: "ema", and "teacher" if the run's teacher is not the EMA. "ema" alone is read without
    the rest of the state. Raises UserError for a teacher that the run does not have, and CheckpointError.
    """
    parts = make_parts(read_config(workdir))
    objective = discrimination_of(parts)
    own_teacher = objective is not None and objective.config.teacher == "own"
    if not weights:
        weights = ("ema", "teacher") if own_teacher else ("ema",)
    if "teacher" in weights and not own_teacher:
        raise UserError(f"--weights=teacher: {workdir} has no teacher of its own; choose ema or params")
    if set(weights) == {"ema"}:
        abstract = abstract_state(parts, mesh)["ema"]
        ema, meta = open_checkpoints(workdir).restore_ema(abstract, step)
        return resolve(meta["config"]), {"ema": ema["default"]["encoder"]}, meta
    config, state, meta = restore_run(workdir, mesh, step)
    encoders = {name: functools.reduce(operator.getitem, STATE_PATHS[name].split("/"), state) for name in weights}
    return config, encoders, meta


def untrained_encoder(parts: Parts, mesh: Mesh) -> Any:
    """The encoder from which the run started, initialised with the run's seed."""

    def init(key: jax.Array) -> Any:
        return parts.network.init(key)["encoder"]

    layout = shardings(mesh, parts.network.abstract["encoder"])
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
    """Images to fit a probe, images to test it, and the record of both.

    The training images are of `source` and `split`; empty: of the run's. The test images are of `test_source` and
    `test_split`; empty: of the source's `held_out_split`, or for a source without one a random fifth of its images.
    At most `num_train` and `num_test` images are drawn. An image that comes twice, such as in place of an image that
    cannot be read, is used once.

    codec: of the run's data. Raises DataError if the data has no labels, or another codec than the run's.
    """
    spec = source or config.data.source
    split = split or ("train" if source else config.data.split)
    train = _open(spec, split, config, codec)
    if not test_split:
        test_split = "train" if test_source else held_out_split(spec, split) or ""
    order_N = _shuffled(len(train), seed)
    if test_split == split and (test_source or spec) == spec:
        raise DataError(f"{train.name} is to fit a probe and to test it; leave out one of the two splits")
    if test_split:
        test = _open(test_source or spec, test_split, config, codec)
        if test.class_names != train.class_names:
            raise DataError(f"{test.name} and {train.name} have different classes; a probe needs the same classes")
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
            raise DataError(f"{opened.name} has {len(opened)} images: none is left to {name} a probe")
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
    """0, ..., count - 1 in random order."""
    return np.argsort(random_words(seed, SPLIT_STREAM, 0, count), kind="stable")


def _read(source: Source, index_n: np.ndarray, stream: int, num_threads: int) -> tuple[LabelledImages, np.ndarray]:
    """The images `index_n`, and the numbers of the images that were read, some in place of unreadable ones."""
    chunks = [index_n[i : i + 256] for i in range(0, len(index_n), 256)] or [index_n]
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(lambda index_b: source.read(index_b, np.zeros(len(index_b), bool)), chunks))
    read = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    label_n, number_n = read.pop("label"), read.pop("index")
    return LabelledImages(read, label_n, index_n, stream), number_n


def chance(train: LabelledImages, test: LabelledImages) -> float:
    """The accuracy on the test images of always naming the training images' most frequent class."""
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
    """Accuracies on the test images: a row for each encoder, sigma, block and feature (see `pooled`).

    knn, linear: accuracies of `neighbour_votes` and `linear_probe`. knn_untrained, linear_untrained: of the untrained
    encoder's last block. adaLN-Zero makes its blocks the identity, so that all give the same features, and [CLS] is the
    same for every image.
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
    """The rows of `probe` as the lines of a table."""
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
    """`principal_pictures` of the n images for each sigma and encoder: uint8 [sigmas * encoders * n, size, size, 3]."""
    return np.concatenate(
        [
            principal_pictures(features.patches(encoder, images, sigma, block), size)
            for sigma in sigmas
            for encoder in encoders.values()
        ]
    )

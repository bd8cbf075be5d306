"""Folders of latents, and how they are written.

A folder of latents holds

    latents-SPLIT.array_record-SSSSS-of-NNNNN    the records, uncompressed
    latents.json       codec, classes, statistics, and each shard with its checksum; written last
    bad_files.json     the images that were left out, and why
    dataset_info.json, features.json, ...        for TFDS, whose builder_from_directory opens the folder
    progress/          the plan and the finished shards, for going on; not needed once latents.json is there

A record is a tf.train.Example of moments, label and index. moments, float16: the mean and the standard deviation of the
latents of an image and of its mirror image, since latents cannot be mirrored. index: the image's number in the source.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax.traverse_util import flatten_dict

from sddit_jax.data.image_sources import few
from sddit_jax.errors import DataError
from sddit_jax.files import explained, read_json, sha256_of, whole, write_json

FORMAT = 1
INDEX = "latents.json"
BAD_FILES = "bad_files.json"
PROGRESS = "progress"
# A single record can be read only from a group of one. Compression hardly shrinks float16 noise, and triples the time
# of reading.
_WRITER_OPTIONS = "group_size:1,uncompressed"

# Bytes of a label and of an index, with seven bits in each byte.
_VARINT_BYTES = 5
# moments float16 [b, 2 (image, mirror image), 2 (mean, std), h, w, c], label int [b], index int [b].
Moments = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the bytes of a folder follow from. A command with another plan may not continue the folder.

    source, source_split, source_records: the user's name of the images, their split, and their number.
    source_files: hash of the images' names.
    codec: the record of the autoencoder: hash of its weights, scaling of latents, resolution of the images.
    latent_shape: (h, w, c).
    batch_size, dtype: the rounding of latents depends on them.
    records_per_shard: shard k has the images from k * records_per_shard on, without the bad ones.
    """

    source: str
    source_split: str
    source_records: int
    source_files: str
    class_names: tuple[str, ...]
    codec: dict[str, Any]
    latent_shape: tuple[int, int, int]
    batch_size: int
    dtype: str
    records_per_shard: int

    @property
    def split(self) -> str:
        """The split without its slice: 'train' for 'train[:10%]'."""
        return re.match(r"\w*", self.source_split)[0] or "all"

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return -(-self.source_records // self.records_per_shard)

    def images(self, shard: int) -> range:
        """The numbers of a shard's images in the source."""
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.source_records))

    def shard_name(self, shard: int) -> str:
        """The name of a shard's file, as TFDS expects it."""
        return f"latents-{self.split}.array_record-{shard:05d}-of-{self.num_shards:05d}"

    def to_json(self) -> dict[str, Any]:
        """The values as a JSON file gives them back: lists in place of tuples."""
        return json.loads(json.dumps({"format": FORMAT} | dataclasses.asdict(self)))


class RecordLayout:
    """The bytes of a record: a tf.train.Example in which moments, label and index always have the same places.

    Protocol buffers allow a varint that is longer than necessary, so label and index have one length in all records,
    and a record is read without a parser. protobuf's parser takes a third more processor time, and TFDS's six times as
    much. latent_shape: (h, w, c).
    """

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        self.shape = (2, 2, *latent_shape)
        self.half_bytes = 4 * int(np.prod(latent_shape))
        label, index = _integer(b"label", 0), _integer(b"index", 0)
        record = _field(1, _feature(b"moments", 1, bytes(2 * self.half_bytes)) + label + index)
        self.size, self.end_bytes, self._label_bytes = len(record), len(label + index), len(label)
        self._start = record[: -2 * self.half_bytes - self.end_bytes]

    def pack(self, moments: np.ndarray, label: int, index: int) -> bytes:
        """The record of moments [2 (image, mirror image), 2 (mean, std), h, w, c], a label and an image's number."""
        content = moments.astype("<f2", copy=False).tobytes()
        return self._start + content + _integer(b"label", label) + _integer(b"index", index)

    def check(self, record: bytes) -> None:
        """Raises ValueError for a record of another layout: one that `pack` would not write for its own values."""
        label_1, index_1 = self.labels([record[-self.end_bytes :]])
        end = _integer(b"label", label_1[0]) + _integer(b"index", index_1[0])
        if len(record) != self.size or not (record.startswith(self._start) and record.endswith(end)):
            raise ValueError(f"its records are not moments {list(self.shape)}, label and index")

    def half(self, record: bytes, mirrored: bool) -> memoryview:
        """The bytes of mean and standard deviation, float16 [2, h, w, c], of the image or of its mirror image."""
        start = len(self._start) + mirrored * self.half_bytes
        return memoryview(record)[start : start + self.half_bytes]

    def labels(self, ends: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """label int32 [b] and index int64 [b] from the last `end_bytes` bytes of b records."""
        end_bX = np.frombuffer(b"".join(ends), np.uint8).reshape(-1, self.end_bytes)
        powers = 128 ** np.arange(_VARINT_BYTES)
        label_b, index_b = (
            (end_bX[:, stop - _VARINT_BYTES : stop] & 127).astype(np.int64) @ powers
            for stop in (self._label_bytes, self.end_bytes)
        )
        return label_b.astype(np.int32), index_b


def _varint(value: int, width: int = 1) -> bytes:
    """A protocol buffer's integer in at least `width` bytes."""
    groups = max(width, -(-value.bit_length() // 7))
    return bytes((value >> 7 * i & 127) | (128 if i < groups - 1 else 0) for i in range(groups))


def _field(number: int, content: bytes) -> bytes:
    """A protocol buffer's field of bytes, of a message or of packed integers."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _feature(name: bytes, kind: int, value: bytes) -> bytes:
    """An entry of a tf.train.Example. kind: 1 for bytes, 3 for integers."""
    return _field(1, _field(1, name) + _field(2, _field(kind, _field(1, value))))


def _integer(name: bytes, value: int) -> bytes:
    return _feature(name, 3, _varint(int(value), _VARINT_BYTES))


def begin(folder: Path, plan: Plan) -> None:
    """Makes the folder, or checks that it can be continued.

    Raises DataError if the folder cannot be written, or holds latents of another plan.
    """
    path = folder / PROGRESS / "plan.json"
    with _writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, plan.to_json())
    found, wanted = (flatten_dict(each, sep=".") for each in (read_json(path, DataError), plan.to_json()))
    changed = [
        f"{key} {found.get(key)!r} instead of {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
    ]
    if changed:
        raise DataError(f"{folder} holds other latents: {few(changed)}; use another folder")


def unfinished(folder: Path, plan: Plan) -> list[int]:
    """The numbers of the shards that are not written yet."""
    return [shard for shard in range(plan.num_shards) if _finished(folder, plan, shard) is None]


def write_shard(folder: Path, plan: Plan, shard: int, batches: Iterable[Moments], bad_files: dict[str, str]) -> None:
    """Writes a shard, whole or not at all.

    batches: the shard's records in order. bad_files: images that are left out -> why; complete when `batches` ends.

    Raises DataError if the shard cannot be written, or a value is not finite.
    """
    path = folder / plan.shard_name(shard)
    layout = RecordLayout(plan.latent_shape)
    count, sums = 0, np.zeros((3, plan.latent_shape[-1]))
    with ExitStack() as stack:
        with _writing(path):
            file = stack.enter_context(whole(path))
            writer = ArrayRecordWriter(file.name, _WRITER_OPTIONS)
        for moments, label, index in batches:
            if not np.isfinite(moments).all():
                raise DataError(
                    f"{plan.source}: latents of images {index[0]} to {index[-1]} are not finite in float16; check the "
                    "weights of the autoencoder"
                )
            with _writing(path):
                for record in zip(moments, label, index, strict=True):
                    writer.write(layout.pack(*record))
            count += len(moments)
            sums += _sums(moments)
        with _writing(path):
            writer.close()
            stack.close()
            size, digest = path.stat().st_size, sha256_of(path)
            record = {"records": count, "bytes": size, "sha256": digest, "bad_files": bad_files, "sums": sums.tolist()}
            write_json(_note(folder, shard), record)


def finish(folder: Path, plan: Plan) -> int:
    """Completes a folder whose shards are all written. Returns the number of records.

    Raises DataError if the folder cannot be written, or not one image could be read.
    """
    shards = [_finished(folder, plan, shard) for shard in range(plan.num_shards)]
    records = [shard["records"] for shard in shards]
    bad_files = {name: reason for shard in shards for name, reason in shard["bad_files"].items()}
    if not sum(records):
        raise DataError(f"{plan.source}: not one of {plan.source_records} images can be read; {few(bad_files.items())}")
    description = plan.to_json() | {
        "split": plan.split,
        "records": sum(records),
        "statistics": _statistics(np.sum([shard["sums"] for shard in shards], axis=0), sum(records), plan),
        "shards": [
            {"name": plan.shard_name(i)} | {key: shard[key] for key in ("records", "bytes", "sha256")}
            for i, shard in enumerate(shards)
        ],
    }
    with _writing(folder):
        _write_tfds_metadata(folder, plan, records)
        write_json(folder / BAD_FILES, bad_files)
        write_json(folder / INDEX, description)
    return sum(records)


def _note(folder: Path, shard: int) -> Path:
    return folder / PROGRESS / f"{shard:05d}.json"


def _finished(folder: Path, plan: Plan, shard: int) -> dict[str, Any] | None:
    """The note of `write_shard` about a shard; None if the shard is not written yet."""
    note, path = _note(folder, shard), folder / plan.shard_name(shard)
    if not (note.exists() and path.exists()):
        return None
    record = read_json(note, DataError)
    return record if record.get("bytes") == path.stat().st_size else None


def _sums(moments: np.ndarray) -> np.ndarray:
    """float64 [3, c]: the sums of mean, mean^2 and std^2 over all moments."""
    mean, std = moments.astype(np.float32).transpose(2, 0, 1, 3, 4, 5).reshape(2, -1, moments.shape[-1])
    squares = (np.einsum("nc,nc->c", x, x, dtype=np.float64) for x in (mean, std))
    return np.stack([mean.sum(0, dtype=np.float64), *squares])


def _statistics(sums: np.ndarray, records: int, plan: Plan) -> dict[str, list[float]]:
    """Mean and standard deviation of (mean + std * eps - shift) * scale over images, mirror images, positions and eps.

    sums: of `_sums`, over all records.
    """
    mean, square, variance = sums / (2 * records * np.prod(plan.latent_shape[:2]))
    scale, shift = plan.codec["scaling_factor"], plan.codec["shift_factor"]
    std = np.sqrt(np.maximum(square + variance - mean**2, 0))
    return {"mean": ((mean - shift) * scale).tolist(), "std": (std * scale).tolist()}


def _write_tfds_metadata(folder: Path, plan: Plan, records: list[int]) -> None:
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    integer = tfds.features.Scalar(np.int64)
    features = {
        "moments": tfds.features.Tensor(shape=(2, 2, *plan.latent_shape), dtype=np.float16, encoding="bytes"),
        "label": tfds.features.ClassLabel(names=list(plan.class_names)) if plan.class_names else integer,
        "index": integer,
    }
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="latents", split=plan.split, filetype_suffix="array_record"
    )
    size = RecordLayout(plan.latent_shape).size * sum(records)
    split = tfds.core.SplitInfo(name=plan.split, shard_lengths=records, num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        split_infos=[split],
        version="1.0.0",
        check_data=False,
        description="Latents of images and of their mirror images: axis 0 of moments is the mirror, axis 1 mean and "
        "standard deviation.",
    )


def _writing(path: Path) -> AbstractContextManager[None]:
    # ArrayRecord raises RuntimeError for a full disk.
    return explained(path, DataError, RuntimeError, ending="; finished shards are kept")

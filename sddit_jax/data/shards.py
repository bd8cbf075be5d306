"""Latents that are computed once: the files that they are in, and how these are written.

A folder of latents holds

    latents-SPLIT.array_record-SSSSS-of-NNNNN    the records, uncompressed
    latents.json       what they are: codec, classes, statistics, and each shard with its checksum; written last
    bad_files.json     the images that were left out, and why
    dataset_info.json, features.json, ...        for TFDS, whose builder_from_directory opens the folder
    progress/          what goes on after an interruption; of no use once latents.json is there

A record is a tf.train.Example of moments, label and index: in float16 the mean and the standard deviation of an image's
latents and of its mirror image's (latents cannot be mirrored themselves), and the image's number in the source.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from sddit_jax.errors import DataError
from sddit_jax.files import explained, read_json, sha256_of, whole, write_json

FORMAT = 1
INDEX = "latents.json"
BAD_FILES = "bad_files.json"
PROGRESS = "progress"
PLAN = "plan.json"
# One record at a time can be read only from groups of one. Float16 noise hardly shrinks, and reads three times slower.
_WRITER_OPTIONS = "group_size:1,uncompressed"

# Of label and index: seven bits in each byte.
_VARINT_BYTES = 5
# moments, label, index; mean and standard deviation are axis 2.
Moments = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the bytes of a folder of latents follow from, as far as a second run could ask for something else.

    source, source_split, source_records, source_files: the images: as the user calls them, how many there are, and a
      hash of their names.
    codec: the record of the autoencoder: its weights' hash, how latents are scaled, and the images' resolution.
    latent_shape: (h, w, c).
    batch_size, dtype: rounding depends on them.
    records_per_shard: shard k is made of images k * records_per_shard and on, and has fewer records if some are bad.
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
        """How many shards there are."""
        return -(-self.source_records // self.records_per_shard)

    def images(self, shard: int) -> range:
        """The numbers of a shard's images in the source."""
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.source_records))

    def shard_name(self, shard: int) -> str:
        """The name of a shard's file, as TFDS expects it."""
        return f"latents-{self.split}.array_record-{shard:05d}-of-{self.num_shards:05d}"

    def to_json(self) -> dict[str, Any]:
        """As it is read back from a JSON file."""
        return json.loads(json.dumps({"format": FORMAT} | dataclasses.asdict(self)))


class RecordLayout:
    """The bytes of a record: a tf.train.Example in which all but the values is the same bytes at the same places.

    Protocol buffers allow a varint to be longer than it has to be, which gives label and index the same length in all
    records. So a record is read without a parser: with that of protobuf, reading takes a third more of a processor's
    time, with that of TFDS six times as much. latent_shape: (h, w, c).
    """

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        self.shape = (2, 2, *latent_shape)
        self.half_bytes = 4 * int(np.prod(latent_shape))
        label, index = (_feature(name, 3, _varint(0, _VARINT_BYTES)) for name in (b"label", b"index"))
        record = _field(1, _feature(b"moments", 1, bytes(2 * self.half_bytes)) + label + index)
        self.size = len(record)
        self.end_bytes = len(label + index)
        self._start = record[: -2 * self.half_bytes - self.end_bytes]
        self._start_bytes = len(self._start)
        # What comes before a value, and where.
        self._heads = (
            (self._start, 0),
            (label[:-_VARINT_BYTES], self.size - self.end_bytes),
            (index[:-_VARINT_BYTES], self.size - len(index)),
        )
        self._label = slice(len(label) - _VARINT_BYTES, len(label))
        self._index = slice(self.end_bytes - _VARINT_BYTES, self.end_bytes)

    def pack(self, moments: np.ndarray, label: int, index: int) -> bytes:
        """The record of moments [2 (mirrored), 2 (mean, std), h, w, c], a label and an image's number."""
        end = zip((b"label", b"index"), (label, index), strict=True)
        features = [_feature(name, 3, _varint(int(value), _VARINT_BYTES)) for name, value in end]
        return b"".join([self._start, moments.astype("<f2", copy=False).tobytes(), *features])

    def check(self, record: bytes) -> None:
        """Raises ValueError for a record of another layout."""
        if len(record) != self.size or not all(record.startswith(head, at) for head, at in self._heads):
            raise ValueError(f"its records are not moments {list(self.shape)}, label and index")

    def half(self, record: bytes, mirrored: bool) -> memoryview:
        """The bytes of mean and standard deviation, float16 [2, h, w, c], of the image or of its mirror image."""
        start = self._start_bytes + mirrored * self.half_bytes
        return memoryview(record)[start : start + self.half_bytes]

    def labels(self, ends: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """label int32 [b] and index int64 [b] from the last `end_bytes` bytes of records."""
        end_bX = np.frombuffer(b"".join(ends), np.uint8).reshape(-1, self.end_bytes)
        powers = 128 ** np.arange(_VARINT_BYTES)
        label_b, index_b = ((end_bX[:, at] & 127).astype(np.int64) @ powers for at in (self._label, self._index))
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


def begin(folder: Path, plan: Plan) -> None:
    """Makes the folder, or checks that it can be continued.

    Raises:
      DataError: the folder cannot be written, or holds latents of another plan.
    """
    path = folder / PROGRESS / PLAN
    with _writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, plan.to_json())
    found, wanted = _flat(read_json(path, DataError)), _flat(plan.to_json())
    changed = [
        f"{key} {found.get(key)!r} instead of {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
    ]
    if changed:
        raise DataError(f"{folder} holds other latents: {_short(changed)}; use another folder")


def unfinished(folder: Path, plan: Plan) -> list[int]:
    """The shards that are still to be written."""
    return [shard for shard in range(plan.num_shards) if _finished(folder, plan, shard) is None]


def write_shard(folder: Path, plan: Plan, shard: int, batches: Iterable[Moments], bad_files: dict[str, str]) -> None:
    """Writes a shard whole or not at all, from batches of its records in order.

    batches: (moments float16 [b, 2, 2, h, w, c], label [b], index [b]). bad_files: what was left out of them, and why;
    complete when `batches` ends.

    Raises:
      DataError: it cannot be written, or values are not finite.
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
                    "autoencoder's weights"
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
    """Writes what describes the shards, which are all there; returns the number of records. Can be done again.

    Raises:
      DataError: the folder cannot be written, or not one image could be read.
    """
    shards = [_finished(folder, plan, shard) for shard in range(plan.num_shards)]
    records = [shard["records"] for shard in shards]
    bad_files = {name: reason for shard in shards for name, reason in shard["bad_files"].items()}
    if not sum(records):
        raise DataError(
            f"{plan.source}: not one of {plan.source_records} images can be read; {_short(bad_files.items())}"
        )
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


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep=".")


def _note(folder: Path, shard: int) -> Path:
    return folder / PROGRESS / f"{shard:05d}.json"


def _finished(folder: Path, plan: Plan, shard: int) -> dict[str, Any] | None:
    """What `write_shard` noted of a shard, or None if it is to be written."""
    note, path = _note(folder, shard), folder / plan.shard_name(shard)
    if not (note.exists() and path.exists()):
        return None
    record = read_json(note, DataError)
    return record if record.get("bytes") == path.stat().st_size else None


def _sums(moments: np.ndarray) -> np.ndarray:
    """float64 [3, c]: sums of mean, mean^2 and std^2."""
    mean, std = moments.astype(np.float32).transpose(2, 0, 1, 3, 4, 5).reshape(2, -1, moments.shape[-1])
    squares = (np.einsum("nc,nc->c", x, x, dtype=np.float64) for x in (mean, std))
    return np.stack([mean.sum(0, dtype=np.float64), *squares])


def _statistics(sums: np.ndarray, records: int, plan: Plan) -> dict[str, list[float]]:
    """Mean and standard deviation of (mean + std * eps - shift) * scale over images, mirror images, positions, eps."""
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
    """ArrayRecord raises RuntimeError for a full disk."""
    return explained(path, DataError, RuntimeError, ending="; what is finished is kept")


def _short(items: Iterable[Any]) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")

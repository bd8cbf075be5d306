"""Latents as a source of records, read from their shards or held in memory."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from sddit_jax.data.shards import FORMAT, INDEX, Moments, RecordLayout
from sddit_jax.errors import DataError
from sddit_jax.files import read_json, sha256_of, undamaged

# By default ArrayRecord reads 16 MB ahead, which random access does not use.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 1 << 15
_THREADS = 16
_AGAIN = "delete it and run the same `python -m sddit_jax.prepare` again"


class LatentsSource:
    """The `Source` of a folder of latents.

    Attributes, beside those of `Source`:
      statistics: {mean, std}, lists with a value per channel, of shifted and scaled latents, as diffusion sees them.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        image_shape: tuple[int, int, int],
        *,
        in_memory: bool = False,
        verify: bool = False,
    ) -> None:
        """Opens the shards.

        image_shape: (h, w, c) of the latents. in_memory: loads all shards; an image of 256 pixels and its mirror image
        take 32 KiB, and 1.28 million of them 42 GB. verify: compares the checksum of each shard. A damaged record is
        found without it, when it is read, but not a shard that was exchanged for another of the same size.

        Raises DataError: a file is missing, damaged or does not match the others, or the latents have another split or
        shape.
        """
        if not (path / INDEX).exists():
            raise DataError(f"{path / INDEX} is missing; `python -m sddit_jax.prepare` writes it when it is done")
        index = read_json(path / INDEX, DataError)
        with undamaged(path / INDEX, DataError):
            if index["format"] != FORMAT:
                raise DataError(
                    f"{path} has the format {index['format']}; this version reads {FORMAT}: prepare the latents again"
                )
            shape, found = tuple(index["latent_shape"]), index["split"]
            self._layout = RecordLayout(shape)
            self._paths = [path / shard["name"] for shard in index["shards"]]
            self._counts = np.array([shard["records"] for shard in index["shards"]], np.int64)
            sizes, digests = ([shard[key] for shard in index["shards"]] for key in ("bytes", "sha256"))
            self._ends = np.cumsum(self._counts)
            self.codec, self.statistics = dict(index["codec"]), dict(index["statistics"])
            self.class_names = tuple(index["class_names"])
        if split != found:
            raise DataError(f"latents {path}: no split {split!r}; these are of {found!r}")
        if image_shape != shape:
            raise DataError(
                f"latents {path}: image_size={image_shape[0]}, channels={image_shape[2]}; the latents are "
                f"image_size={shape[0]}, channels={shape[2]}"
            )
        self.name = f"latents:{path}[{split}]"
        self.num_classes = len(self.class_names)
        self.image_shape = image_shape
        self.bad_files: dict[str, str] = {}

        with ThreadPoolExecutor(_THREADS) as pool:
            expected = digests if verify else itertools.repeat(None)
            self._readers = list(pool.map(_open_shard, self._paths, self._counts.tolist(), sizes, expected))
            list(pool.map(self._check_layout, np.flatnonzero(self._counts).tolist()))
            self._memory = self._load(pool) if in_memory else None

    def __len__(self) -> int:
        """Number of records."""
        return int(self._ends[-1])

    def read(self, indices_b: np.ndarray, mirrored_b: np.ndarray) -> dict[str, np.ndarray]:
        """{moments: float16 [b, 2 (mean, std), h, w, c], label: int32 [b], index: int64 [b]} of records int64 [b].

        mirrored_b: bool [b]; gives the moments of the mirror image. index: the image's number when the latents were
        made. Raises DataError if a shard is damaged or has vanished.
        """
        if self._memory is not None:
            halves, label_N, index_N = self._memory
            taken = halves.take(2 * indices_b + mirrored_b, axis=0)
            label_b, index_b = label_N[indices_b], index_N[indices_b]
        else:
            size = self._layout.half_bytes
            taken = np.empty(len(indices_b) * size, np.uint8)
            taken_bytes, ends = memoryview(taken), []
            shard_b = np.searchsorted(self._ends, indices_b, side="right")
            place_b = indices_b - (self._ends - self._counts)[shard_b]
            # ArrayRecord's reading of several records at a time is slower, and uses the processor's cache badly.
            where = zip(shard_b.tolist(), place_b.tolist(), mirrored_b.tolist(), strict=True)
            for row, (shard, place, mirrored) in enumerate(where):
                record = self._record(shard, place)
                taken_bytes[row * size : (row + 1) * size] = self._layout.half(record, mirrored)
                ends.append(record[-self._layout.end_bytes :])
            label_b, index_b = self._layout.labels(ends)
        moments = taken.view("<f2").reshape(-1, 2, *self.image_shape)
        return {"moments": moments, "label": label_b, "index": index_b}

    def _record(self, shard: int, place: int) -> bytes:
        """A record of a shard. Raises DataError if it is damaged, by ArrayRecord's checksums."""
        try:
            record = self._readers[shard].read([place])[0]
            if len(record) != self._layout.size:
                raise ValueError(f"record {place} has {len(record)} bytes instead of {self._layout.size}")
        except (RuntimeError, ValueError) as error:  # ArrayRecord raises RuntimeError for everything.
            raise DataError(f"{self._paths[shard]} is damaged: {error}; {_AGAIN}") from error
        return record

    def _check_layout(self, shard: int) -> None:
        """Checks the first record of a shard, since all records of a shard are laid out alike."""
        try:
            self._layout.check(self._record(shard, 0))
        except ValueError as error:
            raise DataError(f"{self._paths[shard]} does not fit {INDEX}: {error}") from error

    def _load(self, pool: ThreadPoolExecutor) -> Moments:
        """The halves of all records, uint8 [2 N, bytes], label [N] and index [N]."""
        halves = np.empty((2 * len(self), self._layout.half_bytes), np.uint8)
        label_N, index_N = np.empty(len(self), np.int32), np.empty(len(self), np.int64)

        def load(shard: int) -> None:
            start, stop = int(self._ends[shard] - self._counts[shard]), int(self._ends[shard])
            ends = []
            for row in range(start, stop):
                record = self._record(shard, row - start)
                for mirrored in (False, True):
                    halves[2 * row + mirrored] = np.frombuffer(self._layout.half(record, mirrored), np.uint8)
                ends.append(record[-self._layout.end_bytes :])
            label_N[start:stop], index_N[start:stop] = self._layout.labels(ends)

        list(pool.map(load, range(len(self._paths))))
        return halves, label_N, index_N


def _open_shard(path: Path, count: int, size: int, digest: str | None) -> ArrayRecordReader:
    """A reader of a shard with so many records and bytes, and with this SHA-256 unless it is None."""
    try:
        actual = path.stat().st_size
        reader = ArrayRecordReader(str(path), _OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    if (actual, reader.num_records()) != (size, count):
        raise DataError(
            f"{path} has {reader.num_records()} records and {actual} bytes instead of {count} and {size}; {_AGAIN}"
        )
    if digest is not None and sha256_of(path) != digest:
        raise DataError(f"{path} is not what was written: its SHA-256 is not the one in {INDEX}; {_AGAIN}")
    return reader

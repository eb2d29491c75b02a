"""Latents on disk: fixed-size shards that are written once, and an index over them.

A shard holds the readable images of a fixed run of list rows, so shards can be made in any order,
by any number of processes, and a stopped run continues with the missing ones. Latents are raw;
statistics of the whole data set stand beside them (method: arXiv 2512.14421).
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.distributed import Ranks, resolve_workers
from lcmem_cli.engine.errors import CorruptFileError, InputError, UnreadableLimitError
from lcmem_cli.engine.files import atomic_path, folder_lock, sha256_file, write_json
from lcmem_cli.engine.models.codec import Codec, CodecSpec
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result, Unreadable

FORMAT_VERSION = 1
META_NAME, PLAN_NAME, INDEX_NAME, SHARD_FOLDER = "meta.json", "plan.json", "index.parquet", "shards"
SHARD_RECORDS = 256
STD_FLOOR = 1e-12
_COLUMNS = ("path", "id", "Split", "ds_name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingResult(Result):
    """What ``encode_latents`` made.

    Attributes:
        folder: the store.
        num_images: images encoded.
        num_shards: shards in the store.
        num_encoded_now: images that this run encoded; the others were there already.
        codec: what encoded them.
        image_size: side in pixels.
        mean: per channel over all pixels of all images.
        std: population standard deviation, likewise.
        unreadable: images left out, with reasons.
        package: archive of the store, if asked for.
    """

    folder: str
    num_images: int
    num_shards: int
    num_encoded_now: int
    codec: CodecSpec
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: tuple[Unreadable, ...]
    package: str | None = None


class LatentStore:
    """A finished store, opened for reading.

    Attributes:
        folder: where it is.
        records: images in the store, in list order.
        spec: codec that made the latents.
        image_size: side in pixels of what was encoded.
        mean: per channel ``[C]``.
        std: per channel ``[C]``.
        manifest_digest: of the image list.
        unreadable: images left out.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], table: Any) -> None:
        self.folder = folder
        self.spec = CodecSpec(**meta["codec"])
        self.image_size = int(meta["image_size"])
        self.mean = tuple(float(v) for v in meta["mean"])
        self.std = tuple(float(v) for v in meta["std"])
        self.manifest_digest = str(meta["manifest_digest"])
        self.unreadable = tuple(Unreadable(**u) for u in meta["unreadable"])
        self._shards = meta["shards"]
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        self.records = tuple(
            Record(*(_to_text(value) for value in row))  # type: ignore[arg-type]
            for row in zip(*(columns[name] for name in _COLUMNS), strict=True)
        )
        self._shard = np.asarray(columns["shard"], dtype=np.int64)
        self._row = np.asarray(columns["row"], dtype=np.int64)
        # Shards stay mapped, a few hundred at most, so that reading costs no open call.
        self._map = functools.lru_cache(maxsize=256)(self._open_shard)

    @classmethod
    def open(cls, folder: Path) -> LatentStore:
        """Open a finished store.

        Raises:
            InputError: there is none, or its encoding was not finished.
            CorruptFileError: its index is damaged.
        """
        import pyarrow.lib
        import pyarrow.parquet

        if not (folder / META_NAME).is_file():
            state = "its encoding was not finished: run lcmem latents again"
            hint = state if (folder / PLAN_NAME).is_file() else "make one with: lcmem latents"
            raise InputError(f"{folder}: no latent store there; {hint}")
        try:
            meta = json.loads((folder / META_NAME).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT_VERSION:
                raise InputError(f"{folder}: latent store format {meta['format']} is not known")
            return cls(folder, meta, pyarrow.parquet.read_table(folder / INDEX_NAME))
        except (ValueError, KeyError, TypeError, OSError, pyarrow.lib.ArrowException) as error:
            raise CorruptFileError(f"{folder}: the index is damaged: {error}") from error

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def latents(self, rows: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """Return raw latents ``[n, C, h, w]`` float32 of some rows of ``records``."""
        return torch.from_numpy(
            np.stack([self._map(int(self._shard[r]))[self._row[r]] for r in rows])
        )

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            CorruptFileError: naming the first shard that differs or is missing.
        """
        for shard in self._shards:
            path = self.folder / SHARD_FOLDER / shard["file"]
            if not path.is_file() or sha256_file(path) != shard["sha256"]:
                raise CorruptFileError(
                    f"{path}: missing or damaged; remove it and run lcmem latents again"
                )

    def select(self, split: str) -> list[int]:
        """Return the rows of one split."""
        return [row for row, record in enumerate(self.records) if record.split == split]

    def _open_shard(self, number: int) -> NDArray[np.float32]:
        path = self.folder / SHARD_FOLDER / _shard_name(number)
        try:
            shard: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CorruptFileError(
                f"{path}: missing or damaged ({error}); remove it and run lcmem latents again"
            ) from error
        return shard


def encode_latents(
    manifest: Manifest,
    codec: Codec,
    output: Path,
    *,
    image_size: int,
    batch_size: int = 16,
    workers: int = -1,
    seed: int = 0,
    max_unreadable: int = 0,
    package: bool = False,
    ranks: Ranks | None = None,
    reporter: Reporter = SILENT,
) -> EncodingResult:
    """Encode every image of a list, continuing what an earlier run left unfinished.

    Args:
        manifest: images to encode.
        codec: frozen encoder.
        output: folder of the store.
        image_size: side in pixels that images are resized to.
        batch_size: images per codec call; latents do not depend on it.
        workers: decoding threads; -1 from the CPUs.
        seed: of posterior samples; each image has its own.
        max_unreadable: tolerated unreadable images.
        package: also write ``<output>.tar.gz``.
        ranks: processes that share the shards.
        reporter: receives progress.

    Raises:
        InputError: the folder holds latents of another codec, size or list.
        UnreadableLimitError: more unreadable images than tolerated; the readable ones are kept.
    """
    ranks = ranks or Ranks()
    if ranks.is_main:
        with folder_lock(output):
            _write_plan(manifest, codec, output, image_size=image_size, seed=seed)
            return _encode_and_finish(
                manifest, codec, output, image_size, batch_size, workers, seed,
                max_unreadable, package, ranks, reporter,
            )  # fmt: skip
    return _encode_and_finish(
        manifest, codec, output, image_size, batch_size, workers, seed,
        max_unreadable, package, ranks, reporter,
    )  # fmt: skip


def _encode_and_finish(
    manifest: Manifest,
    codec: Codec,
    output: Path,
    image_size: int,
    batch_size: int,
    workers: int,
    seed: int,
    max_unreadable: int,
    package: bool,
    ranks: Ranks,
    reporter: Reporter,
) -> EncodingResult:
    ranks.barrier()  # the plan is there
    numbers = range(-(-len(manifest) // SHARD_RECORDS))
    missing = [n for n in numbers if _read_side(output, n) is None]
    mine = ranks.share(missing)
    paths = manifest.paths()
    encoded_now = 0
    writing: Future[None] | None = None
    ranks.barrier()  # every process has looked before any writes
    total = sum(len(_shard_range(n, len(manifest))) for n in mine)
    with ThreadPoolExecutor(1) as writer, reporter.task("latents", total, unit="image") as task:
        for number in mine:
            rows = _shard_range(number, len(manifest))
            collected, kept, unreadable = [], [], []
            for batch in iter_images(
                [paths[r] for r in rows],
                image_size,
                workers=resolve_workers(workers, ranks.size),
                batch_size=batch_size,
            ):
                unreadable += [
                    {"path": manifest.records[rows[i]].path, "reason": reason}
                    for i, reason in batch.unreadable
                ]
                if batch.indices:
                    names = [manifest.records[rows[i]].path for i in batch.indices]
                    collected.append(_encode(codec, batch.images, names, seed))
                    kept += [rows[i] for i in batch.indices]
                task.advance(len(batch.indices) + len(batch.unreadable))
            if writing is not None:
                writing.result()
            shape = (0, codec.spec.latent_channels, 1, 1)
            latents = np.concatenate(collected) if collected else np.zeros(shape, np.float32)
            writing = writer.submit(_write_shard, output, number, latents, kept, unreadable)
            encoded_now += len(kept)
        if writing is not None:
            writing.result()
    encoded_now = sum(ranks.gather(encoded_now))  # also waits for every process
    if ranks.is_main:
        _write_meta(manifest, codec, output, image_size, len(numbers))
    ranks.barrier()
    store = LatentStore.open(output)
    if len(store.unreadable) > max_unreadable:
        first = "; ".join(f"{u.path}: {u.reason}" for u in store.unreadable[:3])
        raise UnreadableLimitError(
            f"{len(store.unreadable)} image(s) could not be read, --max-unreadable is "
            f"{max_unreadable}: {first}"
        )
    archive = None
    if package:
        archive = Path(f"{output}.tar.gz")
        if ranks.is_main:
            _write_package(output, archive, len(numbers))
    return EncodingResult(
        folder=str(output),
        num_images=len(store),
        num_shards=len(numbers),
        num_encoded_now=encoded_now,
        codec=store.spec,
        image_size=store.image_size,
        mean=store.mean,
        std=store.std,
        unreadable=store.unreadable,
        package=None if archive is None else str(archive),
    )


def _encode(
    codec: Codec, images: torch.Tensor, names: Sequence[str], seed: int
) -> NDArray[np.float32]:
    if codec.spec.posterior == "mean":
        latents: NDArray[np.float32] = codec.encode(images).cpu().numpy()
        return latents
    samples = []
    for image, name in zip(images, names, strict=True):  # so that batches do not matter
        digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
        generator = torch.Generator(codec.device).manual_seed(
            int.from_bytes(digest[:8], "big") >> 1
        )
        samples.append(codec.encode(image[None], generator=generator).cpu().numpy())
    return np.concatenate(samples)


def _to_bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _to_text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogateescape")


def _shard_range(number: int, total: int) -> range:
    return range(number * SHARD_RECORDS, min((number + 1) * SHARD_RECORDS, total))


def _shard_name(number: int) -> str:
    return f"{number:06d}.npy"


def _side_path(output: Path, number: int) -> Path:
    return output / SHARD_FOLDER / f"{number:06d}.json"


def _write_shard(
    output: Path,
    number: int,
    latents: NDArray[np.float32],
    kept: list[int],
    unreadable: list[dict[str, str]],
) -> None:
    path = output / SHARD_FOLDER / _shard_name(number)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents, allow_pickle=False)
    exact = latents.astype(np.float64)
    write_json(  # last, so that a shard with a side file is complete
        _side_path(output, number),
        {
            "file": _shard_name(number),
            "sha256": sha256_file(path),
            "rows": kept,
            "unreadable": unreadable,
            "pixels": int(latents.shape[0] * latents.shape[2] * latents.shape[3]),
            "sum": exact.sum(axis=(0, 2, 3)).tolist(),
            "sum_of_squares": np.square(exact).sum(axis=(0, 2, 3)).tolist(),
        },
    )


def _read_side(output: Path, number: int) -> dict[str, Any] | None:
    side, path = _side_path(output, number), output / SHARD_FOLDER / _shard_name(number)
    if not side.is_file() or not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(side.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return values


def _write_plan(
    manifest: Manifest, codec: Codec, output: Path, *, image_size: int, seed: int
) -> None:
    spec = {
        k: v for k, v in dataclasses.asdict(codec.spec).items() if k not in ("name", "revision")
    }
    plan = {
        "codec": spec,
        "image_size": image_size,
        "manifest_digest": manifest.digest,
        "seed": seed if codec.spec.posterior == "sample" else None,
        "shard_records": SHARD_RECORDS,
    }
    path = output / PLAN_NAME
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in plan if known.get(key) != plan[key])
        if different:
            raise InputError(
                f"{output}: holds latents made with another {', '.join(different)}; choose another "
                "folder, or remove this one"
            )
    write_json(path, plan)


def _write_meta(
    manifest: Manifest, codec: Codec, output: Path, image_size: int, num_shards: int
) -> None:
    import pyarrow
    import pyarrow.parquet

    shards, unreadable, rows = [], [], []
    channels = codec.spec.latent_channels
    total, square, pixels = np.zeros(channels), np.zeros(channels), 0
    for number in range(num_shards):
        side = _read_side(output, number)
        assert side is not None
        shards.append({"file": side["file"], "sha256": side["sha256"]})
        unreadable += side["unreadable"]
        rows += [(r, number, i) for i, r in enumerate(side["rows"])]
        total += np.asarray(side["sum"])  # in shard order: the same for any number of processes
        square += np.asarray(side["sum_of_squares"])
        pixels += side["pixels"]
    mean = total / max(pixels, 1)
    std = np.sqrt(np.maximum(square / max(pixels, 1) - np.square(mean), STD_FLOOR**2))
    records = [manifest.records[r] for r, _, _ in rows]
    table = pyarrow.table(
        {
            # Bytes, because file names need not be text.
            **{
                column: pyarrow.array([_to_bytes(r[place]) for r in records], pyarrow.binary())
                for place, column in enumerate(_COLUMNS)
            },
            "shard": pyarrow.array([s for _, s, _ in rows], pyarrow.int64()),
            "row": pyarrow.array([i for _, _, i in rows], pyarrow.int64()),
        }
    )
    with atomic_path(output / INDEX_NAME) as temporary:
        pyarrow.parquet.write_table(table, temporary)
    write_json(
        output / META_NAME,
        {
            "format": FORMAT_VERSION,
            "codec": dataclasses.asdict(codec.spec),
            "image_size": image_size,
            "manifest_digest": manifest.digest,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "unreadable": unreadable,
            "shards": shards,
        },
    )


def _write_package(output: Path, archive: Path, num_shards: int) -> None:
    """Pack this store's own files; equal stores give equal bytes."""
    names = [META_NAME, PLAN_NAME, INDEX_NAME]
    for number in range(num_shards):
        side = _side_path(output, number)
        names += [f"{SHARD_FOLDER}/{_shard_name(number)}", f"{SHARD_FOLDER}/{side.name}"]
    with (
        atomic_path(archive) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(names):
            data = (output / name).read_bytes()
            info = tarfile.TarInfo(f"{output.name}/{name}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))

"""Latents on disk: fixed-size shards that are written once, and an index over them.

A shard holds the readable images of a fixed run of list rows, so shards can be made in any order,
by any number of processes, and a stopped run continues with the missing ones. Latents are raw;
statistics of the whole data set stand beside them (method: arXiv 2512.14421).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import tarfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lcmem_cli.engine.compute import DEFAULT_COMPUTE, Compute
from lcmem_cli.engine.data.batching import Batching
from lcmem_cli.engine.data.images import is_readable
from lcmem_cli.engine.data.loading import LoadedBatch, Transform, hash_files, iter_images
from lcmem_cli.engine.data.manifest import Manifest, Record
from lcmem_cli.engine.data.remarks import is_remarkable, no_remarks, remarks_texts
from lcmem_cli.engine.distributed import Ranks, one_torch_thread
from lcmem_cli.engine.documents import FileName, read_document
from lcmem_cli.engine.errors import InputError, LcmemError, NotFiniteError
from lcmem_cli.engine.files import atomic_path, folder_lock, sha256_file, write_json
from lcmem_cli.engine.models.codec import Codec, CodecSpec
from lcmem_cli.engine.precision import Precision, computing_in, resolve_precision, to_device
from lcmem_cli.engine.reporter import Reporter
from lcmem_cli.engine.results import Result, Unreadable, check_unreadable
from lcmem_cli.engine.store.integrity import check_file, naming_damage

FORMAT_VERSION: Literal[1] = 1
META_NAME, PLAN_NAME, INDEX_NAME, SHARD_FOLDER = "meta.json", "plan.json", "index.parquet", "shards"
SHARD_RECORDS = 256
SHARD_BYTES = 1 << 26
STD_FLOOR = 1e-12
_LIGHT_BYTES = 16 << 20
_COLUMNS = ("path", "id", "Split", "ds_name")
_CONTENT = "content"
_REMEDY = "run the same lcmem latents command again, which makes it anew"


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
        precision: what the codec computed in.
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
    precision: Precision = "fp32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LeftOut:
    """An image that gave no latent."""

    path: FileName
    reason: FileName


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ListedShard:
    """A shard in the list of a finished store."""

    file: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Meta:
    """What ``meta.json`` of a finished store says; ``codec`` is a ``CodecSpec``."""

    format: Literal[1]
    codec: dict[str, Any]
    image_size: int
    manifest_digest: str
    index_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: tuple[_LeftOut, ...]
    shards: tuple[_ListedShard, ...]
    precision: Precision = "fp32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    """What stands beside a shard.

    Attributes:
        file: its name.
        sha256: of it.
        rows: of the list, one a latent.
        contents: SHA-256 of each of these rows' files.
        unreadable: images of the shard that gave no latent.
        pixels: over all its latents.
        sum: per channel.
        sum_of_squares: per channel.
    """

    file: str
    sha256: str
    rows: list[int]
    contents: list[str]
    unreadable: list[_LeftOut]
    pixels: int
    sum: list[float]
    sum_of_squares: list[float]


class LatentStore:
    """A finished store, opened for reading; a shard is compared with its checksum on first use.

    Attributes:
        folder: where it is.
        records: images in the store, in list order.
        contents: SHA-256 of the file that each image's latent was made from.
        spec: codec that made the latents.
        image_size: side in pixels of what was encoded.
        mean: per channel ``[C]``.
        std: per channel ``[C]``.
        manifest_digest: of the image list.
        unreadable: images left out.
        precision: what the codec computed in.
    """

    def __init__(self, folder: Path, meta: _Meta, table: Any) -> None:
        self.folder = folder
        self.spec = CodecSpec(**meta.codec)
        self.image_size, self.manifest_digest = meta.image_size, meta.manifest_digest
        self.mean, self.std, self.precision = meta.mean, meta.std, meta.precision
        self.unreadable = tuple(Unreadable(path=u.path, reason=u.reason) for u in meta.unreadable)
        self._shards = meta.shards
        for shard in self._shards:
            if Path(shard.file).name != shard.file:
                raise ValueError(f"shard {shard.file!r} lies outside of the store")
        self._verified: set[int] = set()
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        self.records = tuple(
            Record(*(_to_text(value) for value in row))  # type: ignore[arg-type]
            for row in zip(*(columns[name] for name in _COLUMNS), strict=True)
        )
        self.contents: tuple[str, ...] = tuple(columns[_CONTENT])
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
        import pyarrow.parquet

        if not (folder / META_NAME).is_file():
            state = "its encoding was not finished: run lcmem latents again"
            hint = state if (folder / PLAN_NAME).is_file() else "make one with: lcmem latents"
            raise InputError(f"{folder}: no latent store there; {hint}")
        meta = read_document(folder / META_NAME, _Meta, remedy=_REMEDY)
        with naming_damage(folder / INDEX_NAME, _REMEDY):
            check_file(folder / INDEX_NAME, meta.index_sha256)
            return cls(folder, meta, pyarrow.parquet.read_table(folder / INDEX_NAME))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def latents(self, rows: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """Return raw latents ``[n, C, h, w]`` float32 of some rows of ``records``."""
        if not len(rows):
            side = self.image_size // self.spec.downsampling
            return torch.zeros(0, self.spec.latent_channels, side, side)
        return torch.from_numpy(
            np.stack([self._map(int(self._shard[r]))[self._row[r]] for r in rows])
        )

    def check_unchanged(self, contents: Mapping[str, str | None]) -> None:
        """Refuse images that are not those that the latents were made from.

        Args:
            contents: SHA-256 of files as they are now, by the records' paths; ``None``, or none,
                where a file is not there any more or does not matter.

        Raises:
            InputError: files have changed; names the first.
        """
        changed = [
            record.path
            for record, before in zip(self.records, self.contents, strict=True)
            if (now := contents.get(record.path)) is not None and now != before
        ]
        if changed:
            raise InputError(
                f"{self.folder}: {len(changed):,} image(s) have changed since their latents were "
                f"made, the first is {changed[0]!r}; run the same lcmem latents "
                "command again, which makes them anew"
            )

    def measure(self) -> None:
        """Compare the shape of every shard with the index, which takes no reading of it.

        Raises:
            CorruptFileError: naming the first shard that is cut short, missing or another.
        """
        side = self.image_size // self.spec.downsampling
        counts = np.bincount(self._shard, minlength=len(self._shards))
        for number in range(len(self._shards)):
            path = self._path(number)
            with naming_damage(path, _REMEDY):
                found = np.load(path, mmap_mode="r", allow_pickle=False).shape
                wanted = (int(counts[number]), self.spec.latent_channels, side, side)
                if found != wanted:
                    raise ValueError(f"it holds {found}, expected {wanted}")

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            CorruptFileError: naming the first shard that differs or is missing.
        """
        for number in range(len(self._shards)):
            self._verify(number)

    def select(self, split: str) -> list[int]:
        """Return the rows of one split."""
        return [row for row, record in enumerate(self.records) if record.split == split]

    def _path(self, number: int) -> Path:
        return self.folder / SHARD_FOLDER / self._shards[number].file

    def _verify(self, number: int) -> None:
        if number not in self._verified:
            with naming_damage(self._path(number), _REMEDY):
                check_file(self._path(number), self._shards[number].sha256)
            self._verified.add(number)

    def _open_shard(self, number: int) -> NDArray[np.float32]:
        self._verify(number)
        shard: NDArray[np.float32] = np.load(self._path(number), mmap_mode="r", allow_pickle=False)
        return shard


def encode_latents(
    manifest: Manifest,
    codec: Codec,
    output: Path,
    compute: Compute = DEFAULT_COMPUTE,
    *,
    image_size: int,
    seed: int = 0,
    max_unreadable: int = 0,
    package: bool = False,
) -> EncodingResult:
    """Encode every image of a list, continuing what an earlier run left unfinished.

    Shards that are there and match their checksum are kept; the others are made anew, and so are
    those that lack an image which can be read by now, or hold one whose file has changed. A shard's
    bytes depend neither on the number of processes nor on where an earlier run was stopped.

    Args:
        manifest: images to encode.
        codec: frozen encoder.
        output: folder of the store.
        compute: how it is done. The batch size is that of a codec call, or of what is decoded ahead
            where the codec is light; latents do not depend on it.
        image_size: side in pixels that images are resized to.
        seed: of posterior samples; each image has its own.
        max_unreadable: tolerated unreadable images.
        package: also write ``<output>.tar.gz``.

    Raises:
        InputError: the folder holds latents of another codec, size or list, or the codec does not
            take the size.
        UnreadableLimitError: more unreadable images than tolerated; the readable ones are kept.
        NotFiniteError: the codec gives NaN or infinity for an image; names it.
    """
    codec.check_sides(image_size, image_size)  # before anything is written
    ranks = compute.ranks
    with folder_lock(output) if ranks.is_main else contextlib.nullcontext():
        precision = resolve_precision(compute.precision or "fp32", codec.device)
        plan = _plan(manifest, codec, image_size=image_size, seed=seed, precision=precision)
        if ranks.is_main:
            _check_plan(output, plan)
        ranks.barrier()  # the plan is there
        shards = _Shards(output, len(manifest), plan["shard_records"])
        missing = _missing(shards, manifest, compute)
        encode = functools.partial(_encode, codec, seed=seed, precision=precision)
        encoder = _Encoder(manifest, codec, shards, image_size, encode, compute)
        made = ranks.gather(encoder.run(ranks.share(missing)))  # also waits for every process
        _tell_remarks(manifest, [item for _, told in made for item in told], compute.reporter)
        if ranks.is_main:
            _write_meta(manifest, codec, shards, image_size, precision)
        ranks.barrier()
        store = LatentStore.open(output)
        check_unreadable(store.unreadable, max_unreadable)
        archive = Path(f"{output.resolve()}.tar.gz") if package else None
        if archive is not None and ranks.is_main:
            _write_package(shards, archive)
    return _result(store, len(shards), sum(count for count, _ in made), archive)


def _result(
    store: LatentStore, num_shards: int, num_encoded_now: int, archive: Path | None
) -> EncodingResult:
    return EncodingResult(
        folder=str(store.folder),
        num_images=len(store),
        num_shards=num_shards,
        num_encoded_now=num_encoded_now,
        codec=store.spec,
        image_size=store.image_size,
        mean=store.mean,
        std=store.std,
        unreadable=store.unreadable,
        package=None if archive is None else str(archive),
        precision=store.precision,
    )


@dataclasses.dataclass(kw_only=True)
class _Shard:
    """A shard before it is written.

    Attributes:
        number: of the shard.
        batches: its latents, ``[n, C, h, w]`` each, at least one.
        rows: of the list, one a latent.
        contents: SHA-256 of each of these rows' files.
        unreadable: images of the shard that gave no latent.
    """

    number: int
    batches: list[NDArray[np.float32]]
    rows: list[int] = dataclasses.field(default_factory=list)
    contents: list[str] = dataclasses.field(default_factory=list)
    unreadable: list[_LeftOut] = dataclasses.field(default_factory=list)


class _Shards:
    """The shards of a store: which rows of the list each holds, and its two files.

    Args:
        folder: the store.
        num_images: length of the list.
        shard_records: rows of the list in every shard but the last.
    """

    def __init__(self, folder: Path, num_images: int, shard_records: int) -> None:
        self.folder = folder
        self.num_images = num_images
        self.shard_records = shard_records

    def __len__(self) -> int:
        return -(-self.num_images // self.shard_records)

    def rows(self, number: int) -> range:
        """Return the rows of the list that a shard is made of."""
        first = number * self.shard_records
        return range(first, min(first + self.shard_records, self.num_images))

    def path(self, number: int) -> Path:
        """Return the file of the latents."""
        return self.folder / SHARD_FOLDER / f"{number:06d}.npy"

    def side_path(self, number: int) -> Path:
        """Return the file that tells what the latents are of."""
        return self.folder / SHARD_FOLDER / f"{number:06d}.json"

    def side(self, number: int) -> _Side:
        """Return what stands in the side file."""
        return read_document(self.side_path(number), _Side, remedy=_REMEDY)

    def whole(self, number: int) -> _Side | None:
        """Return what is told of a shard that is there and matches its checksum."""
        try:
            side = self.side(number)
            check_file(self.path(number), side.sha256)
        except (LcmemError, OSError, ValueError):
            return None
        return side

    def write(self, shard: _Shard) -> None:
        """Write a shard; its side file comes last, so that a shard that has one is complete.

        The file is what ``np.save`` would make of all batches, without a copy of them.
        """
        path = self.path(shard.number)
        channels, height, width = shard.batches[0].shape[1:]
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(shard.batches[0].dtype),
                "fortran_order": False,
                "shape": (len(shard.rows), channels, height, width),
            },
        )
        digest = hashlib.sha256()
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for part in (header.getbuffer(), *(batch.data for batch in shard.batches)):
                file.write(part)
                digest.update(part)
        total, squares = np.zeros(channels), np.zeros(channels)
        for latent in itertools.chain.from_iterable(shard.batches):
            exact = latent.astype(np.float64)
            total += exact.sum(axis=(1, 2))
            squares += np.square(exact).sum(axis=(1, 2))
        side = _Side(
            file=path.name,
            sha256=digest.hexdigest(),
            rows=shard.rows,
            contents=shard.contents,
            unreadable=shard.unreadable,
            pixels=len(shard.rows) * height * width,
            sum=total.tolist(),
            sum_of_squares=squares.tolist(),
        )
        write_json(self.side_path(shard.number), dataclasses.asdict(side))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """A whole shard that an earlier run left.

    Attributes:
        number: of the shard.
        is_finished: whether it need not be made anew.
        num_changed: files that are not what they were when it was made.
    """

    number: int
    is_finished: bool
    num_changed: int


def _tell_remarks(
    manifest: Manifest, told: Sequence[tuple[int, list[int]]], reporter: Reporter
) -> None:
    paths, remarks = manifest.paths(), no_remarks(len(told))
    for place, (_, remark) in enumerate(told):
        remarks[place] = remark
    for text in remarks_texts([paths[row] for row, _ in told], remarks):
        reporter.warn(text)


def _missing(shards: _Shards, manifest: Manifest, compute: Compute) -> list[int]:
    """Return the shards that have to be made, the same in every process, and tell the others."""
    ranks = compute.ranks
    looked_at = [
        _look(shards, number, manifest, compute) for number in ranks.share(range(len(shards)))
    ]
    # Gathered, because all have to share the same list: one that looked later might find more.
    found = [shard for part in ranks.gather(looked_at) for shard in part if shard is not None]
    if ranks.is_main:
        _tell_what_is_there(shards, found, compute.reporter)
    known = {shard.number for shard in found if shard.is_finished}
    return [number for number in range(len(shards)) if number not in known]


def _look(shards: _Shards, number: int, manifest: Manifest, compute: Compute) -> _Found | None:
    """Return what is left of a shard, ``None`` where it is missing or damaged."""
    side = shards.whole(number)
    if side is None:
        return None
    paths = manifest.paths()
    alone = dataclasses.replace(
        compute, ranks=Ranks(), workers=compute.num_workers
    )  # the others look at other shards
    now, _ = hash_files([paths[row] for row in side.rows], alone)
    num_changed = sum(a is not None and a != b for a, b in zip(now, side.contents, strict=True))
    lacking = sorted(set(shards.rows(number)) - set(side.rows))
    return _Found(
        number=number,
        is_finished=not num_changed and not any(is_readable(paths[row]) for row in lacking),
        num_changed=num_changed,
    )


def _tell_what_is_there(shards: _Shards, found: Sequence[_Found], reporter: Reporter) -> None:
    """Report shards that an earlier run left, and those that are made anew."""
    num_finished = sum(shard.is_finished for shard in found)
    if num_finished:
        reporter.event("continuing", shards_found=num_finished, shards=len(shards))
    num_changed = sum(shard.num_changed for shard in found)
    if num_changed:
        reporter.warn(
            f"{shards.folder}: {num_changed:,} image(s) have changed since they were encoded; "
            "their shards are made anew"
        )
    whole = {shard.number for shard in found}
    damaged = [
        shards.path(number).name
        for number in range(len(shards))
        if number not in whole and shards.side_path(number).is_file()
    ]
    if damaged:
        reporter.warn(
            f"{shards.folder}: {len(damaged)} damaged shard(s) are made anew: "
            + ", ".join(damaged[:5])
        )


class _Encoder:
    """Encodes and writes shards.

    While the codec works on a batch, the next is decoded and the last shard is written. A light
    codec on a CPU works in the decoding threads, each on one image, so that all cores are busy with
    whatever is to be done.

    Args:
        manifest: the images.
        codec: what encodes them.
        shards: where the latents go.
        image_size: side in pixels.
        encode: makes latents of images and their names.
        compute: how it is done.
    """

    def __init__(
        self,
        manifest: Manifest,
        codec: Codec,
        shards: _Shards,
        image_size: int,
        encode: Callable[[torch.Tensor, Sequence[str]], NDArray[np.float32]],
        compute: Compute,
    ) -> None:
        self.manifest, self.shards, self.compute = manifest, shards, compute
        self.image_size = image_size
        self.paths = manifest.paths()
        self.batching = Batching(compute.batch_size, codec.device, reporter=compute.reporter)
        self.encode = encode
        self.is_light = (
            codec.device.type == "cpu" and codec.activation_bytes(image_size) <= _LIGHT_BYTES
        )
        self.nothing = np.zeros(
            (0, codec.spec.latent_channels, *_side(codec, image_size)), dtype=np.float32
        )
        self.stop = threading.Event()
        self.num_encoded = 0
        self.remarkable: list[tuple[int, list[int]]] = []

    def run(self, numbers: Sequence[int]) -> tuple[int, list[tuple[int, list[int]]]]:
        """Encode and write some shards.

        Returns:
            How many images were encoded; and those of which there is something to say, with it.
        """
        writing: Future[None] | None = None
        total = sum(len(self.shards.rows(number)) for number in numbers)
        with (
            one_torch_thread() if self.is_light else contextlib.nullcontext(),
            ThreadPoolExecutor(1) as writer,
            self.compute.reporter.task("latents", total, unit="image") as task,
            contextlib.closing(_one_ahead(self._load(numbers), self.stop)) as loaded,
        ):
            for number, batches in itertools.groupby(loaded, lambda item: item[0]):
                shard = _Shard(number=number, batches=[self.nothing])
                for _, batch in batches:
                    self._add(shard, batch)
                    task.advance(len(batch.indices) + len(batch.unreadable))
                if writing is not None:
                    writing.result()
                writing = writer.submit(self.shards.write, shard)
            if writing is not None:
                writing.result()
        return self.num_encoded, self.remarkable

    def _load(self, numbers: Sequence[int]) -> Iterator[tuple[int, LoadedBatch]]:
        # Batches never span shards, so their composition does not depend on what is left to do.
        for number in numbers:
            rows = self.shards.rows(number)
            names = [self.manifest.records[row].path for row in rows]
            batches = iter_images(
                [self.paths[row] for row in rows],
                self.image_size,
                workers=self.compute.num_workers,
                batch_size=self.batching.loaded,
                transform=_each(self.encode, names, self.stop) if self.is_light else None,
            )
            for batch in batches:
                yield number, batch

    def _add(self, shard: _Shard, batch: LoadedBatch) -> None:
        """Add the images of a batch to the shard that they belong to."""
        rows = self.shards.rows(shard.number)
        kept = [rows[index] for index in batch.indices]
        names = [self.manifest.records[row].path for row in kept]
        if names and self.is_light:
            shard.batches.append(batch.images.numpy())
        elif names:
            shard.batches.append(self.batching.call(self.encode, batch.images, names))
        shard.rows += kept
        shard.contents += [batch.hashes[index] for index in batch.indices]
        shard.unreadable += [
            _LeftOut(path=self.manifest.records[rows[index]].path, reason=reason)
            for index, reason in batch.unreadable
        ]
        self.num_encoded += len(kept)
        self.remarkable += [
            (row, remark.tolist())
            for row, remark in zip(kept, batch.remarks, strict=True)
            if is_remarkable(remark)
        ]


def _each(
    encode: Callable[..., NDArray[np.float32]], names: Sequence[str], stop: threading.Event
) -> Transform:
    """Return what makes one decoded image its latent, unless the work was stopped."""

    def transform(image: torch.Tensor, index: int) -> torch.Tensor:
        if stop.is_set():  # what was decoded ahead is not waited for
            raise LcmemError("stopped")
        return torch.from_numpy(encode(image[None], [names[index]])[0])

    return transform


def _one_ahead(
    items: Iterator[tuple[int, LoadedBatch]], stop: threading.Event
) -> Generator[tuple[int, LoadedBatch], None, None]:
    """Make the next item in a thread while the caller works on this one; then set ``stop``."""
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(next, items, None)
            while (item := waiting.result()) is not None:
                waiting = pool.submit(next, items, None)
                yield item
        finally:
            stop.set()


def _side(codec: Codec, image_size: int) -> tuple[int, int]:
    return (image_size // codec.spec.downsampling,) * 2


def _encode(
    codec: Codec, images: torch.Tensor, names: Sequence[str], *, seed: int, precision: Precision
) -> NDArray[np.float32]:
    with computing_in(precision, codec.device):
        latents = _latents(codec, to_device(images, codec.device), names, seed=seed)
    finite = np.isfinite(latents).all(axis=(1, 2, 3))
    if not finite.all():
        name = names[int(finite.argmin())]
        raise NotFiniteError(f"{name}: codec {codec.spec.name} gives values that are not finite")
    return latents


def _latents(
    codec: Codec, images: torch.Tensor, names: Sequence[str], *, seed: int
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


def _plan(
    manifest: Manifest, codec: Codec, *, image_size: int, seed: int, precision: Precision
) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on."""
    height, width = _side(codec, image_size)
    latent_bytes = max(1, 4 * codec.spec.latent_channels * height * width)
    spec = {
        f"codec.{key}": value
        for key, value in dataclasses.asdict(codec.spec).items()
        if key not in ("name", "revision")  # the same weights may lie elsewhere
    }
    return {
        "format": FORMAT_VERSION,
        "image_size": image_size,
        "manifest_digest": manifest.digest,
        "seed": seed if codec.spec.posterior == "sample" else None,
        "precision": None if precision == "fp32" else precision,  # stores had none at first
        **spec,
        "shard_records": max(1, min(SHARD_RECORDS, SHARD_BYTES // latent_bytes)),
    }


def _check_plan(output: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with the one that is there.

    Raises:
        InputError: the folder holds latents that were made in another way; says what differs.
        CorruptFileError: the plan that is there cannot be read.
    """
    path = output / PLAN_NAME
    if path.is_file():
        known = read_document(
            path, dict[str, Any], remedy="remove the folder and run lcmem latents again"
        )
        different = [key for key in plan if known.get(key) != plan[key]]
        if different:
            details = "\n".join(
                f"  {key}: {_short(known.get(key))} there, {_short(plan[key])} now"
                for key in different
            )
            raise InputError(
                f"{output}: holds latents made with another {', '.join(different)}; choose another "
                f"folder, or remove this one\n{details}"
            )
    write_json(path, plan)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _write_meta(
    manifest: Manifest, codec: Codec, shards: _Shards, image_size: int, precision: Precision
) -> None:
    """Write the index and the statistics of a complete store."""
    import pyarrow
    import pyarrow.parquet

    sides = [shards.side(number) for number in range(len(shards))]
    channels = codec.spec.latent_channels
    total, square, pixels = np.zeros(channels), np.zeros(channels), 0
    for side in sides:  # in shard order: the same for any number of processes
        total += np.asarray(side.sum)
        square += np.asarray(side.sum_of_squares)
        pixels += side.pixels
    mean = total / max(pixels, 1)
    std = np.sqrt(np.maximum(square / max(pixels, 1) - np.square(mean), STD_FLOOR**2))
    records = [manifest.records[row] for side in sides for row in side.rows]
    counts = [len(side.rows) for side in sides]
    table = pyarrow.table(
        {
            # Bytes, because file names need not be text.
            **{
                column: pyarrow.array([_to_bytes(r[place]) for r in records], pyarrow.binary())
                for place, column in enumerate(_COLUMNS)
            },
            _CONTENT: pyarrow.array([c for side in sides for c in side.contents], pyarrow.string()),
            "shard": pyarrow.array(np.repeat(np.arange(len(sides)), counts), pyarrow.int64()),
            "row": pyarrow.array([i for n in counts for i in range(n)], pyarrow.int64()),
        }
    )
    with atomic_path(shards.folder / INDEX_NAME) as temporary:
        pyarrow.parquet.write_table(table, temporary)
    meta = _Meta(
        format=FORMAT_VERSION,
        codec=dataclasses.asdict(codec.spec),
        image_size=image_size,
        manifest_digest=manifest.digest,
        index_sha256=sha256_file(shards.folder / INDEX_NAME),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        unreadable=tuple(item for side in sides for item in side.unreadable),
        shards=tuple(_ListedShard(file=side.file, sha256=side.sha256) for side in sides),
        precision=precision,
    )
    write_json(shards.folder / META_NAME, dataclasses.asdict(meta))


def _write_package(shards: _Shards, archive: Path) -> None:
    """Pack this store's own files; equal stores give equal bytes."""
    names = [META_NAME, PLAN_NAME, INDEX_NAME]
    for number in range(len(shards)):
        for path in (shards.path(number), shards.side_path(number)):
            names.append(f"{SHARD_FOLDER}/{path.name}")
    with (
        atomic_path(archive) as temporary,
        temporary.open("wb") as raw,
        # Latents are noise to a compressor: more effort than the least gains nothing.
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(names):
            data = (shards.folder / name).read_bytes()
            info = tarfile.TarInfo(f"{shards.folder.resolve().name}/{name}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))

"""Embedding files: once per content, in any order of work, in bounded memory, resumable."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Listener
from PIL import Image

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data import loading
from lcmem_cli.engine.data.batching import AUTO, Batching
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.perturb import Setting
from lcmem_cli.engine.data.reading import read_bytes
from lcmem_cli.engine.detectors import embedding
from lcmem_cli.engine.detectors.embedding import EmbeddedFiles
from lcmem_cli.engine.detectors.pixel import MSE, PHash
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.detectors.vectors import NetworkDetector, Preprocessing
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import InputError, LcmemError
from lcmem_cli.engine.evaluation.inference import score_pairs
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.store import features
from lcmem_cli.engine.store import latents as latent_store
from lcmem_cli.engine.store.features import FeatureCaches
from lcmem_cli.engine.store.latents import LatentStore, encode_latents


def embed_files(detector: Any, paths: Any, **options: Any) -> EmbeddedFiles:
    return embedding.embed_files(detector, paths, Compute(**options))


def embed_perturbed(
    detector: Any, paths: Any, setting: Any, *, working_size: int, seed: int = 0, **options: Any
) -> EmbeddedFiles:
    round_trip = options.pop("round_trip", None)
    (found,) = embedding.embed_perturbed(
        [detector],
        paths,
        setting,
        working_size=working_size,
        seed=seed,
        round_trip=round_trip,
        compute=Compute(**options),
    )
    return found


class Counting(NetworkDetector):
    """Averages image quarters, and counts the images that it was given."""

    def __init__(self) -> None:
        super().__init__(
            name="counting",
            fingerprint="c" * 64,
            preprocessing=Preprocessing(size=16),
            num_features=12,
        )
        self.seen = 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen += len(batch)
        return torch.nn.functional.adaptive_avg_pool2d(batch, 2).flatten(1)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Nine files of six contents: two unreadable, one missing, two copies."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = []
    for number in range(6):
        path = folder / f"{number}'\n.png"
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        names.append(path)
    names[1].write_bytes(b"no image")
    shutil.copyfile(names[0], folder / "copy.png")
    shutil.copyfile(names[1], folder / "broken copy.png")
    return [*names, folder / "copy.png", folder / "missing.png", folder / "broken copy.png"]


ROWS = [0, -1, 1, 2, 3, 4, 0, -1, -1]


def same(a: EmbeddedFiles, b: EmbeddedFiles) -> None:
    np.testing.assert_array_equal(a.features, b.features)
    np.testing.assert_array_equal(a.rows, b.rows)
    assert a.content_hashes == b.content_hashes
    assert a.unreadable == b.unreadable


def test_each_content_is_embedded_once_and_nothing_is_dropped_silently(paths: list[Path]) -> None:
    detector = Counting()
    found = embed_files(detector, paths, workers=0)
    assert found.rows.tolist() == ROWS
    assert found.encoder_passes == detector.seen == 5
    assert [(item.path, item.reason.split(" (")[0]) for item in found.unreadable] == [
        (str(paths[1]), "not an image in a known format"),
        (str(paths[7]), "no such file"),
        (str(paths[8]), "not an image in a known format"),
    ]
    assert [h is None for h in found.content_hashes] == [row < 0 for row in ROWS]
    for index in (0, 2, 5, 6):
        expected = detector.embed([paths[index]])[0]
        np.testing.assert_array_equal(found.features[found.rows[index]], expected)


def test_a_network_of_ours_without_finite_features_for_an_image_names_it(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector("joint", device="cpu")
    Image.new("RGB", (9, 9), (20, 20, 20)).save(paths[3])
    network = detector.network.network
    forward = network.forward

    def blind(latents: torch.Tensor) -> torch.Tensor:
        plain = latents.std(dim=(2, 3)).mean(dim=1) < 0.15
        return torch.where(plain[:, None], torch.nan, forward(latents))

    monkeypatch.setattr(network, "forward", blind)
    found = embed_files(detector, paths, batch_size=32, workers=1)
    reasons = {item.path: item.reason for item in found.unreadable}
    assert "not finite" in reasons[str(paths[3])] and np.isfinite(found.features).all()


class Blind(Counting):
    """Has no features for dark images."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        features = super().forward(batch)
        return torch.where(features.mean(1, keepdim=True) < 0.3, torch.nan, features)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_an_image_without_finite_features_is_named_and_the_others_are_kept(
    paths: list[Path], batch_size: int
) -> None:
    Image.new("RGB", (9, 9), (20, 20, 20)).save(paths[3])
    found = embed_files(Blind(), paths, batch_size=batch_size, workers=1)
    assert found.rows.tolist() == [0, -1, 1, -1, 2, 3, 0, -1, -1]
    reasons = {item.path: item.reason for item in found.unreadable}
    assert (
        "detector 'counting'" in reasons[str(paths[3])] and "not finite" in reasons[str(paths[3])]
    )
    expected = embed_files(Counting(), [path for path in paths if path != paths[3]], workers=0)
    np.testing.assert_allclose(found.features, expected.features, atol=1e-6)
    with pytest.raises(LcmemError, match="not finite"):
        Blind().embed([paths[3]])
    pairs = [(paths[0], paths[2]), (paths[3], paths[4])]
    scored = score_pairs(Blind(), pairs, batch_size=batch_size, max_unreadable=1)
    assert [item.path for item in scored.unreadable] == [str(paths[3])]
    assert scored.pairs[0].score is not None and scored.pairs[1].score is None
    if batch_size > 1:  # a network that fails for all is no fault of the images
        Image.new("RGB", (9, 9), (10, 20, 20)).save(paths[4])
        with pytest.raises(LcmemError, match="detector 'counting': its output holds values"):
            embed_files(Blind(), [paths[3], paths[4]], batch_size=batch_size)


@pytest.mark.parametrize("make", [Counting, lambda: MSE(16), lambda: PHash(16)])
def test_the_result_depends_on_neither_batches_nor_workers_nor_memory(
    make: Any, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embed_files(make(), paths, batch_size=32, workers=0)
    assert whole.features.dtype == make().feature_dtype
    for batch_size, workers in ((1, 0), (2, 2), (7, 1)):
        same(embed_files(make(), paths, batch_size=batch_size, workers=workers), whole)
    monkeypatch.setattr(embedding, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(embedding, "_ROUND_IMAGES", 2)
    mapped = embed_files(make(), paths, batch_size=1, workers=1)
    assert isinstance(mapped.features, np.memmap)
    same(mapped, whole)


def test_a_second_run_embeds_nothing(paths: list[Path], tmp_path: Path) -> None:
    detector = Counting()
    runs = [embed_files(detector, paths, cache=FeatureCaches(tmp_path / "cache")) for _ in range(2)]
    same(*runs)
    assert [run.encoder_passes for run in runs] == [5, 0]
    assert detector.seen == 5
    other = Counting()
    other.fingerprint = "d" * 64
    assert embed_files(other, paths, cache=FeatureCaches(tmp_path / "cache")).encoder_passes == 5


def test_files_that_have_not_changed_are_not_read_again(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_PART_FILES", 4)
    monkeypatch.setattr(features, "SETTLED_SECONDS", -3600.0)  # the files are new
    read: list[Path] = []

    def reading(path: Path) -> tuple[bytes | None, str]:
        read.append(path)
        return read_bytes(path)

    monkeypatch.setattr(loading, "read_bytes", reading)

    def run() -> EmbeddedFiles:
        read.clear()
        return embed_files(Counting(), paths, cache=FeatureCaches(tmp_path / "cache"))

    first = run()
    assert read == paths
    same(run(), first)
    assert read == [paths[i] for i in (1, 6, 7, 8)]  # unreadable ones, and a copy
    told = paths[2].stat()
    paths[2].write_bytes(paths[3].read_bytes().ljust(told.st_size, b"\0")[: told.st_size])
    os.utime(paths[2], ns=(told.st_atime_ns, told.st_mtime_ns))
    assert run().content_hashes[2] != first.content_hashes[2] and paths[2] in read


def test_files_that_changed_just_now_are_read_again(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_files(Counting(), paths, cache=FeatureCaches(tmp_path / "cache"))
    monkeypatch.setattr(loading, "read_bytes", None)
    with pytest.raises(TypeError):
        embed_files(Counting(), paths[:1], cache=FeatureCaches(tmp_path / "cache"))


class Interrupted(Counting):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self.seen == 4:
            raise KeyboardInterrupt
        return super().forward(batch)


def test_an_interrupted_run_goes_on_where_it_stopped(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_ROUND_IMAGES", 2)
    with pytest.raises(KeyboardInterrupt):
        embed_files(Interrupted(), paths, batch_size=1, cache=FeatureCaches(tmp_path / "cache"))
    again = embed_files(Counting(), paths, batch_size=1, cache=FeatureCaches(tmp_path / "cache"))
    assert again.encoder_passes < 5
    same(again, embed_files(Counting(), paths))


def test_a_cache_that_cannot_be_written_stops_nothing(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    cache = FeatureCaches(tmp_path / "cache")
    monkeypatch.setattr(cache.open("c" * 64, 12), "put_many", full)
    listening = Listener()
    same(
        embed_files(Counting(), paths, cache=cache, reporter=listening),
        embed_files(Counting(), paths),
    )
    assert len(listening.warnings) == 1 and "No space left" in listening.warnings[0]
    embed_files(Counting(), paths, cache=cache, reporter=listening)  # the next set of a study
    assert len(listening.warnings) == 1


def test_images_whose_brightness_was_guessed_are_counted(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values * 15).save(tmp_path / "a.png")
    listening = Listener()
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    files = [tmp_path / name for name in ("c.png", "b.png", "a.png", "a.png")]
    cache = FeatureCaches(tmp_path / "cache")
    for passes in (2, 0):  # computed, and from the cache
        listening = Listener()
        made = embed_files(Counting(), files, cache=cache, reporter=listening)
        assert made.encoder_passes == passes and made.guessed.tolist() == [False, True]
        assert "1 image(s)" in listening.warnings[0] and len(listening.warnings) == 1
        cache = FeatureCaches(tmp_path / "cache")


class ThreadRanks(Ranks):
    """Two processes played by two threads."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, 2)
        self.table, self.meeting = table, barrier

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.meeting.wait()
        values = list(self.table)
        self.meeting.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


@pytest.mark.parametrize("round_images", [1, 512])
def test_several_processes_share_the_work_and_all_get_the_result(
    round_images: int, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_ROUND_IMAGES", round_images)
    alone = embed_files(Counting(), paths, batch_size=1)

    def together() -> tuple[list[EmbeddedFiles], list[Counting]]:
        table: list[Any] = [None, None]
        barrier = threading.Barrier(2, timeout=60)
        found: list[Any] = [None, None]
        detectors = [Counting(), Counting()]

        def work(rank: int) -> None:
            found[rank] = embed_files(
                detectors[rank],
                paths,
                batch_size=1,
                workers=0,
                cache=FeatureCaches(tmp_path / f"cache{rank}"),
                ranks=ThreadRanks(rank, table, barrier),
            )

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, detectors

    found, detectors = together()
    for result in found:
        same(result, alone)
        assert result.encoder_passes == 5
    assert sorted(detector.seen for detector in detectors) == [2, 3]
    found, detectors = together()  # only the first process has a cache
    for result in found:
        same(result, alone)
    assert sum(detector.seen for detector in detectors) == 0


def test_edited_images_are_embedded_once_per_setting(paths: list[Path], tmp_path: Path) -> None:
    detector = Counting()
    cache = FeatureCaches(tmp_path / "cache")
    options: dict[str, Any] = {"working_size": 24, "seed": 3, "workers": 0, "cache": cache}
    noisy = embed_perturbed(detector, paths, Setting("Noise", 0.1), **options)
    assert (noisy.rows.tolist(), noisy.encoder_passes) == (ROWS, 5)
    again = embed_perturbed(detector, paths, Setting("Noise", 0.1), **options)
    same(again, noisy)
    assert again.encoder_passes == 0
    for setting, seed in ((Setting("Noise", 0.2), 3), (Setting("Noise", 0.1), 4), (None, 3)):
        other = embed_perturbed(detector, paths, setting, **{**options, "seed": seed})
        assert other.encoder_passes == 5
        assert not np.array_equal(other.features, noisy.features)
    with pytest.raises(InputError, match="Noise"):
        embed_perturbed(detector, paths, Setting("Noisy", 0.1), **options)


def test_noise_depends_on_the_image_alone(paths: list[Path]) -> None:
    options: dict[str, Any] = {"working_size": 24, "seed": 3}
    whole = embed_perturbed(MSE(16), paths, Setting("Noise", 0.2), **options)
    alone = embed_perturbed(
        MSE(16), paths[4:5], Setting("Noise", 0.2), workers=2, batch_size=1, **options
    )
    np.testing.assert_array_equal(alone.features[0], whole.features[whole.rows[4]])


def test_an_edit_is_made_at_the_working_size(paths: list[Path]) -> None:
    flipped = embed_perturbed(MSE(16), paths[:1], Setting("HorizontalFlip", 1.0), working_size=16)
    plain = embed_files(MSE(16), paths[:1])
    np.testing.assert_array_equal(
        flipped.features.reshape(3, 16, 16)[:, :, ::-1], plain.features.reshape(3, 16, 16)
    )


def test_a_round_trip_is_not_cached(paths: list[Path], tmp_path: Path) -> None:
    detector = Counting()
    cache = FeatureCaches(tmp_path / "cache")
    setting = Setting("VAERoundTrip", 1.0)
    for number in (1, 2):
        embed_perturbed(
            detector,
            paths[:1],
            setting,
            working_size=16,
            round_trip=lambda images: images * 0.5,
            cache=cache,
        )
        assert detector.seen == number


class SmallCard(Counting):
    """Has room for a few images only, as a graphics card has."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Forty different images."""
    rng = np.random.default_rng(1)
    for number in range(40):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    return sorted(tmp_path.glob("*.png"))


def test_auto_halves_the_batches_until_they_fit(many: list[Path]) -> None:
    detector = SmallCard(room=5)
    found = embed_files(detector, many, batch_size=AUTO)
    same(found, embed_files(Counting(), many, batch_size=7))
    assert detector.sizes == [32, 16, 8, *[4] * 10]
    assert detector.seen == found.encoder_passes == 40
    pairs = list(itertools.pairwise(many))
    for size in (AUTO, 3):
        result = score_pairs(SmallCard(room=5), pairs, batch_size=size)
        assert [p.score for p in result.pairs] == [
            p.score for p in score_pairs(Counting(), pairs).pairs
        ]


def test_a_fixed_size_and_a_single_image_that_do_not_fit(many: list[Path]) -> None:
    with pytest.raises(LcmemError, match=r"with 32 image.*--batch-size auto"):
        embed_files(SmallCard(room=5), many, batch_size=32)
    hopeless = SmallCard(room=0)
    with pytest.raises(LcmemError, match=r"with 1 image.*--device cpu"):
        embed_files(hopeless, many, batch_size=AUTO)
    assert hopeless.sizes == [32, 16, 8, 4, 2, 1]


def test_auto_begins_with_what_the_device_is_good_for() -> None:
    assert (Batching(AUTO, "cuda:0").loaded, Batching(AUTO, "cpu").loaded) == (128, 32)
    assert Batching(7, "cuda").loaded == 7


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_latents_are_encoded_in_batches_that_fit(
    posterior: Any, many: list[Path], tiny_codec: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    manifest = load_manifest(many[0].parent)
    codec = load_codec(str(tiny_codec), posterior=posterior)

    def store(name: str, batch_size: int) -> torch.Tensor:
        how = Compute(batch_size=batch_size)
        encode_latents(manifest, codec, tmp_path / name, how, image_size=16)
        return LatentStore.open(tmp_path / name).latents(range(40))

    monkeypatch.setattr(latent_store, "_LIGHT_BYTES", 0)  # as on a card: not in decoding threads
    expected = store("fixed", 16)
    sizes: list[int] = []
    inner = latent_store._encode

    def small(codec: Any, images: torch.Tensor, names: list[str], **options: Any) -> Any:
        sizes.append(len(images))
        assert len(names) == len(images)
        if len(images) > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return inner(codec, images, names, **options)

    monkeypatch.setattr(latent_store, "_encode", small)
    assert torch.equal(store("auto", AUTO), expected)
    assert sizes == [32, 16, 8, 8, 8, 8, 8]


def test_the_option_takes_auto(run_cli: Any, many: list[Path], tmp_path: Path) -> None:
    folder, command = many[0].parent, ["--detector", "mse", "--json", "--batch-size"]
    found = [
        run_cli("index", "build", folder, "-o", tmp_path / size, *command, size).stdout
        for size in ("auto", "3")
    ]
    assert found[0].replace(str(tmp_path / "auto"), str(tmp_path / "3")) == found[1]
    refused = run_cli("index", "build", folder, "-o", tmp_path / "x", *command, "0", exit_code=2)
    assert "expected a number from 1" in refused.stderr


def test_no_files_and_no_room(monkeypatch: pytest.MonkeyPatch, paths: list[Path]) -> None:
    empty = embed_files(MSE(16), [])
    assert empty.features.shape == (0, 768) and empty.features.dtype == np.uint8
    assert empty.rows.shape == (0,) and empty.encoder_passes == 0

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(embedding.os, "posix_fallocate", full)
    with pytest.raises(LcmemError, match="set TMPDIR"):
        embed_files(MSE(16), paths)


def test_the_allocator_is_left_alone_where_the_user_has_set_it(monkeypatch):
    import ctypes

    from lcmem_cli.engine.distributed import keep_freed_memory, resolve_device

    asked = []

    class Library:
        def mallopt(self, option, value):
            asked.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_device("cpu") == "cpu" and not asked
    keep_freed_memory()
    assert dict(asked) == {-3: 2**30, -1: 2**31 - 1}
    asked.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    keep_freed_memory()
    assert not asked

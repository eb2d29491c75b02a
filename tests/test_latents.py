import io
import json
import signal
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Listener, draw_identity

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import load_manifest, write_manifest
from lcmem_cli.engine.errors import (
    CorruptFileError,
    FolderBusyError,
    InputError,
    NotFiniteError,
    UnreadableLimitError,
)
from lcmem_cli.engine.files import folder_lock, sha256_file
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.store import latents
from lcmem_cli.engine.store.latents import LatentStore, encode_latents


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD_RECORDS", 10)


@pytest.fixture
def encode(image_folder, tiny_codec):
    def run(output, *, size=16, posterior="mean", input_range="symmetric", **options):
        codec = load_codec(
            str(tiny_codec), device="cpu", posterior=posterior, input_range=input_range
        )
        manifest = load_manifest(image_folder, max_missing=5)
        how = {k: options.pop(k) for k in ("batch_size", "reporter") if k in options}
        return encode_latents(
            manifest, codec, output, Compute(workers=1, **how), image_size=size, **options
        )

    return run


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".lock", ".tmp"))
    }


def test_latents_do_not_depend_on_the_batch_size(encode, tmp_path):
    encode(tmp_path / "a", batch_size=3)
    encode(tmp_path / "b", batch_size=64)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["heavy", "light"])
def test_a_light_codec_leaves_the_cores_to_the_decoding_threads(
    encode, tmp_path, monkeypatch, limit
):
    """Then latents do not depend on torch's number of threads, whose sums differ by rounding."""
    monkeypatch.setattr(latents, "_LIGHT_BYTES", limit)
    seen = []
    plain = Codec.encode

    def spy(self, images, **options):
        seen.append((len(images), torch.get_num_threads()))
        return plain(self, images, **options)

    monkeypatch.setattr(Codec, "encode", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encode(tmp_path / "two", batch_size=5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == ({(1, 1)} if limit else {(5, 2), (2, 2)})
    encode(tmp_path / "one")
    rows = range(72)
    one, two = (LatentStore.open(tmp_path / name).latents(rows) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=0 if limit else 1e-4)


def test_what_was_decoded_ahead_is_not_encoded_after_an_error(encode, tmp_path, monkeypatch):
    calls = []

    def failing(codec, images, names, *, seed, precision):
        calls.extend(names)
        if len(calls) == 3:
            raise RuntimeError("broken")
        time.sleep(0.02)
        return np.zeros((len(images), 4, 8, 8), np.float32)

    monkeypatch.setattr(latents, "_encode", failing)
    with pytest.raises(RuntimeError, match="broken"):
        encode(tmp_path / "store", batch_size=10)
    assert len(calls) < 10


def test_an_interruption_does_not_wait_for_what_was_decoded_ahead(encode, tmp_path, monkeypatch):
    calls = []
    plain = latents._encode

    def slow(codec, images, names, *, seed, precision):
        calls.extend(names)
        time.sleep(0.02)
        return plain(codec, images, names, seed=seed, precision=precision)

    def interrupt(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(latents, "_encode", slow)
    monkeypatch.setattr(latents._Shards, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "store", batch_size=10)
    assert len(calls) < 40


def test_an_image_whose_latent_is_not_finite_is_named(encode, tmp_path, monkeypatch):
    plain = Codec.encode
    calls = []

    def broken(self, images, **options):
        calls.append(len(images))
        made = plain(self, images, **options)
        return made * torch.nan if len(calls) == 5 else made

    monkeypatch.setattr(Codec, "encode", broken)
    with pytest.raises(NotFiniteError, match=r"id01/1.png: codec .* not finite"):
        encode(tmp_path / "store")


def test_the_widest_map_of_a_codec(tiny_codec):
    model = load_codec(str(tiny_codec), device="cpu").model
    sizes = []
    for layer in model.encoder.modules():
        layer.register_forward_hook(
            lambda _, __, output: (
                sizes.append(4 * output.numel()) if isinstance(output, torch.Tensor) else None
            )
        )
    codec = Codec(model, name="random")
    codec.encode(torch.zeros(1, 3, 64, 64))
    assert codec.activation_bytes(64) == max(sizes)
    assert load_codec("none").activation_bytes(64) == 0


@pytest.mark.parametrize("sides", [(16, 24), (4, 8), (2, 6)])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("use_quant_conv", [True, False])
def test_a_latent_is_the_mean_that_diffusers_computes(tiny_codec, use_quant_conv, layers, sides):
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    changes = {"use_quant_conv": use_quant_conv, "layers_per_block": layers}
    if not layers:  # the first block keeps its channels, the second has nothing that would add any
        changes["block_out_channels"] = (8, 8)
    config = AutoencoderKL.load_config(tiny_codec) | changes
    model = AutoencoderKL.from_config(config).eval()
    codec = Codec(model, name="random")
    joined = type(codec.encoder.conv_in).__name__ == "_JoinedStem"
    assert joined == (layers == 0)
    images = torch.rand(3, 3, *sides)
    with torch.no_grad():
        expected = model.encode(images * 2 - 1).latent_dist.mean
    assert expected.std() > 0.01
    torch.testing.assert_close(codec.encode(images), expected, rtol=1e-5, atol=1e-6)
    assert set(codec.encoder_state()) == {
        key for key in model.state_dict() if key.startswith(("encoder.", "quant_conv."))
    }


def test_a_shard_is_what_numpy_would_save(encode, tmp_path):
    encode(tmp_path / "store", batch_size=3)
    shards = sorted((tmp_path / "store" / "shards").glob("*.npy"))
    assert len(shards) > 1
    for shard in shards:
        saved = io.BytesIO()
        np.save(saved, np.load(shard))
        assert shard.read_bytes() == saved.getvalue()


def test_samples_are_seeded_per_image(encode, tmp_path):
    for name, options in {"a": {"batch_size": 3}, "b": {"batch_size": 8}, "c": {"seed": 1}}.items():
        encode(tmp_path / name, posterior="sample", **options)
    encode(tmp_path / "mean")
    stores = {name: LatentStore.open(tmp_path / name) for name in ("a", "b", "c", "mean")}
    rows = range(72)
    assert torch.equal(stores["a"].latents(rows), stores["b"].latents(rows))
    assert not torch.equal(stores["a"].latents(rows), stores["c"].latents(rows))
    assert not torch.equal(stores["a"].latents(rows), stores["mean"].latents(rows))


def test_rows_are_read_in_any_order_across_shards(encode, tmp_path):
    encode(tmp_path / "store")
    store = LatentStore.open(tmp_path / "store")
    everything = store.latents(range(len(store)))
    assert everything.shape == (72, 4, 8, 8) and everything.dtype == torch.float32
    assert torch.equal(store.latents([71, 0, 35, 0]), everything[[71, 0, 35, 0]])
    assert [r.path for r in store.records] == [
        f"id{i:02d}/{v}.png" for i in range(24) for v in range(3)
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 32}, "image_size: 16 there, 32 now"),
        ({"input_range": "unit"}, r"codec\.input_range: symmetric there, unit now"),
        ({"posterior": "sample", "seed": 3}, "seed: None there, 3 now"),
    ],
)
def test_another_making_is_refused_and_named(encode, tmp_path, options, named):
    encode(tmp_path / "store")
    before = contents(tmp_path / "store")
    with pytest.raises(InputError, match=named):
        encode(tmp_path / "store", **options)
    assert contents(tmp_path / "store") == before


def test_a_size_that_is_refused_leaves_nothing_behind(encode, tmp_path):
    with pytest.raises(InputError, match="not divisible by the codec's downsampling 2"):
        encode(tmp_path / "store", size=17)
    assert encode(tmp_path / "store", size=16).image_size == 16


def test_another_list_is_refused(encode, image_folder, tmp_path):
    encode(tmp_path / "store")
    draw_identity(0, 9).save(image_folder / "id00" / "9.png")
    with pytest.raises(InputError, match="manifest_digest"):
        encode(tmp_path / "store")


@pytest.mark.parametrize("damage", ["cut", "flip", "side", "missing"])
def test_a_damaged_shard_is_named_and_made_anew(encode, tmp_path, damage):
    encode(tmp_path / "store")
    before = contents(tmp_path / "store")
    shard = tmp_path / "store" / "shards" / "000003.npy"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    if damage == "cut":
        shard.write_bytes(data[:-40])
    elif damage == "flip":
        shard.write_bytes(data)
    elif damage == "missing":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    store = LatentStore.open(tmp_path / "store")
    assert store.latents([0]).isfinite().all()
    if damage != "side":
        for read in (store.verify, lambda: store.latents([32])):
            with pytest.raises(CorruptFileError, match=r"000003\.npy"):
                read()
    listening = Listener()
    assert encode(tmp_path / "store", reporter=listening).num_encoded_now == 10
    assert "000003.npy" in listening.warnings[0]
    assert listening.events == [("continuing", {"shards_found": 7, "shards": 8})]
    assert contents(tmp_path / "store") == before
    LatentStore.open(tmp_path / "store").verify()


def test_a_damaged_index_or_plan_is_named(encode, tmp_path):
    encode(tmp_path / "store")
    (tmp_path / "store" / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptFileError, match=r"index\.parquet: missing or damaged"):
        LatentStore.open(tmp_path / "store")
    (tmp_path / "store" / "plan.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"plan\.json"):
        encode(tmp_path / "store")


def test_unreadable_images_are_listed_and_taken_when_they_can_be_read(
    encode, image_folder, tmp_path
):
    encode(tmp_path / "whole")
    (image_folder / "id05" / "1.png").rename(tmp_path / "kept")
    (image_folder / "id05" / "1.png").write_bytes(b"no image")
    with pytest.raises(UnreadableLimitError, match=r"id05/1\.png"):
        encode(tmp_path / "store")
    tolerated = encode(tmp_path / "store", max_unreadable=1)
    assert (tolerated.num_images, tolerated.num_encoded_now) == (71, 0)
    assert [bad.path for bad in tolerated.unreadable] == ["id05/1.png"]
    store = LatentStore.open(tmp_path / "store")
    assert len(store) == 71 and "id05/1.png" not in {record.path for record in store.records}
    (tmp_path / "kept").replace(image_folder / "id05" / "1.png")
    assert encode(tmp_path / "store").num_encoded_now == 10
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_shards_of_changed_images_are_made_anew(encode, image_folder, tmp_path):
    first, second = image_folder / "id05" / "0.png", image_folder / "id05" / "1.png"
    encode(tmp_path / "store")
    before = LatentStore.open(tmp_path / "store")
    paths = [record.path for record in before.records]
    rows = [paths.index("id05/0.png"), paths.index("id05/1.png")]
    assert [before.contents[row] for row in rows] == [sha256_file(first), sha256_file(second)]
    latents_before = before.latents(rows)
    old = first.read_bytes(), second.read_bytes()
    first.write_bytes(old[1])
    second.write_bytes(old[0])
    with pytest.raises(InputError, match=r"2 image\(s\) have changed.*id05/0\.png"):
        before.check_unchanged(
            {"id05/0.png": sha256_file(first), "id05/1.png": sha256_file(second)}
        )
    before.check_unchanged({"id05/0.png": None, "id05/1.png": before.contents[rows[1]]})
    listening = Listener()
    assert encode(tmp_path / "store", reporter=listening).num_encoded_now == 10
    assert "2 image(s) have changed" in listening.warnings[0]
    after = LatentStore.open(tmp_path / "store")
    assert torch.equal(after.latents(rows), latents_before.flip(0))
    encode(tmp_path / "other")
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_an_image_that_is_gone_leaves_its_latents(image_folder, tiny_codec, tmp_path):
    write_manifest(load_manifest(image_folder), image_folder / "list.csv")
    codec = load_codec(str(tiny_codec), device="cpu")

    def num_encoded():
        manifest = load_manifest(image_folder / "list.csv", max_missing=1)
        return encode_latents(manifest, codec, tmp_path / "store", image_size=16).num_encoded_now

    assert num_encoded() == 72
    (image_folder / "id05" / "0.png").unlink()
    assert num_encoded() == 0


def test_a_store_of_another_format_is_refused(encode, tmp_path):
    encode(tmp_path / "store")
    meta = tmp_path / "store" / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="format 2, this lcmem reads 1"):
        LatentStore.open(tmp_path / "store")


def test_an_unreadable_shard_is_empty_and_not_fatal(encode, image_folder, tmp_path):
    for file in sorted(image_folder.rglob("*.png"))[:12]:
        file.write_bytes(b"")
    assert encode(tmp_path / "store", max_unreadable=12).num_images == 60
    assert LatentStore.open(tmp_path / "store").latents([0, 59]).shape == (2, 4, 8, 8)


def test_one_writer_at_a_time(encode, tmp_path):
    (tmp_path / "store").mkdir()
    with folder_lock(tmp_path / "store"), pytest.raises(FolderBusyError):
        encode(tmp_path / "store")


def test_an_unfinished_store_is_not_read(encode, tmp_path):
    with pytest.raises(InputError, match="make one with"):
        LatentStore.open(tmp_path / "store")
    encode(tmp_path / "store")
    (tmp_path / "store" / "meta.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        LatentStore.open(tmp_path / "store")


def test_a_full_disk_ends_with_the_systems_error_and_no_half_shard(encode, tmp_path, monkeypatch):
    class FullDisk:
        """Is told of a part of a shard as soon as that is written."""

        def update(self, part):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(latents, "hashlib", types.SimpleNamespace(sha256=FullDisk))
        with pytest.raises(OSError, match="No space left"):
            encode(tmp_path / "store")
    assert not list((tmp_path / "store" / "shards").iterdir())
    encode(tmp_path / "store")
    encode(tmp_path / "other")
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_the_package_holds_this_stores_files_only(encode, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("mine")
    result = encode(tmp_path / "store", package=True)
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "store.tar.gz").read_bytes())) as archive:
        names = archive.getnames()
        assert archive.getmember("store/meta.json").mtime == 0
    assert result.package == str(tmp_path / "store.tar.gz")
    assert len(names) == 3 + 2 * result.num_shards and "store/notes.txt" not in names


def test_the_package_of_the_current_folder_is_called_as_it(encode, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = encode(Path(), package=True)
    assert result.package == str(tmp_path / "here.tar.gz")
    with tarfile.open(result.package) as archive:
        assert {name.partition("/")[0] for name in archive.getnames()} == {"here"}


def command(image_folder, tiny_codec, output):
    return [
        "--quiet", "latents", "--filelist", image_folder, "--codec", tiny_codec, "-o", output,
        "--size", 16, "--device", "cpu", "--workers", 1, "--json",
    ]  # fmt: skip


SMALL_SHARDS = {"lcmem_cli.engine.store.latents:SHARD_RECORDS": 10}


def test_killed_and_started_again_ends_with_the_same_bytes(
    server, encode, image_folder, tiny_codec, tmp_path
):
    encode(tmp_path / "whole")
    store = tmp_path / "store"
    running = server.start(
        *command(image_folder, tiny_codec, store),
        "--batch-size",
        2,
        at=("lcmem_cli.engine.store.latents:_encode", 37, "hold"),
        patches=SMALL_SHARDS,
    )
    running.wait_until_held()
    deadline = time.monotonic() + 60  # a shard is written while the next is encoded
    while len(list(store.glob("shards/0*.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    left = len(list(store.glob("shards/0*.json")))
    assert 2 <= left < 8 and not (store / "meta.json").exists()
    assert encode(store).num_encoded_now == 72 - 10 * left
    assert contents(store) == contents(tmp_path / "whole")


def test_two_processes_make_the_bytes_of_one(server, encode, image_folder, tiny_codec, tmp_path):
    encode(tmp_path / "one")
    run = server.run_ranks(
        2, *command(image_folder, tiny_codec, tmp_path / "two"), patches=SMALL_SHARDS
    )
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["num_images"], result["num_encoded_now"]) == (72, 72)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    np.testing.assert_array_equal(result["mean"], LatentStore.open(tmp_path / "one").mean)

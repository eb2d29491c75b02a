"""Hostile files: any input gives a valid object or the project's own error, and runs no code."""

import contextlib
import copy
import json
import os
import struct
import tarfile

import pytest
import torch
from conftest import random_checkpoint, save_with_header, with_threshold
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from lcmem_cli.engine import config as cfg
from lcmem_cli.engine.data import manifest as mani
from lcmem_cli.engine.data import tables
from lcmem_cli.engine.errors import (
    CheckpointError,
    ConfigError,
    CorruptFileError,
    InputError,
    LcmemError,
    ManifestError,
)
from lcmem_cli.engine.files import sha256_file
from lcmem_cli.engine.models import checkpoint as ckpt
from lcmem_cli.engine.models import header as header_module
from lcmem_cli.engine.models.codec import CodecSpec
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec
from lcmem_cli.engine.models.weights import read_state_dict
from lcmem_cli.engine.runs import write_run_files
from lcmem_cli.engine.store.latents import LatentStore

# LCMEM_FUZZ_EXAMPLES=3000 gives every test below that many inputs.
EXAMPLES = int(os.environ.get("LCMEM_FUZZ_EXAMPLES", "200"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def damaged(draw, whole: bytes, first: int = 0):
    """Bytes with a few flips, cuts, insertions and repetitions behind position ``first``."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(min(first, len(data)), len(data)))
        kind = draw(st.sampled_from(("flip", "cut", "insert", "repeat", "drop")))
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=12) | st.sampled_from(ODD_BYTES))
        elif kind == "repeat":
            data[at:at] = data[at : at + 40]
        else:
            del data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


ODD_BYTES = (
    *(b"\0", b"\r", b"\r\n", b",", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b"\x1a", b"../", b"/"),
    *(b'"', b'""', b'"\n', b"[[", b"{", b"}", b"'''", b'"""', b"9" * 5000, b"a" * 140_000),
)


# --- image lists ---------------------------------------------------------------------------------

ODD_CELLS = (
    *("a.png", "b/c.png", "../secret.png", "/etc/passwd", "b/../a.png", "a.png/", "b//c.png"),
    *("TRAIN", "val", "tset", "", " ", "x", ".", ".."),
)
CELLS = st.one_of(
    st.sampled_from(ODD_CELLS),
    st.binary(max_size=10).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.text(alphabet='",\n\r\0;\t ax./\\', max_size=8),
    st.integers(1, 4).map(lambda n: "a" * (n * 60_000)),
)
COLUMNS = ("path", "ID", "split", "ds_name", "pth", "other", "path ", "")
HEADERS = st.one_of(
    st.just(["path", "id"]),
    st.just(["path", "id", "Split", "ds_name"]),
    st.lists(st.sampled_from(COLUMNS), max_size=5),
)


@st.composite
def csv_bytes(draw):
    """A table, tidy or not: separators, quotes and line ends as they come."""
    tidy = draw(st.booleans())
    header = draw(st.sampled_from((["path", "id"], ["path", "id", "Split"])) if tidy else HEADERS)
    separator = "," if tidy else draw(st.sampled_from((",", ";", "\t", ", ")))
    ends = st.sampled_from(("\n", "\r\n") if tidy else ("\n", "\r\n", "\r", "\n\n"))
    quoting = st.just("quoted") if tidy else st.sampled_from(("plain", "quoted", "half"))

    def cell(text):
        how = draw(quoting)
        if how == "quoted":
            return '"' + text.replace('"', '""') + '"'
        return f'"{text}' if how == "half" else text

    def row():
        names = [draw(CELLS) for _ in header]
        if tidy and len(header) == 3:
            names[2] = draw(st.sampled_from(("TRAIN", "VAL", "test")))
        return names

    rows = [header, *(row() for _ in range(draw(st.integers(0, 5))))]
    text = "".join(separator.join(map(cell, row)) + draw(ends) for row in rows)
    return draw(st.sampled_from((b"", b"\xef\xbb\xbf"))) + text.encode("utf-8", "surrogateescape")


VALID_CSV = (
    b'path,id,Split,ds_name\na.png,1,TRAIN,x\n"b/c.png",2,VAL,x\n"d ""e"".png",3,TEST,\xc3\xa9\n'
)


@fuzz
@given(csv_bytes() | damaged(VALID_CSV) | st.binary(max_size=200))
def test_any_filelist_gives_a_manifest_or_its_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("list")
    (folder / "list.csv").write_bytes(data)
    try:
        found = mani.load_manifest(folder / "list.csv", max_missing=None)
    except ManifestError as error:
        assert "list.csv" in str(error)
        return
    assert found.records and all(record.split in mani.SPLITS for record in found.records)
    for path in found.paths():
        assert f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(folder)}/")
    mani.write_manifest(found, folder / "again.csv")
    again = mani.load_manifest(folder / "again.csv", max_missing=None)
    assert (again.records, again.digest) == (found.records, found.digest)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "whole.parquet"
    records = [mani.Record(f"{split}.png", split, split, "x") for split in mani.SPLITS]
    mani.write_manifest(mani.Manifest(tuple(records), path.parent, path), path)
    return path.read_bytes()


@fuzz
@given(st.data())
def test_any_damage_of_a_parquet_filelist_gives_a_manifest_or_its_error(
    tmp_path_factory, parquet, data
):
    path = tmp_path_factory.mktemp("list") / "list.parquet"
    path.write_bytes(data.draw(damaged(parquet)))
    try:
        assert mani.load_manifest(path, max_missing=None).records
    except ManifestError as error:
        assert "list.parquet" in str(error)


def test_a_path_that_leaves_the_folder_is_refused_even_through_a_link(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    (inside / "deep").mkdir(parents=True)
    (outside / "x.png").write_bytes(b"")
    (inside / "deep" / "link").symlink_to(outside)
    for path in ("../outside/x.png", str(outside / "x.png"), "deep/link/../outside/x.png"):
        (inside / "list.csv").write_text(f"path,id\n{path},1\n")
        with pytest.raises(ManifestError, match="leave the base folder"):
            mani.load_manifest(inside / "list.csv")


def test_any_file_name_comes_back_from_a_written_list(tmp_path):
    names = ("a\r.png", "b\n.png", 'c".png', "d,.png", " e.png", "f\udce9.png", "\ufeffg.png")
    records = tuple(mani.Record(name, f"a\r{name}", "TRAIN", "x\r\ny") for name in names)
    written = mani.Manifest(records, tmp_path, tmp_path)
    mani.write_manifest(written, tmp_path / "list.csv")
    assert mani.load_manifest(tmp_path / "list.csv", max_missing=None).records == records


def test_a_filelist_has_a_limit(tmp_path, monkeypatch):
    (tmp_path / "list.csv").write_bytes(VALID_CSV)
    mani.load_manifest(tmp_path / "list.csv", max_missing=None)
    monkeypatch.setattr(tables, "MAX_BYTES", len(VALID_CSV) - 1)
    with pytest.raises(ManifestError, match="more than the limit"):
        mani.load_manifest(tmp_path / "list.csv", max_missing=None)


# --- configs -------------------------------------------------------------------------------------

SHIPPED = [path.read_bytes() for path in cfg.shipped_configs().values()]
ODD_VALUES = (
    *("1", "-1", "0", "1e400", "nan", "inf", "-inf", "0x10", "0x" + "f" * 5000, "9" * 5000, "1_0"),
    *("1979-05-27", "07:32:00", "true", '"x"', "''", "[]", "[[]]", "{}", "{a=1}", "[1, 'a']"),
    *("[" * 2000 + "]" * 2000, "'\\ud800'", '"\\ud800"', "{a." + "a." * 1500 + "a=1}"),
)
TOML_VALUES = st.one_of(
    st.sampled_from(ODD_VALUES),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8).map(lambda text: f'"{text}"'),
)
KEYS = sorted(
    {key for kind in cfg.KINDS.values() for key in kind.model_fields}
    | {
        f"{name}.{key}"
        for kind in cfg.KINDS.values()
        for name, field in kind.model_fields.items()
        if hasattr(field.annotation, "model_fields")
        for key in field.annotation.model_fields
    }
)
TOML_KEYS = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(("a" + ".a" * 1500, "runtime.seed.x", '""', "'\0'", "loss.", "é")),
    st.text(max_size=6),
)
SENSIBLE = st.sampled_from(
    ("runtime.seed = 3", "loss.alpha = 0.5", "schedule.batch_size = 8", "image.size = 64")
)
TOML_LINES = st.lists(
    SENSIBLE | SENSIBLE | st.tuples(TOML_KEYS, TOML_VALUES).map(" = ".join), max_size=4
)
TOML_TEXT = st.tuples(st.sampled_from(sorted(cfg.KINDS)), TOML_LINES).map(
    lambda drawn: f'kind = "{drawn[0]}"\n' + "\n".join(drawn[1])
)


def check_config(values, source):
    config = cfg.validate(values, source=source)
    assert cfg.validate(cfg.tomllib.loads(cfg.to_toml(config)), source="again") == config


@fuzz
@given(
    TOML_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from(SHIPPED).flatmap(damaged)
    | st.binary(max_size=100)
)
def test_any_toml_gives_a_config_or_its_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_bytes(data)
    try:
        check_config(cfg.read_toml(path), str(path))
    except ConfigError as error:
        assert error.problems and len(str(error)) < 20_000


@fuzz
@given(
    st.sampled_from(sorted(cfg.shipped_configs())),
    st.lists(
        SENSIBLE | st.tuples(TOML_KEYS, TOML_VALUES | st.text(max_size=10)).map("=".join),
        max_size=4,
    )
    | st.lists(st.text(max_size=20), max_size=2),
)
def test_any_override_gives_a_config_or_its_error(name, overrides):
    values = cfg.read_toml(cfg.shipped_configs()[name])
    before = copy.deepcopy(values)
    try:
        check_config(cfg.apply_overrides(values, overrides), name)
    except ConfigError as error:
        assert error.problems and len(str(error)) < 20_000
    assert values == before


def test_a_config_has_a_limit(tmp_path):
    path = tmp_path / "big.toml"
    path.write_bytes(b'kind = "stage1"\n#' + b"x" * cfg.MAX_CONFIG_BYTES)
    with pytest.raises(ConfigError, match="larger than"):
        cfg.read_toml(path)


def test_a_run_folder_holds_valid_toml_for_any_file_name(tmp_path):
    name = b"caf\xe9\x01\"'\\\n.csv".decode("utf-8", "surrogateescape")
    write_run_files(tmp_path, {"filelist": tmp_path / name, name: [name, None], "none": None})
    values = cfg.read_toml(tmp_path / "config.toml")
    assert values["filelist"].endswith("caf\\udce9\x01\"'\\\n.csv") and "none" not in values
    assert values["caf\\udce9\x01\"'\\\n.csv"] == ["caf\\udce9\x01\"'\\\n.csv"]


# --- checkpoints ---------------------------------------------------------------------------------


class Whole:
    """A small checkpoint with everything in it: header, bytes, length of the header, tensors."""

    def __init__(self, path):
        self.header = ckpt.read_header(path)
        self.data = path.read_bytes()
        self.length = struct.unpack("<Q", self.data[:8])[0]
        self.tensors = load(self.data)


@pytest.fixture(scope="module")
def whole(tiny_codec, tmp_path_factory):
    codec = load_codec(str(tiny_codec))
    spec = NetworkSpec(
        backbone="test_convnext",
        in_channels=4,
        num_features=8,
        input_size=16,
        normalisation="dataset",
        stem_stride=2,
        feature_rms=1.5,
        mean=(0.0,) * 4,
        std=(1.0,) * 4,
    )
    training = {"config": {"loss": {"alpha": 0.8}}}
    made = random_checkpoint(spec, codec, image_size=32, training=training)
    path = tmp_path_factory.mktemp("checkpoint") / "whole.safetensors"
    ckpt.save_checkpoint(path, with_threshold(made))
    return Whole(path)


ODD_JSON = (
    *(None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf")),
    *("", "x", "resnet10t", "test_vit", "hf-hub:a/b", "../x", "\ud800", "fpr", "none", "dataset"),
)
JSON_VALUES = st.recursive(
    st.sampled_from(ODD_JSON) | st.integers() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=2)
    ),
    max_leaves=4,
)


def places(value, prefix=()):
    """Return every place of a JSON tree."""
    found = [prefix] if prefix else []
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(child, (*prefix, key))
    return found


def changed_header(draw, header):
    header = copy.deepcopy(header)
    for _ in range(draw(st.integers(1, 3))):
        options = [p for p in places(header) if len(p) < 2 or p[0] != "codec_config"]
        in_codec = [p for p in places(header) if len(p) > 1 and p[0] == "codec_config"]
        *way, last = draw(st.sampled_from(options) | st.sampled_from(in_codec or options))
        node = header
        for key in way:
            node = node[key]
        action = draw(st.sampled_from(("replace", "replace", "remove", "add", "deep")))
        if action == "remove" and isinstance(node, dict):
            del node[last]
        elif action == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=5))] = draw(JSON_VALUES)
        elif action == "deep":
            value = draw(JSON_VALUES)
            for _ in range(draw(st.sampled_from((20, 150, 400)))):
                value = [value]
            node[last] = value
        else:
            node[last] = draw(JSON_VALUES)
    return header


def use(path):
    """Load a checkpoint and build everything in it; returns whether that worked."""
    try:
        loaded = ckpt.load_checkpoint(path)
        loaded.build(source="fuzz")
        loaded.codec_model()
        json.dumps(loaded.summary())
    except LcmemError:
        return False
    assert isinstance(loaded.network, NetworkSpec) and isinstance(loaded.codec, CodecSpec)
    return True


@fuzz
@given(st.data())
def test_any_change_of_a_header_gives_a_checkpoint_or_its_error(tmp_path_factory, whole, data):
    header = changed_header(data.draw, whole.header)
    # Whoever edits a header can also compute the fingerprint and checksum that go with it.
    tensors = data.draw(st.sampled_from((whole.tensors, {"network.x": torch.zeros(2)})))
    with contextlib.suppress(TypeError, KeyError, ValueError, RecursionError):
        forged = ckpt.Checkpoint(
            stage="stage1",
            network=NetworkSpec(**header["network"]),
            network_state={k[8:]: v for k, v in tensors.items() if k.startswith("network.")},
            codec=CodecSpec(**header["codec"]),
            codec_config=None,
            codec_state=None,
            image_size=header["image_size"],
        )
        header["fingerprint"] = ckpt.compute_fingerprint(forged)
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_with_header(path, tensors, header)
    use(path)


@fuzz
@given(st.data())
def test_any_damage_of_a_file_gives_the_checkpoint_or_an_error(tmp_path_factory, whole, data):
    head = whole.data[: 8 + whole.length]
    starts = st.sampled_from((0, 8, whole.length // 2))
    broken = data.draw(starts.flatmap(lambda first: damaged(head, first)))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(broken + whole.data[8 + whole.length :])
    if use(path):  # only what does not change a score can have changed
        assert ckpt.load_checkpoint(path).fingerprint == whole.header["fingerprint"]


def test_a_header_has_a_limit(tmp_path, whole, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole.data)
    assert use(path)
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", whole.length - 1)
    with pytest.raises(CheckpointError, match="header of"):
        ckpt.load_checkpoint(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="header of"):
        ckpt.read_header(path)


def test_a_codec_larger_than_its_weights_is_not_built(tmp_path, whole):
    header = copy.deepcopy(whole.header)
    header["codec_config"]["block_out_channels"] = [8000, 8000]  # gigabytes
    path = tmp_path / "x.safetensors"
    save_with_header(path, whole.tensors, header)
    with pytest.raises(CheckpointError, match="do not fit"):
        ckpt.load_checkpoint(path).codec_model()


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (("image_size",), 65_536),
        (("network", "input_size"), 1e9),
        (("network", "in_channels"), 10**6),
        (("network", "num_features"), 10**9),
        (("network", "stem_stride"), 4096),
        (("network", "feature_rms"), float("inf")),
        (("network", "mean"), [0.0, 0.0, 0.0, float("nan")]),
        (("codec", "downsampling"), 0),
        (("codec", "latent_channels"), 10**9),
        (("codec_config", "layers_per_block"), 10**9),
        (("codec_config", "layers_per_block"), [2, 10**9]),
        (("codec_config", "block_out_channels"), [8, 40_000]),
        (("codec_config", "block_out_channels"), [8] * 10_000),
        (("codec_config", "latent_channels"), 10**9),
        (("codec_config", "norm_num_groups"), float("nan")),
        (("thresholds", 0, "rate"), 7),
        (("thresholds", 0, "value"), float("nan")),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_before_anything_is_built(
    tmp_path, whole, monkeypatch, way, value
):
    header = copy.deepcopy(whole.header)
    node = header
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = value
    path = tmp_path / "x.safetensors"
    save_with_header(path, whole.tensors, header)
    monkeypatch.setattr("safetensors.torch.load_file", None)  # not even the weights are read
    with pytest.raises(CorruptFileError, match=f"x.safetensors: .*{way[0]}"):
        ckpt.load_checkpoint(path)


def test_what_the_fingerprint_does_not_cover_has_a_checksum(tmp_path, whole):
    path = tmp_path / "x.safetensors"
    for way, value in (
        (("thresholds", 0, "value"), 0.1),
        (("thresholds",), []),
        (("training", "config"), {}),
        (("codec", "name"), "another"),
        (("codec_config", "act_fn"), "relu"),
        (("checksum",), ""),
    ):
        header = copy.deepcopy(whole.header)
        node = header
        for key in way[:-1]:
            node = node[key]
        node[way[-1]] = value
        save_file(whole.tensors, path, metadata={ckpt.HEADER_KEY: json.dumps(header)})
        with pytest.raises(CorruptFileError, match="does not match its checksum"):
            ckpt.load_checkpoint(path)
    adapted = {**whole.tensors, "adapted_to": torch.ones(32, dtype=torch.uint8)}
    save_file(adapted, path, metadata={ckpt.HEADER_KEY: json.dumps(whole.header)})
    with pytest.raises(CorruptFileError, match="does not match its checksum"):
        ckpt.load_checkpoint(path)


def test_another_format_is_refused_plainly(tmp_path, whole):
    path = tmp_path / "x.safetensors"
    save_with_header(path, whole.tensors, {**whole.header, "format": 1})
    with pytest.raises(InputError, match=r"x.safetensors: format 1, this lcmem reads 2; get"):
        ckpt.load_checkpoint(path)


# --- code in files -------------------------------------------------------------------------------


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("new_format", [True, False])
def test_a_payload_in_a_pickle_does_not_run(tmp_path, run_cli, new_format):
    mark = tmp_path / "executed"
    evil = tmp_path / "evil.pth"
    torch.save(
        {"state_dict": {"model.x": Payload(mark)}},
        evil,
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(CheckpointError, match="would execute code"):
        read_state_dict(evil)
    run_cli("convert", evil, tmp_path / "x.safetensors", exit_code=2)
    run_cli("info", evil, exit_code=2)
    run_cli("infer", evil, evil, "--checkpoint", evil, exit_code=2)
    assert not mark.exists() and not (tmp_path / "x.safetensors").exists()
    torch.load(evil, weights_only=False)  # the payload works where it is let
    assert mark.exists()


def test_a_payload_in_a_training_state_does_not_run(tmp_path, run_cli, image_folder, tiny_codec):
    latents = tmp_path / "latents"
    run_cli(
        "latents", "--filelist", image_folder, "--codec", tiny_codec, "--size", 64, "-o", latents
    )
    arguments = [
        "train-stage1", "--latents", latents, "-o", tmp_path / "run", "--resume",
        f"--set=codec.name={tiny_codec}",
        "--set=image.size=64", "--set=network.backbone=test_convnext", "--set=schedule.epochs=1",
        "--set=network.num_features=8", "--set=schedule.batch_size=8", "--set=runtime.device=cpu",
    ]  # fmt: skip
    run_cli(*arguments)
    mark = tmp_path / "executed"
    torch.save({"run_digest": Payload(mark)}, tmp_path / "run" / "state.pt")
    assert "state.pt" in run_cli(*arguments, exit_code=1).stderr
    assert not mark.exists()


# --- folders -------------------------------------------------------------------------------------


def test_a_store_cannot_point_outside_of_its_folder(tmp_path, run_cli, image_folder, tiny_codec):
    store = tmp_path / "latents"
    run_cli("latents", "--filelist", image_folder, "--codec", tiny_codec, "--size", 32, "-o", store,
            "--package")  # fmt: skip
    with tarfile.open(tmp_path / "latents.tar.gz") as archive:
        for member in archive.getmembers():
            assert member.isfile() and member.name.startswith("latents/")
            assert ".." not in member.name.split("/")
    meta = json.loads((store / "meta.json").read_text())
    outside = tmp_path / "outside.npy"
    (store / "shards" / meta["shards"][0]["file"]).rename(outside)
    for name in (str(outside), "../../outside.npy"):
        meta["shards"][0]["file"] = name
        (store / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(CorruptFileError, match="damaged"):
            LatentStore.open(store).latents([0])


def test_a_filter_does_not_take_files_from_outside_of_the_audited_set(
    tmp_path, run_cli, image_folder
):
    generated = tmp_path / "generated"
    generated.mkdir()
    (image_folder / "id00" / "0.png").rename(generated / "a.png")
    run_cli("audit", generated, "--against", image_folder, "--fpr", 0.1, "--detector", "phash",
            "-o", tmp_path / "audit")  # fmt: skip
    secret = tmp_path / "secret.png"
    secret.write_bytes((generated / "a.png").read_bytes())
    table, checksums = tmp_path / "audit" / "matches.csv", tmp_path / "audit" / "checksums.json"
    whole = table.read_text()
    for name in ("../secret.png", str(secret)):
        table.write_text(whole.replace("a.png,", f"{name},"))
        sums = json.loads(checksums.read_text())  # forged as well: the path itself is refused
        checksums.write_text(json.dumps(sums | {table.name: sha256_file(table)}))
        refused = run_cli("filter", tmp_path / "audit", "-o", tmp_path / "kept", "--copy",
                          "--reject-over", 2, exit_code=1)  # fmt: skip
        assert "outside" in refused.stderr
        assert not list((tmp_path).glob("kept/**/*secret*"))


def test_an_unusable_config_name_is_an_input_error(tmp_path):
    for name in ("", "\0", "x" * 5000, "../x"):
        with pytest.raises(InputError):
            cfg.find_config(name)

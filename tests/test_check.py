"""``lcmem check``: what would fail is found beforehand, all at once, and nothing is written."""

import csv
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from conftest import codec_of, save_with_header
from safetensors import safe_open
from safetensors.torch import save_file

from lcmem_cli.engine import check as engine
from lcmem_cli.engine import config as configs
from lcmem_cli.engine.check import CheckRequest, check_run
from lcmem_cli.engine.data.manifest import load_manifest, write_manifest
from lcmem_cli.engine.models.checkpoint import HEADER_KEY, embedded_checkpoint

SMALL = [
    "image.size=32",
    "network.backbone=resnet10t",
    "network.num_features=16",
    "network.drop_path_rate=0.0",
]


def of(result, level, group=None):
    return [f.what for f in result.findings if f.level == level and group in (None, f.group)]


@pytest.fixture
def filelist(image_folder, tmp_path):
    """A good filelist of the drawn images."""
    path = image_folder / "list.csv"
    write_manifest(load_manifest(image_folder), path)
    return path


def check(**given):
    return check_run(CheckRequest(**given))


def rewrite(path, change):
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    rows = change(rows)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def latents(run_cli, filelist, tiny_codec, tmp_path):
    """A store of the drawn images at 32 px."""
    target = tmp_path / "latents"
    arguments = ["--filelist", filelist, "--codec", tiny_codec, "--size", 32, "-o", target]
    run_cli("latents", *arguments)
    return target


def test_without_arguments_the_embedded_model_is_checked():
    result = check()
    assert result.num_problems == 0
    assert any("fingerprint" in what for what in of(result, "fine", "checkpoint"))
    assert of(result, "fine", "codec") and of(result, "fine", "device")


def test_a_good_run_is_fine_and_writes_nothing(filelist, tmp_path):
    result = check(
        config="mini/finetune",
        overrides=["retention.weight=0"],
        filelist=filelist,
        checkpoint=embedded_checkpoint(),
        detectors=["ncc", "lcmem"],
        num_images=None,
        output=tmp_path / "new" / "run",
    )
    assert of(result, "problem") == []
    assert result.num_images_decoded == 72
    assert not (tmp_path / "new").exists()
    assert any("not trained on this filelist" in w for w in of(result, "warning", "checkpoint"))


def test_all_problems_come_at_once_with_what_to_do(run_cli, image_folder, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('kind = "stage1"\n[los]\nalpha = 1\n[loss]\nalpha = 3\n')
    table = tmp_path / "list.csv"
    table.write_text(
        "path,id,Split\nid00/0.png,a,TRAIN\nid00/0.png,a,TRAIN\nid00/1.png,a,VAL\n"
        "nosuch.png,b,TEST\n../list.csv,c,TEST\n"
    )
    damaged = tmp_path / "c.safetensors"
    damaged.write_bytes(b"no checkpoint")
    (tmp_path / "file").write_text("")
    done = run_cli(
        "check", "--config", config, "--filelist", table, "--basedir", image_folder,
        "--checkpoint", damaged, "--latents", tmp_path / "nolatents",
        "--detectors", "ncc,nccc,torchscript:nosuch.pt", "-o", tmp_path / "file" / "run", "--json",
        exit_code=2,
    )  # fmt: skip
    found = json.loads(done.stdout)
    problems = [f for f in found["findings"] if f["level"] == "problem"]
    assert found["num_problems"] == len(problems)
    assert all(f["remedy"] for f in problems)
    text = {f"{f['group']}: {f['what']}" for f in problems}
    for group, words in [
        ("config", "los: unknown key"),
        ("config", "loss.alpha"),
        ("filelist", "more than one split"),
        ("filelist", "duplicate"),
        ("filelist", "1 of 5 file(s) missing"),
        ("filelist", "leave the base folder"),
        ("checkpoint", "not a safetensors file"),
        ("latents", "no latent store"),
        ("detectors", "did you mean 'ncc'"),
        ("detectors", "nosuch.pt"),
        ("output", "is no folder"),
    ]:
        assert any(t.startswith(f"{group}: ") and words in t for t in text), (group, words, text)


def test_the_table_names_the_problem_and_the_remedy(run_cli, tmp_path):
    done = run_cli("check", "--detectors", "nccc", "--images", 0, exit_code=2)
    assert "nccc" in done.stdout and "lcmem detectors" in done.stdout
    assert "1 problem(s), 0 warning(s)" in done.stdout
    assert "expected a number" in run_cli("check", "--images", "some", exit_code=2).stderr


def test_options_without_effect_are_named(tmp_path):
    result = check(overrides=["loss.alpha=1"], basedir=tmp_path)
    assert [what.split()[0] for what in of(result, "warning")] == ["--set", "--basedir"]


def test_missing_columns_are_named(tmp_path):
    (tmp_path / "list.csv").write_text("file,id\na.png,1\n")
    problems = of(check(filelist=tmp_path / "list.csv"), "problem", "filelist")
    assert len(problems) == 1 and "no column 'path'" in problems[0]


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        (lambda rows: [r for r in rows if r[2] != "VAL"], "problem", "VAL is empty"),
        (lambda rows: [r for r in rows if r[2] != "TEST"], "warning", "TEST is empty"),
        (
            lambda rows: [r for r in rows if r[2] != "TRAIN" or r[1] < "id03"],
            "problem",
            "at least 3 identities, there are",
        ),
        (
            lambda rows: [r for r in rows if r[2] != "TEST" or r[0].endswith("0.png")],
            "warning",
            "have no second image",
        ),
    ],
    ids=["no VAL", "no TEST", "two identities", "single images"],
)  # fmt: skip
def test_splits_that_a_training_cannot_use(filelist, change, level, words):
    rewrite(filelist, change)
    overrides = ["retention.weight=0"]
    result = check(config="finetune", overrides=overrides, filelist=filelist, num_images=0)
    assert any(words in what for what in of(result, level, "filelist")), result.findings
    assert result.num_images_decoded == 0
    alone = check(filelist=filelist, num_images=0)
    assert alone.num_problems == 0 and any(words in w for w in of(alone, "warning", "filelist"))


def test_a_batch_too_small_for_negatives_is_found(filelist):
    few = ["sampling.mini_epoch_size=2", "retention.weight=0"]
    result = check(config="finetune", overrides=few, filelist=filelist, num_images=0)
    assert any("no batch of at least 3" in w for w in of(result, "problem", "filelist"))


def test_unreadable_images_are_named(filelist, image_folder):
    (image_folder / "id00" / "0.png").write_bytes(b"no image")
    result = check(filelist=filelist, num_images=None)
    assert [bad.path for bad in result.unreadable] == ["id00/0.png"]
    assert "id00/0.png: not an image" in of(result, "problem", "images")[0]
    assert check(filelist=filelist, num_images=0).num_problems == 0
    (image_folder / "id01" / "link.png").symlink_to("nothing-there")
    linked = check(filelist=image_folder, num_images=None)
    assert {bad.path for bad in linked.unreadable} == {"id00/0.png", "id01/link.png"}
    assert check(filelist=filelist, num_images=5).num_images_decoded <= 5


def test_a_list_without_pairs_is_warned_of(image_folder):
    single = image_folder / "single.csv"
    rows = [f"{path.relative_to(image_folder)},{path}" for path in image_folder.rglob("*.png")]
    single.write_text("\n".join(["path,id", *rows]))
    found = check(filelist=single, num_images=0)
    assert any("TEST: no pair of one identity" in what for what in of(found, "warning", "filelist"))


def test_an_edited_checkpoint_is_found(tmp_path):
    path = tmp_path / "c.safetensors"
    with safe_open(embedded_checkpoint(), "pt") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    tensors["network.head.bias"] += 1
    save_file(tensors, path, metadata={HEADER_KEY: json.dumps(header)})
    assert "does not match its fingerprint" in of(check(checkpoint=path), "problem")[0]
    tensors["network.head.bias"] -= 1
    header["thresholds"][0]["fingerprint"] = "0" * 64
    save_with_header(path, tensors, header)
    assert "was fitted for detector 0000" in of(check(checkpoint=path), "problem")[0]
    header["thresholds"] = []
    save_with_header(path, tensors, header)
    result = check(checkpoint=path)
    assert result.num_problems == 0 and "no thresholds" in of(result, "warning")[0]


def test_latents_that_do_not_fit_config_or_filelist(latents, filelist):
    small = [*SMALL, codec_of(latents).removeprefix("--set=")]
    good = check(config="stage1", overrides=small, latents=latents, filelist=filelist)
    assert of(good, "problem") == [] and any("resnet10t" in w for w in of(good, "fine", "network"))
    other = [*small[1:], "image.size=64", "codec.input_range=unit"]
    problems = of(check(config="stage1", overrides=other, latents=latents), "problem")
    assert len(problems) == 1
    assert "codec.input_range is unit" in problems[0] and "image.size is 64" in problems[0]
    rewrite(filelist, lambda rows: [r for r in rows if r[1] != "id05"])
    fewer = check(config="stage1", overrides=small, latents=latents, filelist=filelist)
    assert any("not in the filelist" in w for w in of(fewer, "warning", "latents"))
    more = check(latents=latents, filelist=filelist.parent, num_images=0)
    assert of(more, "problem") == []


def test_latents_of_another_codec_than_the_checkpoints(latents):
    problems = of(check(latents=latents, checkpoint=embedded_checkpoint()), "problem")
    assert len(problems) == 1 and "needs those of" in problems[0]


def test_latents_in_vain_and_a_codec_that_has_changed(latents, tiny_codec):
    baseline = check(config="baselines/siamese", latents=latents)
    assert any("not --latents" in w for w in of(baseline, "problem", "inputs"))
    meta = latents / "meta.json"
    meta.write_text(meta.read_text().replace('"weights_hash": "', '"weights_hash": "0'))
    small = [*SMALL, codec_of(latents).removeprefix("--set=")]
    changed = check(config="stage1", overrides=small, latents=latents)
    assert any("has changed" in w for w in of(changed, "problem", "latents"))


def test_latents_of_another_codec_than_the_configs(latents):
    (problem,) = of(check(config="stage1", overrides=SMALL, latents=latents), "problem")
    assert "codec.name is stabilityai/sd-vae-ft-mse" in problem
    assert codec_of(latents).replace("=", " ", 1) in problem  # the remedy, to be copied


def test_a_damaged_shard_is_found(latents):
    shard = next((latents / "shards").glob("*.npy"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 255
    shard.write_bytes(data)
    assert shard.name in of(check(latents=latents), "problem", "latents")[0]
    assert check(latents=latents, num_images=0).num_problems == 0
    shard.write_bytes(data[:-4])
    assert shard.name in of(check(latents=latents, num_images=0), "problem", "latents")[0]
    np.save(shard, np.zeros((1, 4, 2, 2), np.float32))
    assert "it holds (1, 4, 2, 2)" in of(check(latents=latents, num_images=0), "problem")[0]


def test_weights_that_are_not_on_this_machine(monkeypatch):
    from huggingface_hub import constants

    given = {"config": "stage1", "overrides": ["codec.name=stabilityai/sd-vae-ft-mse"]}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = check(**given, detectors=["dinov2"])
    assert any("sd-vae-ft-mse" in w for w in of(offline, "problem", "codec"))
    assert any("dinov2" in w for w in of(offline, "problem", "detectors"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = check(**given, detectors=["dinov2"])
    assert online.num_problems == 0 and len(of(online, "warning")) == 2


def test_a_backbone_and_weights_that_cannot_be_used(tmp_path):
    name = check(config="stage1", overrides=["network.backbone=resnet10"])
    assert any("timm has no model 'resnet10'" in w for w in of(name, "problem", "network"))
    file = check(config="stage1", overrides=[*SMALL, "network.weights=nosuch.pth"])
    assert any("nosuch.pth" in w for w in of(file, "problem", "network"))
    panel = ["network.weights=nosuch.pth", "network.align_stem=5", "retention.weight=1.0"]
    panel += ['retention.panel={resnet10t="other.pth"}']
    both = of(check(config="stage1", overrides=[*SMALL, *panel]), "problem", "network")
    assert any("nosuch.pth" in w for w in both) and any("other.pth" in w for w in both)
    hub = [*SMALL, "network.weights=timm"]
    hub_id = "timm/resnet10t.c3_in1k"
    assert any(hub_id in f.what for f in check(config="stage1", overrides=hub).findings)
    teacher = check(
        config="finetune",
        overrides=["retention.weight=1.0", f"retention.teacher={tmp_path}/nosuch"],
        checkpoint=embedded_checkpoint(),
    )
    assert any("no such teacher" in w for w in of(teacher, "problem", "inputs"))


def test_a_codec_config_whose_sides_do_not_fit(filelist):
    result = check(config="mini/codec", overrides=["image.size=18"], filelist=filelist)
    assert any("crop_size" in w for w in of(result, "problem", "inputs"))
    good = check(config="mini/codec", filelist=filelist)
    assert (good.num_problems, good.num_warnings) == (0, 0)
    rewrite(filelist, lambda rows: [r for r in rows if r[2] != "VAL"])
    empty = check(config="mini/codec", filelist=filelist)
    assert of(empty, "problem") == ["training a codec needs TRAIN and VAL images"]


def test_remedies_are_about_what_was_found(latents, tmp_path):
    def problems(**given):
        return [f for f in check(**given).findings if f.level == "problem"]

    (name,) = problems(config="mini/stag1")
    assert "mini/stage1" in name.what and "lcmem config ls" in name.remedy
    (frozen,) = problems(
        config="finetune",
        overrides=["optimiser.frozen=['nosuch']", "retention.weight=0"],
        checkpoint=embedded_checkpoint(),
    )
    assert "nosuch" in frozen.what and "image.size" not in frozen.remedy
    (backbone,) = problems(
        config="stage1", overrides=["codec.name=embedded", "network.backbone=resnet1800"]
    )
    assert "resnet1800" in backbone.what
    (latents / "index.parquet").write_bytes(b"damaged")
    (damaged,) = problems(config="stage1", overrides=SMALL, latents=latents)
    assert "index.parquet: missing or damaged" in damaged.what


def test_a_run_that_is_to_be_continued(latents, run_cli, tmp_path):
    target = tmp_path / "run"
    small = [*SMALL, "schedule.batch_size=8", "schedule.epochs=1", "runtime.device=cpu"]
    small.append(codec_of(latents).removeprefix("--set="))
    given = {"config": "stage1", "latents": latents, "output": target, "resume": True}
    assert check(**given, overrides=small).num_problems == 0  # nothing to continue yet
    run_cli("train-stage1", "--latents", latents, "-o", target, *(f"--set={s}" for s in small))
    again = check(**given, overrides=small)
    assert again.num_problems == 0 and any("can go on" in w for w in of(again, "fine"))
    other = check(**given, overrides=[*small, "loss.alpha=0.25"])
    assert "loss.alpha (0.8 there, 0.25 now)" in of(other, "problem", "output")[0]
    command = ["check", "--config", "stage1", "--latents", latents, "-o", target]
    command += [f"--set={s}" for s in small]
    run_cli(*command, exit_code=2)
    run_cli(*command, "--resume")
    assert "no effect" in run_cli("check", "--resume").stdout
    own = {"latents": latents, "output": target, "resume": True}  # the run's own config
    assert any("can go on" in w for w in of(check(**own), "fine"))
    history = target / "history.csv"
    history.write_text(history.read_text() + history.read_text().splitlines()[1] + "\n")
    assert "2 epochs are trained already" in of(check(**own), "problem", "output")[0]


def test_devices_that_are_not_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for given in ({"device": "cuda"}, {"config": "finetune", "overrides": ["runtime.device=cuda"]}):
        assert any("no usable CUDA" in w for w in of(check(**given), "problem", "device"))
    half = check(config="finetune", overrides=["runtime.mixed_precision=bf16"], device="cpu")
    assert any("bfloat16" in w for w in of(half, "problem", "device"))


def test_output_folders_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    result = check(config="finetune", output=tmp_path / "run")
    assert any("run.json: damaged" in w for w in of(result, "problem", "output"))
    other = check(output=tmp_path / "run")
    assert other.num_problems == 0 and "not empty" in of(other, "warning", "output")[0]
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "about" in of(check(output=tmp_path / "new"), "problem", "output")[0]

    def refuse(**arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(engine.tempfile, "TemporaryFile", refuse)
    assert "Permission denied" in of(check(output=tmp_path), "problem", "output")[0]


def test_the_estimate_covers_what_a_training_writes(latents, run_cli, tmp_path):
    target = tmp_path / "run"
    small = [f"--set={s}" for s in (*SMALL, "schedule.batch_size=8", "schedule.epochs=1")]
    small.append(codec_of(latents))
    run_cli("train-stage1", "--latents", latents, "-o", target, *small, "--set=runtime.device=cpu")
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    values = configs.apply_overrides({"kind": "stage1"}, SMALL)
    config = configs.validate(values, source="test")
    store = engine.LatentStore.open(latents)
    network = engine.inputs.stage1_network(config, store.spec, 32, store)
    count = sum(p.numel() for p in network.parameters())
    estimate = engine._estimate(config, count) - engine._SMALL_FILES_BYTES
    assert written < estimate < 4 * written

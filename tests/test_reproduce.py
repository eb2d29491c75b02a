"""The walk of docs/reproduce.md at small scale, and all detectors of the paper's table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import draw_identity
from safetensors.torch import save_file

from lcmem_cli.engine.config import tomllib

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

TIMM = {
    "clip": "vit_base_patch16_clip_224.openai",
    "convnext": "convnext_base.fb_in22k",
    "inception": "inception_v3.tv_in1k",
    "mae": "vit_base_patch16_224.mae",
    "dinov2": "vit_base_patch14_dinov2.lvd142m",
    "dinov3": "vit_base_patch16_dinov3.lvd1689m",
}
SIDE = {"dinov2": 112, "dinov3": 112}  # fewer patches than their own side: time, not classes
SMALL = (
    "--set=schedule.epochs=1",
    "--set=schedule.batch_size=8",
    "--set=runtime.device=cpu",
)


@pytest.fixture(scope="module")
def sd_shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of Stable Diffusion's shape (f8, four levels, 4 channels, attention), few channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec") / "sd-vae"
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cxr14(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChestX-ray14 as its publisher lays it out: images, table of patients, official test list."""
    folder = tmp_path_factory.mktemp("cxr14")
    (folder / "images").mkdir()
    header = [
        "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age",
        "Patient Gender", "View Position", "OriginalImage[Width", "Height]",
        "OriginalImagePixelSpacing[x", "y]",
    ]  # fmt: skip
    test: list[str] = []
    with (folder / "Data_Entry_2017.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for patient in range(1, 25):
            for follow_up in range(3):
                name = f"{patient:08d}_{follow_up:03d}.png"
                draw_identity(patient, follow_up, side=64).save(folder / "images" / name)
                row = [name, "No Finding", follow_up, patient, 50, "F", "PA", 64, 64, 0.1, 0.1]
                writer.writerow(row)
                if patient > 18:
                    test.append(name)
    train = [p.name for p in sorted((folder / "images").iterdir()) if p.name not in test]
    (folder / "test_list.txt").write_text("\n".join(test) + "\n")
    (folder / "train_val_list.txt").write_text("\n".join(train) + "\n")
    return folder


def test_the_walk_from_metadata_table_to_latex(run_cli, sd_shaped, cxr14, tmp_path, no_drawing):
    """Each command of docs/reproduce.md, with fewer images, epochs and features."""
    filelist = tmp_path / "all.csv"
    run_cli(
        "manifest", "--from", "nih-cxr14", cxr14 / "Data_Entry_2017.csv",
        cxr14 / "train_val_list.txt", cxr14 / "test_list.txt", "-o", filelist,
    )  # fmt: skip
    config = tmp_path / "stage1.toml"
    run_cli("config", "cp", "stage1", config)
    config.write_text(
        config.read_text()
        .replace('"stabilityai/sd-vae-ft-mse"', json.dumps(str(sd_shaped)))
        .replace("size = 512", "size = 256")
        .replace("num_features = 512", "num_features = 32")
    )
    listed = ["--filelist", filelist, "--basedir", cxr14]
    latents, stage1, tuned = (tmp_path / name for name in ("latents", "stage1", "tuned"))
    run_cli("latents", *listed, "--config", config, "-o", latents)
    run_cli("check", "--config", config, "--latents", latents, "-o", stage1)
    train = ["train-stage1", "--config", config, "--latents", latents, "-o", stage1]
    run_cli(*train, *SMALL)
    run_cli("train-stage1", "--latents", latents, "-o", stage1, "--resume",
            "--set=schedule.epochs=2")  # fmt: skip
    recorded = tomllib.loads((stage1 / "config.toml").read_text())
    assert recorded["codec"]["name"] == str(sd_shaped) and recorded["image"]["size"] == 256
    run_cli("finetune", stage1 / "checkpoint.safetensors", *listed, "-o", tuned, *SMALL)
    detectors = [
        f"lcmem:{stage1}/checkpoint.safetensors?label=Ours (stage 1)",
        f"lcmem:{tuned}/checkpoint.safetensors?label=Ours Two Stage",
    ]
    for name in ("siamese", "siamese-ntxent", "siamese-ntxent-unsupervised"):
        run_cli(
            "train-stage1", "--config", f"baselines/{name}", *listed, "-o", tmp_path / name,
            "--set=image.size=64", "--set=network.backbone=test_resnet", *SMALL,
        )  # fmt: skip
        kind = name.replace("-unsupervised", "-u")
        detectors.append(f"{kind}:{tmp_path / name}/checkpoint.safetensors?label={kind}")
    bench = ["benchmark", *listed, "--input-size", 64, "-o", tmp_path / "bench"]
    run_cli(*bench, "--detectors", ",".join(detectors), "--strict", "--latex")
    run_cli(*bench, "--detectors", "mse,byol,ncc", "--latex")  # more, in the same folder
    text = (tmp_path / "bench" / "benchmark_results.tex").read_text()
    shown = [line.partition(" & ")[0] for line in text.splitlines() if " & " in line]
    labels = ["Ours (stage 1)", "Ours Two Stage", "siamese", "siamese-ntxent", "siamese-ntxent-u"]
    assert shown == ["detector", "mse", "ncc", *labels]
    results = json.loads((tmp_path / "bench" / "benchmark_results.json").read_text())
    assert set(results["detectors"]) == set(shown[1:])
    assert [item["name"] for item in results["skipped"]] == ["byol"]
    patients = {Path(row["path_a"]).name[:8] for row in csv.DictReader(
        (tmp_path / "bench" / "scores.csv").open(newline=""))}  # fmt: skip
    assert patients == {f"{number:08d}" for number in range(19, 25)}  # the official test list
    robust = ["robustness", *listed, "--detectors", f"{detectors[1]},ncc", "--same-image"]
    run_cli(*robust, "--input-size", 64, "--fit-rate", 0.1, "-o", tmp_path / "robust")
    assert (tmp_path / "robust" / "robustness_results.csv").stat().st_size


def test_all_detectors_of_the_papers_table_run(run_cli, tiny_codec, tmp_path, no_drawing):
    """The 18 of arXiv 2512.14421, and SSCD's form: real classes, random weights, few images."""
    transformers = pytest.importorskip("transformers", reason="data2vec needs the extra")
    images = tmp_path / "images"
    for identity in range(4):
        (images / f"id{identity}").mkdir(parents=True)
        for variant in range(2):
            draw_identity(identity, variant).save(images / f"id{identity}" / f"{variant}.png")
    rows = [f"id{i}/{v}.png,{i},TEST" for i in range(4) for v in range(2)]
    (images / "list.csv").write_text("\n".join(["path,id,Split", *rows]) + "\n")
    torch.manual_seed(0)
    names = ["mse", "ssim", "ncc", "random"]
    for kind, model in TIMM.items():
        file = tmp_path / f"{kind}.safetensors"
        save_file(timm.create_model(model, pretrained=False).state_dict(), file)
        size = f"&size={SIDE[kind]}" if kind in SIDE else ""
        names.append(f"{kind}?weights={file}{size}&label={kind}")
    resnet = timm.create_model("resnet50", pretrained=False, num_classes=0).state_dict()
    for kind in ("byol", "swav"):
        torch.save(resnet, tmp_path / f"{kind}.pth")
        names.append(f"{kind}:{tmp_path / kind}.pth?label={kind}")
    config = transformers.Data2VecVisionConfig()
    transformers.Data2VecVisionModel(config, add_pooling_layer=False).save_pretrained(
        tmp_path / "data2vec"
    )
    names.append(f"data2vec:{tmp_path / 'data2vec'}?label=data2vec")
    for number, name in enumerate(("lcmem", "lcmem", "siamese", "siamese-ntxent",
                                   "siamese-ntxent-u")):  # fmt: skip
        file = tmp_path / f"{number}.safetensors"
        checkpoint_of(tiny_codec if name == "lcmem" else None, number, file)
        names.append(f"{name}:{file}?label={name} {number}")
    sscd = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.AdaptiveAvgPool2d(1),
                               torch.nn.Flatten())  # fmt: skip
    torch.jit.trace(sscd.eval(), torch.zeros(1, 3, 64, 64)).save(str(tmp_path / "sscd.pt"))
    names.append(f"torchscript:{tmp_path / 'sscd.pt'}?size=64&label=SSCD")
    assert len(names) == 18 + 1
    out = tmp_path / "out"
    run_cli(
        "benchmark", "--filelist", images / "list.csv", "--fit-split", "none", "--strict",
        "--detectors", ",".join(names), "--input-size", 64, "--latex", "-o", out,
    )  # fmt: skip
    results = json.loads((out / "benchmark_results.json").read_text())["detectors"]
    assert len(results) == 19
    assert all(0 <= item["overall"]["auc"] <= 1 for item in results.values())
    assert len({item["fingerprint"] for item in results.values()}) == 19


def checkpoint_of(codec: Path | None, seed: int, file: Path) -> None:
    """Save a ConvNeXt-Tiny on latents, or a ResNet-101 on pixels, with random weights."""
    from conftest import random_checkpoint

    from lcmem_cli.engine.models.checkpoint import save_checkpoint
    from lcmem_cli.engine.models.codec_loading import load_codec
    from lcmem_cli.engine.models.siamese import NetworkSpec

    loaded = load_codec("none" if codec is None else str(codec))
    spec = NetworkSpec(
        backbone="resnet101" if codec is None else "convnext_tiny",
        in_channels=loaded.spec.latent_channels,
        num_features=1024 if codec is None else 512,
        input_size=64 // loaded.spec.downsampling,
        normalisation="imagenet" if codec is None else "sample",
    )
    made = random_checkpoint(spec, loaded, image_size=64, seed=seed).with_fingerprint()
    save_checkpoint(file, made)

"""The codec that starts from pixels: nothing is lost before training begins."""

import json

import pytest
import torch

from lcmem_cli.engine.config import CodecConfig, load_config
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.training import autoencoder
from lcmem_cli.engine.training.autoencoder import build_autoencoder


def config(channels, latent_channels, groups):
    return CodecConfig(
        kind="codec",
        model={
            "block_channels": channels,
            "layers_per_block": 0,
            "latent_channels": latent_channels,
            "norm_groups": groups,
            "start": "pixels",
        },
    )


def blocks(images, levels):
    """Sort the pixels of each block into channels."""
    for _ in range(levels):
        places = [images[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)]
        images = torch.cat(places, dim=1)
    return images


@pytest.mark.parametrize(
    ("levels", "channels", "latent_channels", "groups"),
    [(0, 8, 3, 2), (1, 16, 12, 2), (1, 18, 14, 3), (2, 56, 48, 4)],
)
def test_the_first_latents_are_the_pixels_of_each_block(levels, channels, latent_channels, groups):
    model = build_autoencoder(config((channels,) * (levels + 1), latent_channels, groups)).eval()
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    # Dark, bright, flat, and half covered: statistics of the image must not matter.
    images = torch.stack([noise[0] * 0.1 - 0.9, noise[1] * 0.3 + 0.7, noise[2] * 0, noise[3]])
    images[3, :, :16] = -1
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
    expected = blocks(images, levels)
    torch.testing.assert_close(
        posterior.mode()[:, : expected.shape[1]], expected, atol=0.01, rtol=0
    )
    assert posterior.mode()[:, expected.shape[1] :].abs().sum() == 0
    assert posterior.std.max() < 0.06


@pytest.mark.parametrize(
    ("channels", "latent_channels", "groups", "message"),
    [
        ((16, 16), 11, 2, "needs 12 latent_channels and 12 channels beside two in each group"),
        ((12, 12), 12, 2, "there are 12 and 8"),
        ((16, 16), 12, 8, "groups of 3 channels or more"),
    ],
)
def test_too_few_channels_are_refused(channels, latent_channels, groups, message):
    with pytest.raises(InputError, match=message):
        build_autoencoder(config(channels, latent_channels, groups))


def test_a_state_of_another_run_is_not_continued(image_folder, tmp_path):
    settings = [
        "schedule.steps=1", "schedule.crop_size=16", "image.size=32", "schedule.batch_size=2",
        "runtime.device=cpu",
    ]  # fmt: skip
    options = {"basedir": None, "output": tmp_path / "codec"}
    first = load_config("mini/codec", CodecConfig, overrides=settings)
    result = autoencoder.train_codec(first, image_folder, **options)
    written = json.loads((tmp_path / "codec" / "training.json").read_text())
    assert written["val_psnr"] == result.val_psnr and written["steps"] == 1
    assert {p.name for p in (tmp_path / "codec" / "codec").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert not list((tmp_path / "codec").glob("tmp*"))
    autoencoder.train_codec(first, image_folder, resume=True, **options)  # writes it anew
    (tmp_path / "codec" / "run.json").unlink()
    other = load_config("mini/codec", CodecConfig, overrides=[*settings, "runtime.seed=5"])
    with pytest.raises(InputError, match="belongs to a run with another config"):
        autoencoder.train_codec(other, image_folder, **options)

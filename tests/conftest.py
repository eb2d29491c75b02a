"""Fixtures that several test files share."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Server, draw_nothing
from PIL import Image
from typer.testing import CliRunner, Result

from lcmem_cli.engine.reporter import Reporter

# The suite runs in several processes; with threads besides they would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the library is imported
os.environ.setdefault("TERMINAL_WIDTH", "120")
os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell, where lcmem ignores Ctrl-C as it should; the tests of
    # Ctrl-C need the usual state, which child processes inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)

RunCli = Callable[..., Result]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Keep every test away from the user's folders."""
    monkeypatch.setenv("LCMEM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no real plots, which take most of the time of a small training."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", draw_nothing)


@pytest.fixture
def run_cli() -> RunCli:
    """Run ``lcmem`` in this process and check the exit code."""

    def run(*args: object, exit_code: int = 0) -> Result:
        from lcmem_cli.cli.app import app

        result = CliRunner().invoke(app, [str(arg) for arg in args])
        shown = f"{result.stdout}\n{result.stderr}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, shown
        return result

    return run


class Listener(Reporter):
    """Remembers warnings, and events as (name, fields)."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.events: list[tuple[str, dict[str, object]]] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))


def save_with_header(path, tensors, header):
    """Write a checkpoint of any header, with the checksum that goes with it."""
    import json

    from safetensors.torch import save_file

    from lcmem_cli.engine.models.header import HEADER_KEY, checksum

    signed = {**header, "checksum": checksum(header, ())}
    save_file(tensors, path, metadata={HEADER_KEY: json.dumps(signed)})


def random_checkpoint(spec: Any, codec: Any, *, image_size: int, seed: int = 0, **more: Any) -> Any:
    """Make a checkpoint of a network with random weights, always the same.

    Args:
        spec: of the network.
        codec: loaded; ``none`` has no weights.
        image_size: side in pixels.
        seed: of the weights.
        **more: further fields of the checkpoint.
    """
    import torch

    from lcmem_cli.engine.models.checkpoint import Checkpoint
    from lcmem_cli.engine.models.siamese import SiameseNetwork

    torch.manual_seed(seed)
    inside = codec.model is not None
    return Checkpoint(
        stage="stage1",
        network=spec,
        network_state=SiameseNetwork(spec).state_dict(),
        codec=codec.spec,
        codec_config=codec.model_config() if inside else None,
        codec_state=codec.encoder_state() if inside else None,
        image_size=image_size,
        **more,
    )


def with_threshold(checkpoint: Any) -> Any:
    """Return a checkpoint with its fingerprint and a threshold for it."""
    from lcmem_cli.engine.results import Threshold

    made = checkpoint.with_fingerprint()
    threshold = Threshold(
        value=0.5,
        kind="fpr",
        rate=0.01,
        fingerprint=made.fingerprint,
        fitted_on="VAL",
        num_positives=3,
        num_negatives=100,
    )
    return dataclasses.replace(made, thresholds=(threshold,))


def draw_identity(identity: int, variant: int, side: int = 48) -> Image.Image:
    """Draw an image that is much like others of its identity and unlike all others."""
    rng = np.random.default_rng(identity)
    y, x = np.mgrid[:side, :side] / side
    waves = sum(
        a * np.sin(2 * np.pi * (fx * x + fy * y) + p)
        for a, fx, fy, p in zip(
            rng.uniform(0.3, 1, 4),
            rng.uniform(-4, 4, 4),
            rng.uniform(-4, 4, 4),
            rng.uniform(0, 6, 4),
            strict=True,
        )
    )
    colour = rng.uniform(0.3, 1, 3)
    noise = np.random.default_rng([identity, variant]).normal(0, 0.08, (side, side, 3))
    pixels = (0.5 + 0.2 * waves[..., None]) * colour + noise
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


@pytest.fixture(scope="session")
def drawn_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``image_folder`` is copied from, so that it is drawn once; left as it is."""
    folder = tmp_path_factory.mktemp("drawn") / "images"
    for identity in range(24):
        (folder / f"id{identity:02d}").mkdir(parents=True)
        for variant in range(3):
            draw_identity(identity, variant).save(folder / f"id{identity:02d}" / f"{variant}.png")
    return folder


@pytest.fixture
def image_folder(drawn_images: Path, tmp_path: Path) -> Path:
    """A folder of 24 identities with three images each, to change at will."""
    return shutil.copytree(drawn_images, tmp_path / "images", copy_function=shutil.copyfile)


@pytest.fixture
def shared_data() -> Iterator[Path]:
    """The real images, where they are on this machine."""
    given = os.environ.get("LCMEM_DATA")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "filelist.csv").is_file():
        pytest.skip("the real images are not on this machine (set LCMEM_DATA)")
    yield folder


def codec_of(store: Path) -> str:
    """Return the option that makes a training config name the codec of a latent store."""
    import json

    name = json.loads((store / "meta.json").read_text())["codec"]["name"]
    return f"--set=codec.name={name}"


def save_tiny_codec(folder: Path) -> Path:
    """Write a random two-level AutoencoderKL as a diffusers folder."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Starts commands in processes of their own, see ``Server``."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of a few hundred weights."""
    return save_tiny_codec(tmp_path_factory.mktemp("codec") / "codec")

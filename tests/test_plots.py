import numpy as np
import pytest
from PIL import Image

from lcmem_cli.engine.report.plots import (
    plot_bars,
    plot_loss_curves,
    plot_roc,
    plot_strengths,
    plot_transforms,
    styles,
)

NAMES = [f"detector {i}" for i in range(15)] + ["$x$_^", "a" * 90, "line\nbreak\udce9"]


def roc(target):
    grid = np.linspace(0, 1, 5000)
    plot_roc({n: (grid, grid ** (1 / (k + 1)), 1 - k / 40) for k, n in enumerate(NAMES)}, target)


def bars(target):
    values = {n: None if k % 5 == 4 else (0.5, 0.4, 0.6) for k, n in enumerate(NAMES)}
    plot_bars({"AUC": values, "TPR": dict.fromkeys(NAMES, (0.2, None, None))}, target)


def strengths(target):
    curves = {"Noise": {n: [(0.1, 0.9), (0.2, 0.3)] for n in NAMES}}
    curves["Flip"] = {n: [(1.0, 0.5)] for n in NAMES}
    plot_strengths(curves, target, ylabel="recall", untransformed=dict.fromkeys(NAMES, 1.0))


def only_single_edits(target):
    plot_strengths({"Flip": {"mse": [(1.0, 0.5)]}}, target, ylabel="recall")


def transforms(target):
    picture = np.random.default_rng(0).random((8, 8, 3))
    plot_transforms(picture, {"A": [("A 1", picture)] * 7, "B": [("B 1", picture)] * 4}, target)


def losses(target):
    keys = [f"{side}_{part}" for side in ("train", "val") for part in ("loss", "bce", "ntxent")]
    plot_loss_curves([{"epoch": e, **dict.fromkeys(keys, 1 / e)} for e in range(1, 4)], target)


@pytest.mark.parametrize("draw", [roc, bars, strengths, only_single_edits, transforms, losses])
def test_a_plot_is_written_twice_with_the_same_bytes(draw, tmp_path):
    draw(tmp_path / "a.b")
    draw(tmp_path / "c")
    for suffix in (".png", ".pdf"):
        data = (tmp_path / f"a.b{suffix}").read_bytes()
        assert data == (tmp_path / f"c{suffix}").read_bytes()
        assert b"CreationDate" not in data
    with Image.open(tmp_path / "a.b.png") as image:
        assert image.info["dpi"][0] == pytest.approx(200, abs=0.1)
        pixels = np.asarray(image.convert("L"))
    assert 0.005 < (pixels < 200).mean() < 0.9  # something is drawn, on a light ground


def test_eighteen_lines_look_different():
    looks = [tuple(style.values()) for style, _ in zip(styles(), NAMES, strict=False)]
    assert len(set(looks)) == len(NAMES) == 18

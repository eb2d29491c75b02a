import numpy as np
import pytest
from PIL import Image

from lcmem_cli.engine.data.perturb import (
    EXTENDED_SUITE,
    Setting,
    shown_strength,
    strength_axis,
)
from lcmem_cli.engine.report import plots
from lcmem_cli.engine.report.plots import (
    Curve,
    Rate,
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
    curves = {
        n: Curve(grid, grid ** (1 / (k + 1)), 1 - k / 40, 4999, (0.2, 0.9) if k % 2 else None)
        for k, n in enumerate(NAMES)
    }
    plot_roc(curves, target)


def bars(target):
    values = {n: None if k % 5 == 4 else (0.5, 0.4, 0.6) for k, n in enumerate(NAMES)}
    plot_bars({"AUC": values, "TPR": dict.fromkeys(NAMES, (0.2, None, None))}, target)


def strengths(target):
    curves = {"Noise": {n: [Rate("0.1", 0.9, (0.8, 1)), Rate("0.2", 0.3)] for n in NAMES}}
    curves["Flip"] = {n: [Rate("1", 0.5)] for n in NAMES}
    unedited = dict.fromkeys(NAMES, Rate("none", 1.0))
    plot_strengths(curves, target, ylabel="recall", xlabels={}, untransformed=unedited)


def only_single_edits(target):
    curves, unedited = {"Flip": {"mse": [Rate("1", 0.5)]}}, {"mse": Rate("none", 1.0)}
    plot_strengths(curves, target, ylabel="recall", xlabels={}, untransformed=unedited)


def transforms(target):
    picture = np.random.default_rng(0).random((8, 8, 3))
    plot_transforms(picture, {"A": [("A 1", picture)] * 7, "B": [("B 1", picture)] * 4}, target)


def losses(target):
    keys = [f"{side}_{part}" for side in ("train", "val") for part in ("loss", "bce", "ntxent")]
    plot_loss_curves(
        [{"epoch": e, **dict.fromkeys(keys, 1 / e)} for e in range(1, 4)], target, best_epoch=2
    )


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


@pytest.fixture
def drawn(monkeypatch):
    """Figures in place of files."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, target: figures.append(figure))
    return figures


def test_no_roc_curve_reaches_below_one_negative_pair(drawn, tmp_path):
    fpr, tpr = np.array([0, 0, 0.02, 0.02, 1]), np.array([0, 0.5, 0.6, 0.9, 1])
    plot_roc({"a": Curve(fpr, tpr, 0.9, 50, (0.8, 0.95)), "b": Curve(fpr, tpr, 0.8, 50)}, tmp_path)
    _, low = drawn[0].axes
    assert low.get_xlim()[0] == pytest.approx(1 / 50)
    assert all(min(line.get_xdata()) >= 1 / 50 - 1e-12 for line in low.lines)
    assert "1 of 50 negative pairs" in low.get_xlabel() and low.get_ylabel()
    texts = [text.get_text() for text in drawn[0].legends[0].texts]
    assert texts == ["a (0.900, 0.800–0.950)", "b (0.800)"]


def test_a_measure_that_is_known_of_none_has_no_panel(drawn, tmp_path):
    plot_bars({"AUC": {"a": (0.9, 0.8, 1.0)}, "TPR": {"a": None}}, tmp_path)
    (axis,) = drawn[0].axes
    assert axis.get_title() == "AUC" and axis.get_xlim() == (0, 1) and axis.get_xlabel()


def test_rates_that_the_pairs_cannot_tell_have_no_line(drawn, tmp_path):
    curves = {
        "JPEGCompression": {"a": [Rate("95", 0.06, (0.02, 0.1)), Rate("10", 0.0)]},
        "Noise": {"a": [Rate("0.1", 0.04, (0.0, 0.08)), Rate("0.2", 0.05)]},
    }
    plot_strengths(
        curves, tmp_path, ylabel="false-positive rate", note="n", lowest=0.02,
        xlabels={name: strength_axis(name) for name in curves},
        untransformed={"a": Rate("none", 0.03)},
    )  # fmt: skip
    jpeg, noise = drawn[0].axes
    connected = [
        line for line in jpeg.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 2
    ]
    assert np.isnan(connected[0].get_ydata()[-1]) and connected[0].get_ydata()[1] == 0.06
    assert 0.1 < jpeg.get_ylim()[1] < 0.15  # the data, not everything up to 1
    assert jpeg.get_xlabel() == "quality (harsher to the right)"
    assert noise.get_xlabel() == "standard deviation (harsher to the right)"
    assert jpeg.get_ylabel() == "false-positive rate"
    assert [label.get_text() for label in jpeg.get_xticklabels()] == ["none", "95", "10"]


def test_strengths_are_named_as_people_know_them():
    assert str(Setting("JPEGCompression", 90.0)) == "JPEG quality 10"
    assert shown_strength("JPEGCompression", 5.0) == "95" and shown_strength("Noise", 0.1) == "0.1"
    assert strength_axis("Stretch") == "factor of the width"  # harsher on both sides
    for setting in EXTENDED_SUITE:
        assert strength_axis(setting.transform) != "strength"


def test_the_kept_epoch_is_marked_and_axes_have_units(drawn, tmp_path):
    keys = [f"{side}_{part}" for side in ("train", "val") for part in ("loss", "bce", "ntxent")]
    history = [{"epoch": e, **dict.fromkeys(keys, 1 / e)} for e in range(1, 8)]
    plot_loss_curves(history, tmp_path, best_epoch=5)
    for axis in drawn[0].axes:
        assert [5, 5] in [list(line.get_xdata()) for line in axis.lines]
        assert axis.get_xlabel() == "epoch" and axis.get_ylabel()
        assert "kept: epoch 5" in [text.get_text() for text in axis.get_legend().texts]

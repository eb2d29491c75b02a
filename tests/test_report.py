import base64
import hashlib
import html
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from audit_images import SmallCorrelation, picture, save_all
from PIL import Image

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.report.html import (
    Distribution,
    content_policy,
    draw_distribution,
    printable,
    script_json,
)
from lcmem_cli.engine.report.thumbnails import SIDES, data_uri, make_thumbnails


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of an audit with three exact copies."""
    root = tmp_path_factory.mktemp("page")
    save_all(root / "train", range(12))
    save_all(root / "held-out", range(1000, 1040))
    save_all(root / "generated", range(2000, 2006))
    for seed in range(3):
        shutil.copy(root / "train" / f"{seed:05d}.png", root / "generated" / f"copy{seed}.png")
    audit(
        root / "generated",
        root / "train",
        held_out=root / "held-out",
        fpr=0.025,
        detector=SmallCorrelation(),
        output=root / "out",
    )
    return (root / "out" / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_outside(page):
    links = re.findall(r'\s(?:src|href|action|data)="([^"]*)"', page)
    assert len(links) > 5 and all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"@import|url\(|https?://|//[a-z]+\.", page)


def test_the_policy_allows_the_script_and_style_of_the_page_alone(page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert policy == content_policy(script, style)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_statement_comes_first(page):
    body = page[page.index("<main>") :]
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", body)[1]
    assert "of 9 generated images (33.3" in heading
    assert "match a training image more closely than held-out real images do" in heading
    assert body.index("<h1") < body.index("<h2")


def test_the_data_of_the_page_shows_each_flagged_pair_once(page):
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)[1])
    exact = {pair["q"]: pair for pair in data["pairs"] if pair["k"] == "identical file"}
    assert {name: pair["m"] for name, pair in exact.items()} == {
        f"copy{seed}.png": f"{seed:05d}.png" for seed in range(3)
    }
    for seed in range(3):
        pair = exact[f"copy{seed}.png"]
        shown = decode(data["pictures"][pair["a"]])
        assert shown.size == (48, 48)  # not enlarged
        difference = np.abs(np.asarray(shown, int) - np.asarray(picture(seed), int))
        assert difference.mean() < 6
        assert data["pictures"][pair["a"]] == data["pictures"][pair["b"]]


def test_script_data_cannot_end_its_element_and_means_the_same():
    hostile = {"name": "</script><!--<script>&amp;\u2028\ud800"}
    text = script_json(hostile)
    assert not set("<>&\u2028\ud800") & set(text)
    assert json.loads(text) == hostile


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain ä 漢.png", "plain ä 漢.png"),
        ("a\nb\t\x00", "a\\nb\\t\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff.png", "\\udcff.png"),
    ],
)
def test_printable_names_hide_nothing(name, shown):
    assert printable(name) == shown
    shown.encode("utf-8")


def numbers(path):
    return [float(value) for value in re.findall(r"[VM,]?(-?\d+\.?\d*)", path)]


def test_the_plot_shows_shares_and_the_threshold_in_place():
    plot = draw_distribution(
        Distribution(
            generated=np.array([0.0, 0.0, 1.0, 1.0]),
            null=np.array([0.0] * 30 + [1.0] * 10),
            threshold=0.5,
            as_logit=False,
        )
    )
    assert [(bar.generated, bar.null) for bar in plot.bars] == [(0.5, 0.75), (0.5, 0.25)]
    assert plot.threshold_x == pytest.approx((plot.left + plot.width - plot.right) / 2)
    assert plot.x_ticks[0] == (plot.left, "0") and plot.x_ticks[-1][1] == "1"
    assert min(numbers(plot.null_path)) == plot.top  # the highest bin reaches the top
    assert max(numbers(plot.null_path)) == plot.width - plot.right


def test_single_images_show_where_most_stand_in_one_bin():
    most = np.array([0.0] * 99 + [1.0])
    plot = draw_distribution(
        Distribution(generated=most, null=most, threshold=None, as_logit=False)
    )
    assert plot.is_root and plot.y_ticks[0][1] == "0 %"
    base, last = plot.height - plot.bottom, float(plot.null_path.split("V")[-2].split("H")[0])
    assert base - last > 0.09 * (base - plot.top)  # 1 % has a tenth of the height


def test_no_bin_holds_scores_on_both_sides_of_the_threshold():
    null = np.array([0.1, 0.2, 0.37, 0.37])
    generated = np.array([0.05, 0.36, 0.371, 0.9])
    plot = draw_distribution(
        Distribution(generated=generated, null=null, threshold=0.37, as_logit=False)
    )
    assert sum(bar.null for bar in plot.bars) == sum(bar.generated for bar in plot.bars) == 1
    assert max(bar.high for bar in plot.bars if bar.null) == pytest.approx(0.37)
    beyond = [bar for bar in plot.bars if bar.low >= 0.37 - 1e-9]
    assert sum(bar.generated for bar in beyond) == 0.5


def test_probabilities_are_drawn_at_their_logits_and_read_as_they_are():
    scores = np.log(np.array([0.01, 0.5, 0.9]) / (1 - np.array([0.01, 0.5, 0.9])))
    plot = draw_distribution(
        Distribution(generated=scores, null=scores, threshold=0.0, as_logit=True)
    )
    places = [math.log(float(label) / (1 - float(label))) for _, label in plot.x_ticks]
    per_unit = {
        (x - plot.threshold_x) / place for (x, _), place in zip(plot.x_ticks, places, strict=True)
    }
    assert len(places) > 3 and min(per_unit) == pytest.approx(max(per_unit), rel=0.01)
    assert 0.4 < max(bar.high for bar in plot.bars if bar.high < 0.6) <= 0.5


def test_ticks_that_lie_close_have_labels_of_their_own():
    scores = 1 - np.linspace(0, 3e-7, 5)
    plot = draw_distribution(
        Distribution(generated=scores, null=scores, threshold=None, as_logit=False)
    )
    labels = [label for _, label in plot.x_ticks]
    assert len(set(labels)) == len(labels) > 2


@pytest.mark.parametrize("as_logit", [False, True])
@pytest.mark.parametrize(
    "values", [[], [0.3], [1e-12, 2e-12], [-40, 40], [5, 5, 5], [40, 40], [-40, -40]]
)
def test_the_plot_can_be_drawn_for_any_scores(values, as_logit):
    scores = np.array(values, dtype=float)
    plot = draw_distribution(
        Distribution(generated=scores, null=scores[:1], threshold=None, as_logit=as_logit)
    )
    assert "nan" not in plot.generated_path
    assert plot.x_ticks or (as_logit and min(values) == max(values))  # nothing but 0 or 1
    assert plot.threshold_x is None


def decode(uri):
    kind, _, data = uri.partition(";base64,")
    assert kind in ("data:image/webp", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_thumbnails_keep_proportions_and_never_grow():
    assert decode(data_uri(picture(1, side=48), 384)).size == (48, 48)
    assert decode(data_uri(picture(1, side=400).resize((400, 100)), 112)).size == (112, 28)


def test_thumbnails_shrink_until_they_fit_their_budget(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    paths = [tmp_path / "noise.png"]
    large = make_thumbnails(paths, load_image)
    assert large.side == SIDES[0]
    small = make_thumbnails(paths, load_image, budget_bytes=large.num_bytes // 2)
    assert SIDES[-1] < small.side < SIDES[0] and small.num_bytes <= large.num_bytes // 2
    assert make_thumbnails(paths, load_image, budget_bytes=1).side == SIDES[-1]


def test_thumbnails_of_missing_files_are_left_out_and_order_holds(tmp_path):
    save_all(tmp_path, range(4))
    paths = [tmp_path / f"{n:05d}.png" for n in (0, 1, 2, 3)]
    paths[1].unlink()
    found = make_thumbnails(paths, load_image, workers=3)
    assert [uri is None for uri in found.uris] == [False, True, False, False]
    assert found == make_thumbnails(paths, load_image, workers=1)
    for path, uri in zip(paths, found.uris, strict=True):
        if uri is not None:
            expected = np.asarray(Image.open(path).convert("RGB"), int)
            assert np.abs(np.asarray(decode(uri), int) - expected).mean() < 6


def test_two_thousand_pairs_of_noise_stay_below_forty_megabytes():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert 4000 * len(data_uri(Image.fromarray(noise), SIDES[-1])) < 40_000_000

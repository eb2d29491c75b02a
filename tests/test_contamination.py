"""Real images that are copies of training images: shown, and what they cost is told."""

from __future__ import annotations

import re
import shutil

import pytest
from audit_images import SmallCorrelation, altered, picture, save_all

from lcmem_cli.engine.evaluation.audit.run import audit


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("contaminated")
    save_all(root / "train", range(40))
    save_all(root / "held-out", range(1000, 1030))
    save_all(root / "generated", range(2000, 2010))
    altered(picture(7)).save(root / "held-out" / "leaked.png")
    return root


def run(root, **options):
    given = {"held_out": root / "held-out", "fpr": 0.05, "detector": SmallCorrelation()}
    return audit(root / "generated", root / "train", sensitivity=0, **given | options)


def test_the_closest_real_images_stand_with_the_threshold_without_each(sets, tmp_path):
    result = run(sets, output=tmp_path / "out")
    closest = result.null.closest
    assert len(closest) == 10
    assert (closest[0].path, closest[0].match) == ("leaked.png", "00007.png")
    assert [item.score for item in closest] == sorted((i.score for i in closest), reverse=True)
    for item in closest[:3]:
        other = tmp_path / item.path
        shutil.copytree(sets / "held-out", other)
        (other / item.path).unlink()
        assert item.threshold_without == run(sets, held_out=other).rule.threshold
    assert closest[0].threshold_without < result.rule.threshold == closest[0].score
    page = (tmp_path / "out" / "report.html").read_text()
    shown = page[page.index('id="real"') : page.index('id="set"')]
    pictures = re.findall(r'src="data:image/[^"]+" alt="(Real|Training) image ([^"]+)"', shown)
    assert pictures == [
        pair for item in closest for pair in (("Real", item.path), ("Training", item.match))
    ]
    assert f"threshold without it {closest[0].threshold_without:.4g}" in shown
    assert {item.may_be_copy for item in closest} == {None}  # nothing was aligned


def test_no_threshold_is_told_where_none_would_be_left(sets, tmp_path):
    held_out = save_all(tmp_path / "held-out", range(1000, 1019))  # as few as 5 % take
    few = run(sets, held_out=held_out)
    assert {item.threshold_without for item in few.null.closest} == {None}
    assert {item.threshold_without for item in run(sets, bh=True).null.closest} == {None}


@pytest.mark.parametrize("kind", ["leave-one-out", "split"])
def test_images_of_the_training_set_itself_are_shown_likewise(sets, tmp_path, kind):
    result = run(sets, held_out=None, null=kind, fpr=0.1, output=tmp_path)
    names = {path.name for path in (sets / "train").iterdir()}
    assert all({item.path, item.match} <= names for item in result.null.closest)
    assert "no picture" not in (tmp_path / "report.html").read_text().split("<script>")[0]

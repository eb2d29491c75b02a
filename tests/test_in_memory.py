"""Images in memory go the way of files wherever sets of images are taken."""

import gc

import numpy as np
import pytest
import torch
from audit_images import SmallCorrelation, altered, picture, save_all
from torch.utils.data import DataLoader, TensorDataset

from lcmem_cli import Guard, Index, audit, in_memory
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.sources import opened
from lcmem_cli.engine.errors import InputError


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("in-memory")
    save_all(root / "training", range(30))
    save_all(root / "real", range(100, 130))
    save_all(root / "generated", range(200, 208))
    for seed in (3, 7):
        altered(picture(seed)).save(root / "generated" / f"9-copy-{seed}.png")
    return root


def pictures(folder):
    return [load_image(path) for path in sorted(folder.iterdir())]


def tensors(folder):
    pixels = np.stack([np.asarray(image) for image in pictures(folder)])
    return torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()) / 127.5 - 1


def test_an_audit_of_images_in_memory_is_that_of_their_files(sets, tmp_path):
    names = ("generated", "training", "real")
    expected = audit(*(sets / n for n in names[:2]), held_out=sets / "real", fpr=0.1,
                     detector=SmallCorrelation())  # fmt: skip
    loader = DataLoader(TensorDataset(tensors(sets / "generated"), torch.arange(10)), batch_size=4)
    result = audit(
        loader, tensors(sets / "training").numpy().transpose(0, 2, 3, 1),
        held_out=list(tensors(sets / "real")), value_range=(-1, 1),
        fpr=0.1, detector=SmallCorrelation(), output=tmp_path / "audit",
    )  # fmt: skip
    assert result.rule.threshold == expected.rule.threshold and result.num_flagged >= 2
    for match, other in zip(result.matches, expected.matches, strict=True):
        assert (match.score, match.p_value, match.flagged) == (
            other.score, other.p_value, other.flagged
        )  # fmt: skip
    assert result.matches[0].query.endswith("000000")
    assert result.generated.digest != expected.generated.digest  # no file is the same file
    assert result._repr_html_().count("<img ") == 2 * min(6, result.num_flagged)
    assert "data:image/" in (tmp_path / "audit" / "report.html").read_text()
    held = len(opened._mounted)
    del result, match
    gc.collect()
    assert len(opened._mounted) == held - 3


def test_nothing_is_held_where_an_audit_fails(sets):
    before = dict(opened._mounted)
    with pytest.raises(InputError, match="needs at least 99 real images"):
        audit(pictures(sets / "generated"), sets / "training", held_out=sets / "real")
    assert opened._mounted == before


def test_names_are_told_where_they_are_given(sets):
    images = pictures(sets / "generated")
    names = [f"prompt-{number // 2}/{number}.png" for number in range(10)]
    place = in_memory(images, names=names)
    result = audit(place, sets / "training", held_out=sets / "real", fpr=0.1,
                   detector=SmallCorrelation())  # fmt: skip
    assert [match.query.partition("::")[2] for match in result.matches[::5]] == names
    assert result.generated.num_identities == 5
    with pytest.raises(InputError, match="9 names for 10 images"):
        in_memory(images, names=names[1:])
    with pytest.raises(InputError, match="lead out"):
        in_memory(images[:1], names=["../a.png"])
    opened.unmount(place)


def test_a_guard_is_fitted_to_images_in_memory(sets):
    options = {"fpr": 0.1, "detector": SmallCorrelation()}
    expected = Guard.fit(sets / "training", sets / "real", **options)
    before = len(opened._mounted)
    guard = Guard.fit(tensors(sets / "training"), pictures(sets / "real"), value_range=(-1, 1),
                      **options)  # fmt: skip
    assert guard.rule == expected.rule
    (verdict,) = guard.check(picture(3))
    assert (verdict.flagged, verdict.tier) == (True, "same pixels")
    assert verdict.match.endswith("000003")
    del guard
    gc.collect()
    assert len(opened._mounted) == before


def test_an_index_is_built_of_images_in_memory(sets, tmp_path):
    detector = SmallCorrelation()
    index = Index.build(tensors(sets / "training"), tmp_path / "index", detector=detector,
                        value_range=(-1, 1))  # fmt: skip
    known = Index.build(sets / "training", tmp_path / "files", detector=detector)
    np.testing.assert_array_equal(index.features, known.features)
    found = index.search(detector, detector.embed(picture(5)), 1)[0][0]
    assert found.path.endswith("000005") and found.score == pytest.approx(1)

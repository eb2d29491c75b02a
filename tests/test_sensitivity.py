"""What an audit says it would have found: counts of known answer, and no part in anything else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from audit_images import SmallCorrelation, picture, save_all, small_network
from PIL import Image

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.detectors.base import Adapted
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.evaluation.audit.sensitivity import make_copies
from lcmem_cli.engine.evaluation.audit.sets import embed_set, list_set
from lcmem_cli.engine.evaluation.calibration import clopper_pearson
from lcmem_cli.engine.evaluation.indexing import add_to_index
from lcmem_cli.engine.models.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """60 training images; 30 generated and 60 held-out ones, none of them a copy."""
    root = tmp_path_factory.mktemp("sensitivity")
    save_all(root / "train", range(60))
    save_all(root / "held-out", range(1000, 1060))
    save_all(root / "generated", range(2000, 2030))
    return root


def run(root, **options):
    options = {"held_out": root / "held-out", "fpr": 0.05, "detector": SmallCorrelation()} | options
    return audit(root / "generated", root / "train", **options)


def copies_of(folder, count, *, seed=0, bank=None, compute=None):
    compute = Compute(workers=1) if compute is None else compute
    training = embed_set(list_set(folder, what="training"), SmallCorrelation(), compute)
    bank = np.arange(training.num_distinct) if bank is None else bank
    return make_copies(training, bank, count, seed, compute)


def test_copies_that_the_measure_cannot_miss_are_found_and_others_are_not(sets):
    found = run(sets, sensitivity=123).sensitivity
    assert found.num_planted == 123 and found.reason is None
    shares = {edit.transform: edit.num_found / edit.num_planted for edit in found.transforms}
    # Correlation of 8 x 8 pixels takes no notice of these, and everything of a turned picture.
    assert shares["JPEGCompression"] == shares["LowResolution"] == shares["GaussianBlur"] == 1
    assert shares["VerticalFlip"] == shares["HorizontalFlip"] == 0
    assert sum(edit.num_found for edit in found.transforms) == found.num_found
    assert sum(edit.num_planted for edit in found.edits) == 123
    assert 0 < found.num_traced <= found.num_found
    order = [edit.num_found / edit.num_planted for edit in found.transforms]
    assert order == sorted(order)


def test_the_copies_have_no_part_in_anything_else(sets, tmp_path):
    documents = []
    for number in (0, 40):
        run(sets, fpr=0.02, sensitivity=number, output=tmp_path / str(number))
        document = json.loads((tmp_path / str(number) / "audit.json").read_text())
        said = document.pop("sensitivity"), document.pop("statement"), document["does_not_show"]
        documents.append({k: v for k, v in document.items() if k not in ("times", "does_not_show")})
        page = (tmp_path / str(number) / "report.html").read_text()
        if number:
            assert (
                f"altered in {len(said[0]['edits'])} ways, this audit would have found" in said[1]
            )
            assert "Share of planted copies found, by edit" in page
        else:
            assert said[0]["reason"] == "no copies were planted" and said[0]["interval"] is None
            assert said[2].count("How many altered copies it finds: no copies were planted.") == 1
            assert "is not known: no copies were planted." in page
    assert documents[0] == documents[1]
    assert (tmp_path / "0" / "matches.csv").read_bytes() == (
        tmp_path / "40" / "matches.csv"
    ).read_bytes()


def test_a_third_of_the_images_are_planted_unless_told_otherwise(sets):
    assert run(sets).sensitivity.num_planted == (30 + 60) // 3


def test_every_copy_differs_from_its_source_and_sources_take_turns(tmp_path):
    folder = save_all(tmp_path / "set", range(20))
    for file in folder.iterdir():
        Image.open(file).convert("L").save(file)
    copies = copies_of(folder, 41 * 20)
    names = {copy.setting.transform for copy in copies}
    assert names.isdisjoint({"Hue", "Grayscale"})  # which do nothing to grey images
    assert 0.1 not in {c.setting.strength for c in copies if c.setting.transform == "GaussianBlur"}
    assert [copy.source for copy in copies[:20]] != list(range(20))
    for start in range(0, len(copies), 20):
        assert {copy.source for copy in copies[start : start + 20]} == set(range(20))
    assert len({copy.png for copy in copies}) > 0.8 * len(copies)
    assert len({copy.setting for copy in copies}) >= len(EXTENDED_SUITE) - 5
    other = copies_of(folder, 20, seed=1)
    assert [copy.source for copy in other] != [copy.source for copy in copies[:20]]


def test_only_searched_images_and_one_of_each_identity_are_sources(tmp_path):
    for number in range(6):
        save_all(tmp_path / "set" / str(number), range(10 * number, 10 * number + 4))
    bank = np.arange(8, 24)
    copies = copies_of(tmp_path / "set", 4, bank=bank)
    assert sorted(copy.source // 4 for copy in copies) == [2, 3, 4, 5]


@pytest.mark.parametrize("count", [5, 41, 300])
def test_copies_depend_on_neither_threads_nor_processes(sets, count):
    class Part(Ranks):
        """One of three processes; what the others would have made is told to it."""

        def gather(self, value):
            others.append(value)
            return others

    alone = copies_of(sets / "train", count)
    training = embed_set(list_set(sets / "train", what="training"), SmallCorrelation(), Compute())
    others = []
    for rank in range(3):
        compute = Compute(workers=4, ranks=Part(rank, 3))
        together = make_copies(training, np.arange(60), count, 0, compute)
    assert together == alone


def test_benjamini_hochberg_judges_a_copy_as_one_more_generated_image(sets, tmp_path):
    options = {"bh": True, "fpr": 0.2, "seed": 3}
    alone = run(sets, sensitivity=30, **options)
    held_to = alone.sensitivity.num_found
    copies = copies_of(sets / "train", 30, seed=3)
    flagged = 0
    for number, copy in enumerate(copies):
        folder = tmp_path / str(number)
        shutil.copytree(sets / "generated", folder / "generated")
        (folder / "generated" / "copy.png").write_bytes(copy.png)
        result = audit(
            folder / "generated", sets / "train", held_out=sets / "held-out", sensitivity=0,
            detector=SmallCorrelation(), **options,
        )  # fmt: skip
        flagged += any(match.query == "copy.png" for match in result.flagged)
    assert flagged == held_to


def test_an_image_that_is_planted_again_and_again_counts_once(tmp_path, sets):
    few = tmp_path / "sets"
    save_all(few / "train", range(5))
    for name in ("held-out", "generated"):
        shutil.copytree(sets / name, few / name)
    found = run(few, sensitivity=200).sensitivity
    share = found.num_found / 200
    low, high = clopper_pearson(round(share * 5), 5)
    assert found.interval[0] < share < found.interval[1]
    assert found.interval[1] - found.interval[0] > 0.8 * (high - low)


def test_an_index_plants_copies_while_its_files_are_there(sets, tmp_path):
    shutil.copytree(sets / "train", tmp_path / "train")
    detector = SmallCorrelation()
    add_to_index(tmp_path / "train", tmp_path / "index", detector)
    options = {"held_out": sets / "held-out", "fpr": 0.05, "detector": detector, "sensitivity": 60}
    whole = audit(sets / "generated", tmp_path / "index", **options)
    assert whole.sensitivity == run(sets, sensitivity=60).sensitivity
    for number in range(0, 60, 2):
        picture(5000 + number).save(tmp_path / "train" / f"{number:05d}.png")
    half = audit(sets / "generated", tmp_path / "index", **options)
    assert half.sensitivity.num_planted == 30  # one of each is planted, and half have changed
    shutil.rmtree(tmp_path / "train")
    gone = audit(sets / "generated", tmp_path / "index", **options)
    assert gone.sensitivity.num_planted == 0
    why = "How many altered copies it finds: the files of the training images cannot be read."
    assert why in gone.does_not_show
    assert gone.rule == whole.rule and gone.matches == whole.matches


def test_verified_copies_are_found_by_their_evidence_in_batches_of_any_size(tmp_path, run_cli):
    for name, count, first in (("training", 12, 0), ("held-out", 30, 100), ("generated", 8, 200)):
        (tmp_path / name).mkdir()
        for number in range(count):
            draw_scene(first + number, side=96).save(tmp_path / name / f"{number:03d}.png")
    save_checkpoint(tmp_path / "net.safetensors", small_network())
    shown = []
    for more in (("--batch-size", "3", "--workers", "0"), ("--batch-size", "16", "--workers", "3")):
        result = run_cli(
            "audit", tmp_path / "generated", "--against", tmp_path / "training", "--held-out",
            tmp_path / "held-out", "--fpr", "0.05", "--no-adapt", "--sensitivity", "36",
            "--detector", f"lcmem:{tmp_path / 'net.safetensors'}", "--no-cache", *more,
            "-o", tmp_path / "out", "--json", "--overwrite",
        )  # fmt: skip
        shown.append(json.loads(result.stdout)["sensitivity"])
    assert shown[0] == shown[1]
    detector = LCMemDetector.load(str(tmp_path / "net.safetensors"))
    plain = audit(
        tmp_path / "generated", tmp_path / "training", held_out=tmp_path / "held-out", fpr=0.05,
        adapt=False, verify=False, sensitivity=36, detector=detector,
    )  # fmt: skip
    assert plain.sensitivity.num_planted == shown[0]["num_planted"] == 36
    assert plain.sensitivity.num_found + 5 < shown[0]["num_found"]
    assert shown[0]["num_traced"] == shown[0]["num_found"]


class Doubling(SmallCorrelation):
    """Adapted, it takes features of twice the length; others it scores far too low."""

    is_adaptable = True

    def adapted(self, features, contents):
        return Adapted(Doubled(), lambda rows: 2 * rows, len(features))


class Doubled(SmallCorrelation):
    def score_features(self, a, b):
        return super().score_features(a, b) / 4

    def score_matrix(self, a, b):
        return super().score_matrix(a, b) / 4


def test_an_adapted_detector_sees_adapted_copies(sets):
    adapted = run(sets, detector=Doubling(), sensitivity=60)
    assert adapted.adapted_to == 60
    assert adapted.sensitivity == run(sets, sensitivity=60).sensitivity


def test_nothing_is_planted_for_a_negative_number(sets):
    with pytest.raises(InputError, match="--sensitivity is a number of copies"):
        run(sets, sensitivity=-1)

"""What a notebook shows of results, and what a shell prints."""

import dataclasses
import importlib
import pkgutil
import re

import pytest
from audit_images import SmallCorrelation, altered, picture, save_all

import lcmem_cli
from lcmem_cli import Guard, Index, audit, load_detector
from lcmem_cli.engine.evaluation.indexing import add_to_index, query_index
from lcmem_cli.engine.evaluation.inference import score_pairs
from lcmem_cli.engine.results import MAX_REPR, Result


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("shown")
    save_all(root / "training", range(30))
    save_all(root / "real", range(100, 140))
    save_all(root / "generated", range(200, 210))
    for seed in range(8):
        altered(picture(seed)).save(root / "generated" / f"copy<{seed}>.png")
    return root


@pytest.fixture(scope="module")
def result(sets):
    return audit(
        sets / "generated",
        sets / "training",
        held_out=sets / "real",
        fpr=0.05,
        detector=SmallCorrelation(),
    )


def test_an_audit_prints_its_sentence(result):
    assert result.statement[:80] in repr(result) and len(repr(result)) <= MAX_REPR


def test_an_audit_is_a_table_of_matches(result):
    table = result.to_pandas()
    assert len(table) == len(result.matches) == 18 * 5
    best = table[table["rank"] == 1]
    assert best["flagged"].sum() == result.num_flagged >= 8
    assert best["score"].tolist() == [match.score for match in result.matches[::5]]
    assert {"query", "match", "match_id", "p_value", "tier", "edit"} <= set(table.columns)


def test_a_notebook_shows_sentence_plot_and_pairs(result):
    shown = result._repr_html_()
    assert "copy&lt;0&gt;.png" in shown and "copy<0>" not in shown and "<script" not in shown
    assert shown.count("<img ") == 12 and shown.count("data:image/") == 12
    assert f"{result.num_flagged - 6} more are flagged" in shown
    assert shown.count("<svg ") == 1 and len(re.findall(r"<path d=\"M", shown)) == 2
    gone = dataclasses.replace(
        result, generated=dataclasses.replace(result.generated, folder="/nowhere")
    )
    assert gone._repr_html_().count("<img ") == 6


def test_pairs_and_queries_are_tables(sets, tmp_path):
    detector = load_detector("ncc", input_size=16)
    files = sorted((sets / "training").iterdir())
    pairs = score_pairs(detector, [(files[0], files[1]), (files[2], files[2])], verify=False)
    assert pairs.to_pandas()["identical"].tolist() == [False, True]
    add_to_index(sets / "training", tmp_path / "index", detector)
    found = query_index(tmp_path / "index", sets / "generated", detector, top_k=2, verify=False)
    table = found.to_pandas()
    assert len(table) == 2 * 18 and table["rank"].tolist() == [1, 2] * 18
    for shown in (repr(pairs), repr(found)):
        assert len(shown) <= MAX_REPR and "\n" not in shown
    added = add_to_index(sets / "training", tmp_path / "index", detector)
    assert added.to_pandas()["num_known"].tolist() == [30]
    assert "num_known=30" in repr(added)


def test_verdicts_print_short_and_are_tables(sets):
    guard = Guard.fit(sets / "training", sets / "real", fpr=0.05, detector=SmallCorrelation())
    (verdict,) = guard.check(altered(picture(3)))
    assert repr(verdict).startswith("Verdict(query='0', ") and len(repr(verdict)) <= MAX_REPR
    assert verdict.to_pandas()["match"].tolist() == ["00003.png"]


def test_every_result_prints_short():
    for module in pkgutil.walk_packages(lcmem_cli.__path__, "lcmem_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    classes = Result.__subclasses__()
    assert len(classes) > 15
    for made in classes:
        fields = [field.name for field in dataclasses.fields(made)]
        empty = object.__new__(made)
        for name in fields:
            object.__setattr__(empty, name, "x" * 10_000 if name[0] < "m" else range(10**6))
        assert len(repr(empty)) <= MAX_REPR, made


def test_the_package_lists_its_public_names_and_no_others():
    assert dir(lcmem_cli) == sorted(lcmem_cli.__all__)
    assert Index is lcmem_cli.Index

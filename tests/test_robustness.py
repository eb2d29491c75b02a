import csv
import itertools
import json

import numpy as np
import pytest
import torch

from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.manifest import load_manifest, write_manifest
from lcmem_cli.engine.data.perturb import EXTENDED_SUITE, REFERENCE_SUITE, Setting, perturb
from lcmem_cli.engine.detectors import embedding
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.evaluation.study import files
from lcmem_cli.engine.evaluation.study import robustness as module
from lcmem_cli.engine.evaluation.study.results import Outcome
from lcmem_cli.engine.evaluation.study.robustness import robustness
from lcmem_cli.engine.reporter import Reporter

FILES = ("robustness_results.json", "robustness_results.csv", "thresholds.json")
PICTURES = tuple(
    f"robustness_{name}.{suffix}"
    for name in ("recall", "fpr", "transforms")
    for suffix in ("png", "pdf")
)
FEW = (Setting("Noise", 0.1), Setting("Noise", 0.3), Setting("Rotation", 20.0))


class Listener(Reporter):
    def __init__(self):
        self.events = []

    def event(self, name, **fields):
        self.events.append(fields)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Few settings, and plots as their data, except where all of them are looked at."""
    if "all_settings" in request.node.name:
        return

    def draw(*data, **more):
        for suffix in (".png", ".pdf"):
            data[-1].with_name(data[-1].name + suffix).write_text(repr((data[:-1], more)))

    monkeypatch.setattr(module, "SUITES", {"reference": FEW[:2], "extended": FEW})
    monkeypatch.setattr(files, "plot_strengths", draw)
    monkeypatch.setattr(files, "plot_transforms", lambda *data: draw(data[-1]))


@pytest.fixture
def filelist(image_folder, tmp_path):
    """Four identities in TEST and eight in VAL, three images each."""
    manifest = load_manifest(image_folder)
    splits = dict(zip(range(24), ["TEST"] * 4 + ["VAL"] * 8 + ["TRAIN"] * 12, strict=True))
    records = tuple(r._replace(split=splits[int(r.id[2:])]) for r in manifest.records)
    path = tmp_path / "filelist.csv"
    write_manifest(type(manifest)(records, image_folder, path), path)
    return path


def run(filelist, output, **options):
    options = {"detectors": ["mse"], "input_size": 24, "workers": 0, "fit_rate": 0.1, **options}
    return robustness(filelist, output=output, basedir=filelist.parent / "images", **options)


def rows_of(folder):
    with (folder / "robustness_results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read(folder, names=FILES + PICTURES):
    return {name: (folder / name).read_bytes() for name in names}


def test_rows_equal_editing_and_scoring_each_pair_by_itself(filelist, image_folder, tmp_path):
    result = run(filelist, tmp_path / "out", suite="extended", detectors=["mse", "ncc"])
    records = load_manifest(filelist, basedir=image_folder).select("TEST").records
    images = [to_tensor(load_image(image_folder / r.path), 24) for r in records]
    positives = [
        (i, j)
        for i, j in itertools.combinations(range(len(records)), 2)
        if records[i].id == records[j].id
    ]
    assert result.num_pairs == 2 * len(positives) == 24
    table = rows_of(tmp_path / "out")
    assert len(table) == 2 * len(FEW)
    names = "Detector Transform Strength Recall Precision Accuracy F1 FPR TP FP TN FN Threshold Fit"
    assert list(table[0]) == names.split()
    for row in table:
        detector = load_detector(row["Detector"], input_size=24)
        plain = detector.embed_batch(torch.stack(images))
        edited = [perturb(x, row["Transform"], float(row["Strength"]), seed=42) for x in images]
        changed = detector.embed_batch(torch.stack(edited))
        scores = detector.score_features(
            plain[[i for i, _ in positives]], changed[[j for _, j in positives]]
        )
        hits = int((scores >= float(row["Threshold"])).sum())
        assert int(row["TP"]) == hits and int(row["FN"]) == len(positives) - hits
        assert float(row["Recall"]) == hits / len(positives)
        tp, fp, tn, fn = (int(row[key]) for key in ("TP", "FP", "TN", "FN"))
        assert fp + tn == len(positives)
        assert float(row["FPR"]) == fp / (fp + tn)
        assert float(row["Accuracy"]) == (tp + tn) / (tp + fp + tn + fn)
        if tp + fp:
            assert float(row["Precision"]) == tp / (tp + fp)
        else:
            assert row["Precision"] == ""
        assert float(row["F1"]) == 2 * tp / (2 * tp + fp + fn)


def test_both_rules_are_reported_for_every_detector(filelist, tmp_path):
    result = run(filelist, tmp_path / "out", detectors=["mse", "phash"])
    for item in result.detectors:
        assert set(item.thresholds) == set(item.unedited) == {"fpr", "recall"}
        assert item.thresholds["fpr"].rate == 0.1 and item.thresholds["recall"].rate == 0.95
        assert item.thresholds["fpr"].achieved_fpr <= 0.1
        assert item.thresholds["recall"].achieved_recall >= 0.95
        assert item.thresholds["fpr"].fitted_on.startswith("VAL: 24 positive and 24 negative")
        assert all(set(at.outcomes) == {"fpr", "recall"} for at in item.settings)
    recall = run(filelist, tmp_path / "recall", fit="recall", fit_rate=0.5)
    assert {row["Fit"] for row in rows_of(tmp_path / "recall")} == {"recall0.5"}
    assert recall.detectors[0].reasons["fpr"].endswith("needs 100")
    written = json.loads((tmp_path / "out" / "thresholds.json").read_text())
    assert [t["kind"] for t in written["phash"]] == ["fpr", "recall"]
    assert written["mse"][0]["fingerprint"] == result.detectors[0].fingerprint


def test_an_unedited_copy_is_always_found_and_negatives_stay_apart(filelist, tmp_path):
    result = run(filelist, tmp_path / "out", same_image=True)
    assert result.num_pairs == 2 * 12
    found = result.detectors[0]
    assert found.unedited["fpr"].recall == 1.0
    assert "identical images" in found.reasons["recall"]
    assert found.settings[0].outcomes["fpr"].true_positives <= 12


def test_rates_have_intervals_over_identities(filelist, tmp_path):
    result = run(filelist, tmp_path / "out", suite="extended")
    for at in result.detectors[0].settings:
        out = at.outcomes["fpr"]
        for value, ends in ((out.recall, out.recall_interval), (out.fpr, out.fpr_interval)):
            assert ends[0] <= value <= ends[1]
    alone = run(filelist, tmp_path / "alone", only_positives=True)
    assert alone.detectors[0].unedited["fpr"].fpr_interval is None


def test_only_positives_leaves_what_needs_negatives_empty(filelist, tmp_path):
    result = run(filelist, tmp_path / "out", only_positives=True)
    assert result.num_pairs == 12
    for row in rows_of(tmp_path / "out"):
        assert row["Recall"] and row["TP"]
        assert [row[key] for key in ("Precision", "Accuracy", "F1", "FPR")] == [""] * 4
    assert not (tmp_path / "out" / "robustness_fpr.png").exists()


def test_rates_follow_from_counts():
    def outcome(*counts):  # true and false positives, true and false negatives
        called, positive = np.repeat([[1, 1, 0, 0], [1, 0, 0, 1]], counts, axis=1) == 1
        return Outcome.of(called, positive)

    found = outcome(3, 1, 5, 2)
    assert (found.recall, found.precision, found.accuracy) == (3 / 5, 3 / 4, 8 / 11)
    assert (found.f1, found.fpr) == (6 / 9, 1 / 6)
    counts = (found.true_positives, found.false_positives, found.true_negatives)
    assert (*counts, found.false_negatives) == (3, 1, 5, 2)
    nothing = outcome(0, 0, 4, 2)
    assert (nothing.recall, nothing.precision, nothing.f1, nothing.fpr) == (0, None, 0, 0)
    positives = outcome(3, 0, 0, 1)
    assert (positives.recall, positives.fpr) == (3 / 4, None)
    assert (positives.precision, positives.accuracy, positives.f1) == (None, None, None)


def test_results_do_not_depend_on_batch_size_workers_or_detector_order(filelist, tmp_path):
    a = run(filelist, tmp_path / "a", detectors=["mse", "ncc"], batch_size=1, cache=False)
    b = run(
        filelist, tmp_path / "b", detectors=["ncc", "mse"], batch_size=32, workers=2, cache=False
    )
    assert a.detectors == b.detectors[::-1]


def test_each_image_is_embedded_once_and_each_edit_once(filelist, tmp_path):
    def events(output, **options):
        listener = Listener()
        run(filelist, output, detectors=["phash"], reporter=listener, **options)
        return {event["setting"]: event["encoder_passes"] for event in listener.events}

    # 12 images of TEST and 24 of VAL; the second image of a pair is the one that is edited.
    first = events(tmp_path / "a", same_image=True)
    assert first == {"unedited": 36, "Noise 0.1": 12, "Noise 0.3": 12}
    assert events(tmp_path / "a", same_image=True) == {}
    assert events(tmp_path / "b", same_image=True) == dict.fromkeys(first, 0)
    # More settings in the same folder: only those are new.
    more = events(tmp_path / "a", same_image=True, suite="extended")
    assert more == {"unedited": 0, "Rotation 20.0": 12}


def test_detectors_share_what_is_decoded_and_edited(filelist, tmp_path, monkeypatch):
    names = ["mse", "ncc", "phash", "random"]
    decoded = []
    original = embedding.iter_images

    def counting(files, *arguments, **options):
        decoded.extend(files)
        return original(files, *arguments, **options)

    monkeypatch.setattr(embedding, "iter_images", counting)
    monkeypatch.setattr(embedding, "_PICTURE_BYTES", 5 * 12 * 24**2)  # in parts of five
    options = {"same_image": True, "cache": False, "batch_size": 2}
    together = run(filelist, tmp_path / "together", detectors=names, **options)
    assert len(decoded) == 36 + 2 * 12  # the unedited ones, and two edits of those of TEST
    alone = [
        run(filelist, tmp_path / name, detectors=[name], **options).detectors[0] for name in names
    ]
    assert together.detectors == tuple(alone)
    assert len(decoded) == 5 * (36 + 2 * 12)
    # More than are held at once: the next group decodes anew, with the same result.
    decoded.clear()
    monkeypatch.setattr(module.Robustness, "together", 3)
    assert run(filelist, tmp_path / "groups", detectors=names, **options) == together
    assert len(decoded) == 2 * (36 + 2 * 12)


def test_shared_pictures_that_cannot_be_read_are_named_for_all(filelist, tmp_path):
    (filelist.parent / "images" / "id00" / "1.png").write_bytes(b"no image")
    result = run(filelist, tmp_path / "out", detectors=["mse", "ncc"], cache=False, batch_size=1)
    assert [item.path for item in result.unreadable] == ["id00/1.png"]
    one = run(filelist, tmp_path / "one", detectors=["ncc"], cache=False)
    assert one.detectors[0] == result.detectors[1]


def test_a_small_set_gets_the_rate_that_it_can_tell_and_says_so(filelist, tmp_path, run_cli):
    result = run(filelist, tmp_path / "out", fit_rate=None)
    assert result.fit_rate == 0.042  # 24 different negative pairs of VAL
    assert result.notes == (
        "VAL has 24 different negative pairs; a threshold for a false-positive rate of 0.01 needs "
        "100, so that the thresholds hold 0.042, the smallest rate that they can",
    )
    common = ["robustness", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    common += ["--detectors", "mse", "--input-size", 24, "-o", tmp_path / "x"]
    assert "so that the thresholds hold 0.042" in run_cli(*common).stdout.replace("\n", " ")
    refused = run_cli(*common, "--fit-rate", 0.01, exit_code=2).stderr
    assert "or --fit-rate 0.042 at least" in refused.replace("\n", " ")
    assert run(filelist, tmp_path / "as asked").notes == ()


def test_another_run_adds_its_detectors(filelist, tmp_path):
    run(filelist, tmp_path / "out", detectors=["mse"])
    result = run(filelist, tmp_path / "out", detectors=["ncc?label=Correlation"])
    assert [item.name for item in result.detectors] == ["Correlation", "mse"]
    assert {row["Detector"] for row in rows_of(tmp_path / "out")} == {"Correlation", "mse"}
    # The new setting of the larger suite was not measured for the first one.
    more = run(filelist, tmp_path / "out", detectors=["phash"], suite="extended")
    assert [item.name for item in more.detectors] == ["phash"]


def test_reruns_never_mix(filelist, tmp_path, run_cli):
    out = tmp_path / "out"
    common = ["robustness", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    common += ["-o", out, "--detectors", "mse", "--fit-rate", 0.1, "--input-size"]
    run_cli(*common, 24)
    before = read(out)
    for more, words in (
        ([24, "--seed", 1], "seed: 42 there, 1 now"),
        ([32], "input size: 24 there, 32 now"),
        ([24, "--same-image"], "same image: False there, True now"),
    ):
        assert words in run_cli(*common, *more, exit_code=2).stderr
        assert read(out) == before
    run_cli(*common, 24, "--seed", 1, "--overwrite")
    assert read(out) != before
    run_cli(*common, 24, "--overwrite")
    assert read(out) == before


def test_unreadable_images_are_named_and_their_pairs_dropped(filelist, tmp_path, run_cli):
    (filelist.parent / "images" / "id00" / "1.png").write_bytes(b"no image")
    result = run(filelist, tmp_path / "out")
    assert [item.path for item in result.unreadable] == ["id00/1.png"]
    assert result.num_pairs - result.num_dropped == sum(
        dict(result.to_dict()["detectors"]["mse"]["settings"][0]["fpr"])[key]
        for key in ("true_positives", "false_positives", "true_negatives", "false_negatives")
    )
    assert result.num_dropped >= 2


def test_printed_json_equals_the_file_and_the_table_names_both_rates(filelist, tmp_path, run_cli):
    common = ["robustness", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    common += ["-o", tmp_path / "out", "--detectors", "mse,ncc", "--fit-rate", 0.1]
    common += ["--input-size", 16]
    printed = json.loads(run_cli(*common, "--json").stdout)
    text = (tmp_path / "out" / "robustness_results.json").read_text()
    assert printed == json.loads(text) and "NaN" not in text
    shown = run_cli(*common).stdout
    assert "Recall / false-positive rate" in shown and "mean of all settings" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--same-image", "--fit", "recall"], "identical images"),
        (["--fit-rate", "0"], "(0, 1)"),
        (["--fit-rate", "0.001"], "needs 1000"),
        (["--split", "VAL"], "--fit-split"),
        (["--round-trip", "somewhere"], "--suite extended"),
        (["--round-trip", "embedded", "--suite", "extended"], "no decoder"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(filelist, tmp_path, run_cli, arguments, words):
    common = ["robustness", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    common += ["--detectors", "mse", "--input-size", 16, "-o", tmp_path / "out"]
    assert words in run_cli(*common, *arguments, exit_code=2).stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_round_trip_through_an_autoencoder_is_one_more_setting(filelist, tiny_codec, tmp_path):
    result = run(filelist, tmp_path / "out", suite="extended", round_trip=str(tiny_codec))
    last = result.detectors[0].settings[-1]
    assert last.transform == "VAERoundTrip" and len(result.detectors[0].settings) == 4


def test_all_settings_of_the_reference_are_in_the_table(filelist, tmp_path, run_cli, no_drawing):
    run_cli(
        "robustness", "--filelist", filelist, "--basedir", filelist.parent / "images",
        "--detectors", "mse,phash", "--input-size", 16, "--workers", 0, "--fit-rate", 0.1,
        "-o", tmp_path / "out",
    )  # fmt: skip
    table = rows_of(tmp_path / "out")
    found = [(row["Transform"], float(row["Strength"])) for row in table[:24]]
    assert found == [(s.transform, s.strength) for s in REFERENCE_SUITE] and len(table) == 48
    assert set(REFERENCE_SUITE) < set(EXTENDED_SUITE)
    assert all((tmp_path / "out" / name).exists() for name in PICTURES)

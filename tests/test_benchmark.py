import csv
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import draw_nothing
from conftest import Listener
from rich.console import Console
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from lcmem_cli.cli import render
from lcmem_cli.cli.app import app
from lcmem_cli.engine.data.manifest import load_manifest, write_manifest
from lcmem_cli.engine.data.pairs import reference_pairs
from lcmem_cli.engine.data.reading import content_hash
from lcmem_cli.engine.detectors import adapted
from lcmem_cli.engine.detectors.lcmem import LCMemDetector
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import InputError, UnreadableLimitError
from lcmem_cli.engine.evaluation.metrics import METRIC_KEYS, pair_metrics
from lcmem_cli.engine.evaluation.study import benchmark as module
from lcmem_cli.engine.evaluation.study import detectors as study
from lcmem_cli.engine.evaluation.study import files
from lcmem_cli.engine.evaluation.study.benchmark import benchmark
from lcmem_cli.engine.store.latents import LatentStore

FILES = ("benchmark_results.json", "benchmark_results.csv", "scores.csv", "thresholds.json")
PICTURES = ("roc.png", "roc.pdf", "bars.png", "bars.pdf")


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Write the data of a plot instead of drawing it, except where pictures are looked at."""
    if "pictures" in request.node.name:
        return

    def draw(data, target):
        for suffix in (".png", ".pdf"):
            target.with_name(target.name + suffix).write_text(repr(data))

    monkeypatch.setattr(files, "plot_roc", draw)
    monkeypatch.setattr(files, "plot_bars", draw)


@pytest.fixture
def filelist(image_folder, tmp_path):
    """The images as two data sets, each with three identities in TEST and two in VAL."""
    manifest = load_manifest(image_folder)
    records = []
    for record in manifest.records:
        number = int(record.id[2:])
        split = "TEST" if number % 12 < 3 else "VAL" if number % 12 < 5 else "TRAIN"
        records.append(record._replace(split=split, ds_name="one" if number < 12 else "two"))
    path = tmp_path / "filelist.csv"
    write_manifest(type(manifest)(tuple(records), image_folder, path), path)
    return path


def run(filelist, output, **options):
    options = {"detectors": ["mse", "phash"], "input_size": 32, "workers": 0, **options}
    return benchmark(filelist, output=output, basedir=filelist.parent / "images", **options)


def read(folder):
    return {name: (folder / name).read_bytes() for name in (*FILES, *PICTURES)}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_scores_and_metrics_equal_scoring_each_pair_by_itself(filelist, image_folder, tmp_path):
    result = run(filelist, tmp_path / "out")
    records = load_manifest(filelist, basedir=image_folder).select("TEST").records
    pairs = reference_pairs(records)
    scores = rows_of(tmp_path / "out" / "scores.csv")
    assert list(scores[0]) == ["path_a", "path_b", "label", "ds_name", "mse", "phash"]
    assert len(scores) == len(pairs) == result.num_pairs
    for row, a, b, label in zip(scores, pairs.first, pairs.second, pairs.labels, strict=True):
        assert (row["path_a"], row["path_b"]) == (records[a].path, records[b].path)
        assert (int(row["label"]), row["ds_name"]) == (label, records[a].ds_name)
    written = json.loads((tmp_path / "out" / "benchmark_results.json").read_text())
    table = {(r["detector"], r["ds_name"]): r for r in rows_of(tmp_path / "out" / FILES[1])}
    assert list(table) == [(d, s) for d in ("mse", "phash") for s in ("overall", "one", "two")]
    for name in ("mse", "phash"):
        detector = load_detector(name, input_size=32)
        for row in scores[::3]:
            alone = detector.score(image_folder / row["path_a"], image_folder / row["path_b"])
            assert alone == float(row[name])
        parts = {"overall": written["detectors"][name]["overall"]}
        parts |= written["detectors"][name]["per_dataset"]
        for ds_name, part in parts.items():
            chosen = [r for r in scores if ds_name in ("overall", r["ds_name"])]
            values = [float(r[name]) for r in chosen]
            labels = [int(r["label"]) for r in chosen]
            expected = pair_metrics(values, labels)
            assert {key: part[key] for key in METRIC_KEYS} == expected
            assert part["auc"] == pytest.approx(roc_auc_score(labels, values))
            row = table[name, ds_name]
            assert {key: float(row[key]) for key in METRIC_KEYS} == expected
            low, high = part["intervals"]["auc"]
            assert low <= part["auc"] <= high
            assert part["num_positives"] + part["num_negatives"] == len(chosen)


def test_thresholds_come_from_val_and_few_negatives_are_stated(filelist, tmp_path):
    result = run(filelist, tmp_path / "out", detectors=["mse"])
    at = {item.rate: item for item in result.detectors[0].overall.at_fpr}
    assert at[0.001].threshold is None and "needs 1000" in at[0.001].reason
    fitted = json.loads((tmp_path / "out" / "thresholds.json").read_text())["mse"]
    assert {t["kind"] for t in fitted} == {"recall"}
    assert fitted[0]["fingerprint"] == result.detectors[0].fingerprint
    assert fitted[0]["fitted_on"].startswith("VAL: 12 positive and 120 negative pairs")
    assert "picked on the scores" in result.notes[0] and "fitted on VAL" in result.notes[1]
    every = run(filelist, tmp_path / "all", detectors=["mse"], pairs="all", ds_names=["one"])
    assert every.num_pairs == 9 * 8 // 2 and every.num_duplicates == 0


def test_without_a_split_to_fit_on_only_the_judged_images_are_embedded(filelist, tmp_path):
    listener = Listener()
    result = run(filelist, tmp_path / "out", detectors=["mse"], fit_split=None, reporter=listener)
    assert listener.events[0][1]["images"] == 18 and not listener.warnings
    assert result.detectors[0].thresholds == () and result.num_fit_pairs == 0
    assert {at.reason for at in result.detectors[0].overall.at_fpr} == {
        "no split to fit thresholds on was asked for"
    }


def test_rates_at_a_fitted_threshold_are_those_of_the_scores(filelist, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FPR_RATES", (0.2,))
    result = run(filelist, tmp_path / "out", detectors=["mse"])
    at = result.detectors[0].overall.at_fpr[0]
    scores = rows_of(tmp_path / "out" / "scores.csv")
    called = [(float(r["mse"]) >= at.threshold, r["label"] == "1") for r in scores]
    assert at.tpr == sum(c and y for c, y in called) / sum(y for _, y in called)
    assert at.fpr == sum(c and not y for c, y in called) / sum(not y for _, y in called)
    assert at.tpr_interval[0] <= at.tpr <= at.tpr_interval[1]
    row = rows_of(tmp_path / "out" / "benchmark_results.csv")[0]
    assert float(row["tpr_at_fpr0.2"]) == at.tpr


def test_results_do_not_depend_on_batch_size_or_workers(filelist, tmp_path):
    names = ["mse", "ncc", "phash", "random"]
    outcomes = []
    for batch_size, workers in ((1, 0), (7, 2), (32, 0)):
        out = tmp_path / f"{batch_size}"
        how = {"batch_size": batch_size, "workers": workers, "cache": False, "ds_names": ["one"]}
        run(filelist, out, detectors=names, **how)
        outcomes.append(rows_of(out / "scores.csv"))
    for name in names:
        first, *others = ([float(r[name]) for r in rows] for rows in outcomes)
        for other in others:
            if name == "random":  # a network's sums may be grouped by batch
                np.testing.assert_allclose(other, first, atol=1e-6)
            else:
                assert other == first


def test_all_pairs_do_not_depend_on_the_order_of_rows(filelist, tmp_path):
    lines = filelist.read_text().splitlines()
    order = np.random.default_rng(0).permutation(len(lines) - 1) + 1
    shuffled = filelist.with_name("shuffled.csv")
    shuffled.write_text("\n".join([lines[0], *(lines[i] for i in order)]) + "\n")
    straight, mixed = (
        run(path, tmp_path / path.stem, pairs="all", detectors=["mse", "phash"])
        for path in (filelist, shuffled)
    )
    for a, b in zip(straight.detectors, mixed.detectors, strict=True):
        assert a.overall.metrics == b.overall.metrics
        assert {n: s.metrics for n, s in a.per_dataset.items()} == {
            n: s.metrics for n, s in b.per_dataset.items()
        }


def test_each_distinct_image_is_embedded_once_and_a_second_run_embeds_none(filelist, tmp_path):
    def passes(output):
        listener = Listener()
        run(filelist, output, detectors=["phash"], reporter=listener)
        return next(f for name, f in listener.events if name == "embedded")

    manifest = load_manifest(filelist, basedir=filelist.parent / "images")
    judged = {r.path for r in manifest.records if r.split in ("VAL", "TEST")}
    first, second = passes(tmp_path / "a"), passes(tmp_path / "b")
    assert first["encoder_passes"] == first["distinct"] == len(judged)
    assert second["encoder_passes"] == 0 and second["distinct"] == len(judged)
    assert read(tmp_path / "a") == read(tmp_path / "b")


def test_reruns_never_mix(filelist, tmp_path, run_cli):
    out = tmp_path / "out"
    common = ["benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    common += ["-o", out, "--input-size", 32]
    run_cli(*common, "--detectors", "mse")
    before = read(out)
    run_cli(*common, "--detectors", "mse")
    assert read(out) == before
    refused = run_cli(*common, "--detectors", "mse", "--seed", 1, exit_code=2)
    assert "seed: 42 there, 1 now" in refused.stderr and read(out) == before
    size = [*common[:-1], 16, "--detectors", "mse"]
    assert "detector mse" in run_cli(*size, exit_code=2).stderr and read(out) == before
    image = filelist.parent / "images" / rows_of(out / "scores.csv")[0]["path_a"]
    other = filelist.parent / "images" / rows_of(out / "scores.csv")[1]["path_b"]
    shutil.copyfile(other, image)
    refused = run_cli(*common, "--detectors", "mse", exit_code=2)
    assert "images: other content" in refused.stderr and read(out) == before
    run_cli(*common, "--detectors", "mse", "--overwrite")
    fresh = tmp_path / "fresh"
    run_cli(*common[:-3], fresh, *common[-2:], "--detectors", "mse")
    assert read(out) == read(fresh) != before
    run_cli(*common, "--detectors", "phash,mse")
    assert list(json.loads((out / FILES[0]).read_text())["detectors"]) == ["phash", "mse"]


def test_a_folder_of_something_else_is_left_alone(filelist, tmp_path, run_cli):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    arguments = ["benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    refused = run_cli(
        *arguments, "-o", out, "--detectors", "mse", "--input-size", 16, "--overwrite", exit_code=2
    )
    assert "thesis.tex" in refused.stderr
    assert (out / "thesis.tex").read_text() == "precious"


def test_unreadable_images_are_named_and_their_pairs_dropped(filelist, tmp_path, run_cli):
    whole = run(filelist, tmp_path / "whole")
    path = rows_of(tmp_path / "whole" / "scores.csv")[4]["path_a"]
    (filelist.parent / "images" / path).write_bytes(b"no image")
    result = run(filelist, tmp_path / "out")
    assert [item.path for item in result.unreadable] == [path] and result.unreadable[0].reason
    with_path = [
        row
        for row in rows_of(tmp_path / "whole" / "scores.csv")
        if path in (row["path_a"], row["path_b"])
    ]
    assert result.num_dropped == len(with_path) > 0
    kept = rows_of(tmp_path / "out" / "scores.csv")
    assert len(kept) == whole.num_pairs - len(with_path)
    assert not any(path in (row["path_a"], row["path_b"]) for row in kept)
    arguments = ["benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    arguments += ["--detectors", "mse", "--input-size", 16, "-o", tmp_path / "limit"]
    refused = run_cli(*arguments, "--max-unreadable", 0, exit_code=1)
    assert path in refused.stderr and "allows 0" in refused.stderr
    shown = run_cli(*arguments).stdout
    assert path in shown and "1 of" in shown


def test_json_is_valid_and_tables_and_pictures_are_there(filelist, tmp_path, run_cli):
    out = run_cli(
        "benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images",
        "--detectors", "mse", "--input-size", 16, "-o", tmp_path / "out", "--json",
    )  # fmt: skip

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    printed = json.loads(out.stdout, parse_constant=refuse)
    text = (tmp_path / "out" / "benchmark_results.json").read_text()
    assert printed == json.loads(text, parse_constant=refuse)
    assert printed["schema"] == 1 and printed["split"] == "TEST"
    for name in ("config.toml", "environment.json", *PICTURES):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert 'pairs = "reference"' in (tmp_path / "out" / "config.toml").read_text()


def test_a_set_of_one_class_has_counts_and_an_explanation(filelist, tmp_path):
    rows = filelist.read_text().splitlines()
    # In data set two, keep one image of each TEST identity: no positive pair is left there.
    seen, kept = set(), [rows[0]]
    for row in rows[1:]:
        _, name, split, ds = row.split(",")
        if ds == "two" and split == "TEST" and name in seen:
            continue
        seen.add(name)
        kept.append(row)
    filelist.write_text("\n".join(kept) + "\n")
    result = run(filelist, tmp_path / "out", pairs="all")
    part = result.detectors[0].per_dataset["two"]
    assert part.metrics is None and "need positive pairs" in part.problem
    assert part.num_positives == 0 and part.num_negatives == 3
    assert result.detectors[0].overall.metrics is not None


def test_a_detector_without_weights_is_skipped_unless_strict(filelist, tmp_path, run_cli):
    arguments = ["benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    arguments += ["--input-size", 16, "--detectors"]
    name = "timm:resnet18"
    out = run_cli(*arguments, f"{name},mse", "-o", tmp_path / "a")
    assert f"Left out: {name}" in out.stdout and f"'{name}' is left out" in out.stderr
    written = json.loads((tmp_path / "a" / FILES[0]).read_text())
    assert [item["name"] for item in written["skipped"]] == [name]
    run_cli(*arguments, f"{name},mse", "--strict", "-o", tmp_path / "b", exit_code=1)
    none = run_cli(*arguments, name, "-o", tmp_path / "c", exit_code=1)
    assert "none of the detectors" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--detectors", "msee"], "did you mean 'mse'"),
        (["--detectors", "mse,mse"], "named twice"),
        (["--detectors", ","], "no detector"),
        (["--target-recall", "0"], "(0, 1]"),
        (["--split", "VAL"], "--fit-split"),
        (["--split", "TSET"], "did you mean 'TEST'"),
        (["--ds-name", "thre"], "no data set 'thre'"),
        (["--latents", "nowhere"], "no latent store"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(filelist, tmp_path, run_cli, arguments, words):
    common = ["benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    if "--detectors" not in arguments:
        common += ["--detectors", "mse"]
    out = run_cli(*common, *arguments, "-o", tmp_path / "out", exit_code=2)
    assert words in out.stderr.replace("\n", " ")
    assert not (tmp_path / "out" / "benchmark_results.json").exists()


def test_a_set_with_one_identity_is_refused_on_test_and_left_out_of_val(filelist, tmp_path):
    rows = filelist.read_text().splitlines()
    val = [row for row in rows if ",VAL,two" in row]
    one = val[0].split(",")[1]
    kept = [row for row in rows if ",VAL,two" not in row or row.split(",")[1] == one]
    filelist.write_text("\n".join(kept) + "\n")
    listener = Listener()
    result = run(filelist, tmp_path / "out", reporter=listener)
    assert "of 1 data set(s)" in result.detectors[0].thresholds[0].fitted_on
    assert any("'two'" in warning for warning in listener.warnings)


def test_a_damaged_stage_is_made_again(filelist, tmp_path):
    run(filelist, tmp_path / "out")
    before = read(tmp_path / "out")
    for stage in (tmp_path / "out" / "stages").iterdir():
        stage.write_bytes(stage.read_bytes()[:-9])
    run(filelist, tmp_path / "out")
    assert read(tmp_path / "out") == before


@pytest.fixture(scope="module")
def trained(drawn_images, tiny_codec, tmp_path_factory) -> Path:
    """A network of one epoch in ``stage1``, and the latents that it was trained on in ``store``."""
    folder = tmp_path_factory.mktemp("trained")
    encode = (
        "latents", "--filelist", drawn_images, "--codec", tiny_codec, "--size", 32,
        "-o", folder / "store",
    )  # fmt: skip
    train = (
        "train-stage1", "--latents", folder / "store", "-o", folder / "stage1",
        "--set=schedule.epochs=1", "--set=image.size=32", "--set=network.backbone=test_resnet",
        "--set=network.num_features=16", "--set=schedule.batch_size=8", "--set=runtime.device=cpu",
        "--set=network.feature_rms=1.5", f"--set=codec.name={tiny_codec}",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", draw_nothing)
        for command in (encode, train):
            done = CliRunner().invoke(app, [str(part) for part in command])
            assert done.exit_code == 0, done.output
    return folder


def test_stored_latents_give_the_scores_of_the_images(
    trained, image_folder, tiny_codec, tmp_path, run_cli, monkeypatch
):
    monkeypatch.setattr(adapted, "ONE_PICTURE", 1.01)  # to few weights all are much alike
    name = f"lcmem:{trained / 'stage1' / 'checkpoint.safetensors'}"
    common = {"detectors": [name], "workers": 0, "cache": False, "adapt": True}
    write_manifest(load_manifest(image_folder), image_folder / "list.csv")
    stored = {"latents": trained / "store", **common}
    results = [benchmark(image_folder, output=tmp_path / "images-out", **common)]
    results.append(benchmark(image_folder, output=tmp_path / "out", **stored))
    run_cli(
        "latents", "--filelist", image_folder, "--codec", tiny_codec, "--size", 48,
        "-o", tmp_path / "large",
    )  # fmt: skip
    refused = run_cli(
        "benchmark", "--filelist", image_folder, "--detectors", name,
        "--latents", tmp_path / "large", "-o", tmp_path / "refused", exit_code=2,
    )  # fmt: skip
    assert "48 pixels" in refused.stderr and "takes 32" in refused.stderr
    changed = image_folder / load_manifest(image_folder).select("TEST").records[0].path
    kept = changed.read_bytes()
    changed.write_bytes(kept + b"-")
    with pytest.raises(InputError, match=r"1 image.* have changed since their latents"):
        benchmark(image_folder, output=tmp_path / "changed", **stored)
    changed.write_bytes(kept)
    for path in image_folder.rglob("*.png"):  # latents are enough
        path.unlink()
    results.append(benchmark(image_folder / "list.csv", output=tmp_path / "gone", **stored))
    first, *others = (
        [[float(row[key]) for key in (name, f"{name} (adapted)")] for row in rows_of(path)]
        for path in (tmp_path / f / "scores.csv" for f in ("images-out", "out", "gone"))
    )
    np.testing.assert_allclose(others, [first, first], atol=1e-6)
    counts = [list(result.detectors[1].adapted_to.values()) for result in results]
    assert counts == [counts[0]] * 3 and counts[0][0] > 10
    difference = np.abs(np.subtract(*np.transpose(first)))
    assert difference.max() > 0.01


def test_a_stored_latent_without_finite_features_is_named(
    trained, image_folder, tmp_path, monkeypatch
):
    store = LatentStore.open(trained / "store")
    tests = [row for row, record in enumerate(store.records) if record.split == "TEST"]
    broken, read_latents = tests[1], LatentStore.latents

    def latents(self, rows):
        found = read_latents(self, rows)
        found[[row == broken for row in rows]] = float("nan")
        return found

    monkeypatch.setattr(LatentStore, "latents", latents)
    name = f"lcmem:{trained / 'stage1' / 'checkpoint.safetensors'}"
    common = {"detectors": [name], "workers": 0, "cache": False, "latents": trained / "store"}
    run_it = functools.partial(benchmark, image_folder, **common)
    with pytest.raises(UnreadableLimitError, match=store.records[broken].path):
        run_it(output=tmp_path / "refused", max_unreadable=0)
    result = run_it(output=tmp_path / "out", max_unreadable=1)
    assert [bad.path for bad in result.unreadable] == [store.records[broken].path]
    assert "not finite" in result.unreadable[0].reason


def test_each_data_set_is_also_scored_adapted_to_its_train_images(
    filelist, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapted, "ONE_PICTURE", 1.01)  # drawn scenes are much alike
    lines = filelist.read_text().splitlines()
    few = [line for line in lines if not line.endswith("TRAIN,two")]
    few += [line for line in lines if line.endswith("TRAIN,two")][:9]
    filelist.write_text("\n".join(few))
    one = load_manifest(filelist, basedir=image_folder).select("TRAIN", ["one"])
    write_manifest(one, image_folder / "one.csv")
    by_hand = load_detector(f"lcmem?adapt={image_folder / 'one.csv'}", device="cpu")
    listener = Listener()
    names = ["lcmem", "lcmem (adapted)", "phash"]
    for number, pairs in enumerate(("reference", "all")):
        out = tmp_path / str(number)
        result = run(
            filelist, out, detectors=["lcmem", "phash"], adapt=True, pairs=pairs, reporter=listener
        )
        assert [item.name for item in result.detectors] == names
        kinds = result.detectors[1].adapted_to
        assert kinds == {"one": 21, "two": 0} and result.detectors[0].adapted_to is None
        assert any("two is scored as it is: lcmem cannot be" in text for text in listener.warnings)
        rows = rows_of(out / "scores.csv")
        for row in [r for r in rows if r["ds_name"] == "one"][::9]:
            score = by_hand.score(image_folder / row["path_a"], image_folder / row["path_b"])
            assert float(row[names[1]]) == pytest.approx(score, abs=1e-5)
            assert float(row[names[0]]) != pytest.approx(score, abs=1e-3)
        two = [r for r in rows if r["ds_name"] == "two"]
        assert two and all(row[names[0]] == row[names[1]] for row in two)
        written = json.loads((out / "benchmark_results.json").read_text())["detectors"]
        assert written[names[1]]["adapted_to"] == kinds
        assert list(json.loads((out / "thresholds.json").read_text())) == names


def test_nothing_is_judged_on_what_was_adapted_to(filelist, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(adapted, "ONE_PICTURE", 1.01)
    for number, split in enumerate(("TEST", "VAL")):
        part = load_manifest(filelist, basedir=image_folder).select(split)
        write_manifest(part, image_folder / "part.csv")
        names = [f"lcmem?adapt={image_folder / 'part.csv'}"]
        if split == "VAL":  # a list with splits gives its TRAIN images
            (image_folder / "part").mkdir()
            for image, path in enumerate(part.paths()):
                shutil.copy(path, image_folder / "part" / f"{image}.png")
            names = [f"joint?adapt={image_folder / 'part'}"]
        with pytest.raises(InputError, match=r"was adapted to \d+ of the images"):
            run(filelist, tmp_path / str(number), detectors=names)
    with pytest.raises(InputError, match="TRAIN is adapted to"):
        run(filelist, tmp_path / "out", detectors=["lcmem"], adapt=True, split="TRAIN")


def test_a_detector_that_embeds_images_to_load_is_loaded_once(
    filelist, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapted, "ONE_PICTURE", 1.01)
    load, loaded = study.load_detector, []
    monkeypatch.setattr(
        study, "load_detector", lambda name, **more: (loaded.append(name), load(name, **more))[1]
    )
    shutil.copytree(image_folder / "id20", image_folder.parent / "kind")
    for number in range(6, 10):
        shutil.copytree(image_folder / f"id{number:02d}", image_folder.parent / f"kind/{number}")
    name = f"lcmem?adapt={image_folder.parent / 'kind'}"
    run(filelist, tmp_path / "out", detectors=["mse", name, "phash"])
    assert sorted(loaded) == sorted(["mse", name, "phash", "phash"])


def test_scores_are_not_taken_for_other_pairs(image_folder, tmp_path):
    lines = ["path,id,Split"]
    for record in load_manifest(image_folder).records:
        number = int(record.id[2:])
        split = "TEST" if number < 12 else "VAL" if number < 20 else "TRAIN"
        lines.append(f"{record.path},{number},{split}")
    filelist = tmp_path / "numbers.csv"
    filelist.write_text("\n".join(lines))
    run(filelist, tmp_path / "out")
    # One TRAIN id that is no number, and the published code orders all ids as text.
    filelist.write_text("\n".join([*lines[:-1], lines[-1].replace(",23,", ",x,")]))
    with pytest.raises(InputError, match="holds results of another study"):
        run(filelist, tmp_path / "out")


def test_what_is_judged_is_not_adapted_to_under_another_name(filelist, image_folder, tmp_path):
    manifest = load_manifest(filelist, basedir=image_folder)
    train, test = (manifest.select(split, ["one"]).paths() for split in ("TRAIN", "TEST"))
    shutil.copy(test[0], train[0])
    seen = []
    adapt = LCMemDetector.adapted

    def adapted_to(self, features, contents):
        seen.append(set(contents))
        return adapt(self, features, contents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted, "ONE_PICTURE", 1.01)
        patch.setattr(LCMemDetector, "adapted", adapted_to)
        result = run(filelist, tmp_path / "out", detectors=["lcmem"], adapt=True)
    assert result.detectors[1].adapted_to == {"one": 20, "two": 21}
    assert content_hash(test[0]) not in set.union(*seen)


def test_a_narrow_terminal_gets_a_table_that_fits(filelist, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr(
        render, "_console", lambda stream: Console(file=stream, width=80, highlight=False)
    )
    done = run_cli(
        "benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images",
        "-o", tmp_path / "out", "--detectors", "mse,phash,ncc", "--input-size", 32,
    )  # fmt: skip
    table = [line for line in done.stdout.splitlines() if line[:1] in "┏┃┡│└" and line]
    assert table and all(len(line) <= 80 for line in table)
    assert sum("detector" in line for line in table) > 1  # in parts, each with its names
    assert "phash" in done.stdout


def test_tables_do_not_wrap_at_120_columns(filelist, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr(module, "FPR_RATES", (0.2, 0.1))
    names = ["joint?label=" + "long name " * 6 + "end", "mse", "phash"]
    done = run_cli(
        "benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images",
        "-o", tmp_path / "out", "--detectors", ",".join(names), "--input-size", 32,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    table = [line for line in lines if line[:1] in "┏┃┡│└" and line]
    assert all(len(line) <= 120 for line in table)
    headings = [line for line in table if line[0] == "┃"]
    assert len(headings) == 3 * 2  # overall and two data sets, in two parts, on one line each
    assert sum("mse" in line for line in table) == len(headings)
    assert all("long nam…" in line for line in table if " end " in line)


def test_a_bare_name_that_needs_a_file_is_left_out_with_its_reason(filelist, tmp_path, run_cli):
    arguments = ["benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    arguments += ["--input-size", 16, "--detectors", "byol,mse,swav", "-o", tmp_path / "out"]
    out = run_cli(*arguments)
    for name in ("byol", "swav"):
        assert f"Left out: {name}: detector '{name}' needs a file of its weights" in out.stdout
        assert f"write {name}:FILE" in out.stdout
    written = json.loads((tmp_path / "out" / FILES[0]).read_text())
    assert [item["name"] for item in written["skipped"]] == ["byol", "swav"]
    strict = run_cli(*arguments[:-1], tmp_path / "strict", "--strict", exit_code=2)
    assert "byol:FILE" in strict.stderr


def test_another_run_adds_its_detectors_to_the_folder(filelist, tmp_path, run_cli):
    out = tmp_path / "out"
    run(filelist, out, detectors=["mse", "phash"])
    listener = Listener()
    result = run(filelist, out, detectors=["ncc"], reporter=listener)
    assert [item.name for item in result.detectors] == ["ncc", "mse", "phash"]
    kept = [fields for name, fields in listener.events if name == "kept from an earlier run"]
    assert [fields["detector"] for fields in kept] == ["mse", "phash"]
    together = run(filelist, tmp_path / "fresh", detectors=["ncc", "mse", "phash"])
    assert result == together and read(out) == read(tmp_path / "fresh")
    shutil.rmtree(out / "stages")
    listener = Listener()
    alone = run(filelist, out, detectors=["ncc"], reporter=listener)
    assert [item.name for item in alone.detectors] == ["ncc"]
    assert any("'mse' of an earlier run is not in the results" in w for w in listener.warnings)
    run(filelist, out, detectors=["mse"], overwrite=True)
    assert list(json.loads((out / FILES[0]).read_text())["detectors"]) == ["mse"]


def test_a_label_names_a_detector_in_tables_files_and_figures(filelist, tmp_path, run_cli):
    out = tmp_path / "out"
    arguments = ["benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images"]
    arguments += ["--input-size", 32, "-o"]
    named = "mse?label=Pixels %26 co,phash?label=100%25_hash"
    shown = run_cli(*arguments, out, "--detectors", named, "--latex").stdout
    labels = ["Pixels & co", "100%_hash"]
    assert all(label in shown for label in labels)
    assert list(json.loads((out / FILES[0]).read_text())["detectors"]) == labels
    assert list(rows_of(out / "scores.csv")[0])[-2:] == labels
    assert all(label in (out / "roc.png").read_text() for label in labels)
    assert "mse?label=Pixels %26 co" in (out / "config.toml").read_text()
    twice = "mse?label=a,ncc?label=a"
    refused = run_cli(*arguments, tmp_path / "x", "--detectors", twice, exit_code=2)
    assert "'a' is named twice" in refused.stderr
    vain = run_cli("infer", filelist, filelist, "--detector", "mse?label=a", exit_code=2)
    assert "tables of benchmark and robustness only" in vain.stderr


def test_latex_holds_the_table(filelist, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FPR_RATES", (0.2,))
    names = ["mse?label=A_1 %26 50 %25", "phash"]
    result = run(filelist, tmp_path / "out", detectors=names, latex=True)
    text = (tmp_path / "out" / "benchmark_results.tex").read_text()
    assert text.count("\\begin{tabular}{lrrrrrrr}") == 3  # overall and both data sets
    assert "A\\_1 \\& 50 \\% & " in text
    body = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0].splitlines()
    aucs = [item.overall.metrics["auc"] for item in result.detectors]
    for row, auc in zip(body, aucs, strict=True):
        cells = row.removesuffix(" \\\\").split(" & ")
        assert len(cells) == 8 and f"{auc:.3f}" in cells[1]
        assert cells[1].startswith("\\textbf") == (
            auc == max(aucs) and row is body[aucs.index(auc)]
        )
    run(filelist, tmp_path / "out", detectors=names)  # not asked for: what is old does not stay
    assert not (tmp_path / "out" / "benchmark_results.tex").exists()


def test_few_identities_are_said_to_be_few(filelist, tmp_path, monkeypatch):
    notes = run(filelist, tmp_path / "out").notes
    assert any("6 identities are few" in note for note in notes)
    monkeypatch.setattr(module, "FEW_IDENTITIES", 6)
    assert not any("are few" in note for note in run(filelist, tmp_path / "out").notes)


def test_options_of_detectors_keep_their_commas(filelist, tmp_path, run_cli):
    done = run_cli(
        "benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images",
        "-o", tmp_path / "out", "--detectors",
        "mse,timm:resnet10t?weights=/no/such.pth&mean=0.5,0.5,0.5,phash", exit_code=2,
    )  # fmt: skip
    assert "/no/such.pth" in done.stderr and "three numbers" not in done.stderr


def test_without_a_split_to_fit_on_the_table_has_no_columns_for_it(filelist, tmp_path, run_cli):
    done = run_cli(
        "benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images",
        "-o", tmp_path / "out", "--detectors", "mse,phash", "--fit-split", "none",
    )  # fmt: skip
    assert "TPR" not in done.stdout and "None" not in done.stdout


def test_adapting_detectors_that_cannot_be_is_refused_before_any_work(filelist, tmp_path, run_cli):
    done = run_cli(
        "benchmark", "--filelist", filelist, "--basedir", filelist.parent / "images",
        "-o", tmp_path / "out", "--detectors", "mse,phash", "--adapt", exit_code=2,
    )  # fmt: skip
    assert "none of the detectors can be adapted" in done.stderr
    assert not (tmp_path / "out").exists()

"""Fitting a checkpoint to other images: what changes, and that nothing else does."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from scipy.spatial.distance import pdist
from scipy.special import logit
from sklearn.decomposition import PCA

from lcmem_cli import load_detector
from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.reading import content_hash
from lcmem_cli.engine.detectors import adapted
from lcmem_cli.engine.detectors.adapted import picture_weights, shrunk_whitening
from lcmem_cli.engine.detectors.embedding import embed_files
from lcmem_cli.engine.errors import InputError
from lcmem_cli.engine.evaluation.recalibrate import CalibrationRequest, recalibrate
from lcmem_cli.engine.models.checkpoint import load_checkpoint, save_checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec
from lcmem_cli.engine.models.whitening import SPREAD, whitened_projection
from lcmem_cli.engine.training import last_layer
from lcmem_cli.engine.training.last_layer import Whitening, adapt

pytestmark = pytest.mark.usefixtures("no_drawing")


def make(path, backbone="resnet10t", **changes):
    spec = NetworkSpec(
        backbone=backbone, in_channels=3, num_features=8, input_size=32, normalisation="sample",
        **changes,
    )  # fmt: skip
    return save_checkpoint(path, random_checkpoint(spec, load_codec("none"), image_size=32))


def before_sigmoid(file, paths):
    detector = load_detector(f"lcmem:{file}", device="cpu")
    embedded = embed_files(detector, paths)
    return logit(np.asarray(embedded.features, dtype=np.float64)[embedded.rows])


def test_adapting_centres_the_last_layer_and_makes_its_largest_differences_smaller(
    run_cli, image_folder, tmp_path
):
    saved = make(tmp_path / "start.safetensors")
    out = tmp_path / "adapted.safetensors"
    options = ("--filelist", image_folder, "-o", out)
    run_cli("calibrate", tmp_path / "start.safetensors", *options, "--adapt")
    manifest = load_manifest(image_folder)
    paths = manifest.select("TRAIN").paths()
    start, adapted = (before_sigmoid(file, paths) for file in (tmp_path / "start.safetensors", out))
    centre, matrix = shrunk_whitening(
        start, picture_weights(start / np.linalg.norm(start, axis=1, keepdims=True))
    )
    np.testing.assert_allclose(adapted, (start - centre) @ matrix, atol=1e-3)
    assert np.abs(start.mean(axis=0)).max() > 0.01
    np.testing.assert_allclose(adapted.mean(axis=0), 0, atol=1e-4)
    spreads = [np.linalg.svd(rows - rows.mean(axis=0))[1] for rows in (start, adapted)]
    assert spreads[1][0] / spreads[1][-1] < spreads[0][0] / spreads[0][-1]
    loaded = load_checkpoint(out)
    changed = [k for k, v in saved.network_state.items() if not v.equal(loaded.network_state[k])]
    assert sorted(changed) == ["backbone.fc.bias", "backbone.fc.weight"]
    assert loaded.fingerprint != saved.fingerprint
    assert {t.fingerprint for t in loaded.thresholds} == {loaded.fingerprint}
    recorded = json.loads(run_cli("info", out, "--json").stdout)["training"]["adapted"]
    assert recorded["num_images"] == len(manifest.select("TRAIN").records)
    contents = {content_hash(path) for path in paths}
    assert load_detector(f"lcmem:{out}", device="cpu").adapted_to == contents
    again = tmp_path / "again.safetensors"
    run_cli("calibrate", out, "--filelist", image_folder, "-o", again, "--half")
    assert set(load_checkpoint(again).adapted_to) == contents


def test_adapting_needs_no_identities(run_cli, image_folder, tmp_path):
    make(tmp_path / "start.safetensors")
    rows = [
        f"{path.relative_to(image_folder)},{n}"
        for n, path in enumerate(image_folder.rglob("*.png"))
    ]
    (image_folder / "list.csv").write_text("\n".join(["path,id", *rows]))
    arguments = [tmp_path / "start.safetensors", "--filelist", image_folder / "list.csv"]
    arguments += ["-o", tmp_path / "out.safetensors"]
    assert "too few pairs" in run_cli("calibrate", *arguments, exit_code=2).stderr
    done = run_cli("calibrate", *arguments, "--adapt")
    assert "too few pairs" in done.stderr
    assert load_checkpoint(tmp_path / "out.safetensors").thresholds == ()


def test_unreadable_images_can_be_made_to_fail(run_cli, image_folder, tmp_path):
    make(tmp_path / "start.safetensors")
    bad = load_manifest(image_folder).select("TEST").paths()[0]
    bad.write_bytes(b"no image")
    arguments = ["calibrate", tmp_path / "start.safetensors", "--filelist", image_folder]
    arguments += ["-o", tmp_path / "out.safetensors"]
    assert bad.name in run_cli(*arguments, "--max-unreadable", 0, exit_code=1).stderr
    assert not (tmp_path / "out.safetensors").exists()
    assert f"unreadable {bad.parent.name}/{bad.name}" in run_cli(*arguments).stdout


def test_adapting_refuses_what_it_cannot_do(image_folder, tmp_path):
    checkpoint = make(tmp_path / "start.safetensors")
    manifest = load_manifest(image_folder).select("TRAIN")
    with pytest.raises(InputError, match="0 TRAIN images are too few"):
        adapt(checkpoint, dataclasses.replace(manifest, records=()))
    manifest.paths()[0].write_bytes(b"no image")
    with pytest.raises(InputError, match=manifest.paths()[0].name):
        adapt(checkpoint, manifest)
    convolutional = make(tmp_path / "conv.safetensors", "dla34")
    with pytest.raises(InputError, match="dla34 does not end in one linear layer"):
        adapt(convolutional, manifest)


def test_adapting_names_a_file_that_changes_while_it_is_read(image_folder, tmp_path, monkeypatch):
    manifest = load_manifest(image_folder).select("TRAIN")
    victim = manifest.paths()[2]

    def swap_then_read(self, manifest, **options):
        victim.write_bytes(manifest.paths()[0].read_bytes())
        return read(self, manifest, **options)

    read = last_layer.LastLayer.inputs
    monkeypatch.setattr(last_layer.LastLayer, "inputs", swap_then_read)
    with pytest.raises(InputError, match=f"{victim.name}: has changed while it was read"):
        adapt(make(tmp_path / "start.safetensors"), manifest)


def test_a_projection_is_sklearns_whitened_components_but_for_a_turn():
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(90, 12)) @ rng.normal(size=(12, 12)) + 5
    projection = whitened_projection(
        torch.from_numpy(pooled), [12], num_features=7, seed=3, floor=0
    )
    ours = pdist(pooled @ projection.numpy().T)
    theirs = pdist(PCA(7, whiten=True, svd_solver="full").fit_transform(pooled))
    np.testing.assert_allclose(ours, SPREAD * theirs, rtol=1e-8)


def test_directions_that_edits_change_are_made_smaller():
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(200, 6, generator=generator)
    changes = torch.zeros(200, 6)
    changes[:, 2] = 3 * torch.randn(200, generator=generator)
    plain, aware = (
        whitened_projection(pooled, [6], num_features=6, seed=0, changes=c).norm(dim=0)
        for c in (None, changes)
    )
    shrunk = aware / plain
    assert shrunk[2] < 0.6 * shrunk[[0, 1, 3, 4, 5]].min()


def test_what_sets_images_of_one_identity_apart_is_made_smaller():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(40, 5, generator=generator).repeat_interleave(3, dim=0)
    pooled = means + 0.01 * torch.randn(120, 5, generator=generator)
    pooled[:, 4] = 2 * torch.randn(120, generator=generator)  # tells nothing about who it is
    whole, alone, grouped = (
        whitened_projection(pooled, [5], num_features=5, seed=0, identities=numbers, floor=0)
        for numbers in (None, range(120), [row // 3 for row in range(120)])
    )
    assert torch.equal(whole, alone)
    shrunk = grouped.norm(dim=0) / whole.norm(dim=0)
    assert shrunk[4] < 0.6 * shrunk[:4].min()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ((), {}),
        (("--bands", 3), {"inner_stride": 8}),
        (("--size", 48), {"inner_stride": 8, "inner_bands": 2}),
    ],
)
def test_whitening_replaces_the_last_layer_and_the_head(
    run_cli, image_folder, tmp_path, options, changes
):
    saved = make(tmp_path / "start.safetensors", **changes)
    out = tmp_path / "white.safetensors"
    run_cli(
        "calibrate", tmp_path / "start.safetensors", "--filelist", image_folder, "-o", out,
        "--whiten", "--seed", 5, *options,
    )  # fmt: skip
    loaded = load_checkpoint(out)
    manifest = load_manifest(image_folder).select("TRAIN")
    features = before_sigmoid(out, manifest.paths())
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(features.std(axis=0, ddof=1), SPREAD, rtol=1e-3)
    layer = "backbone.projection" if changes else "backbone.fc"
    changed = {
        key for key, value in loaded.network_state.items()
        if not value.equal(saved.network_state[key])
    }  # fmt: skip
    assert changed == {f"{layer}.weight", f"{layer}.bias", "head.weight", "head.bias"}
    bands = dict(zip(options[::2], options[1::2], strict=True)).get("--bands")
    assert loaded.network.inner_bands == (bands or changes.get("inner_bands"))
    assert loaded.network_state["head.weight"].unique().tolist() == [-20 / 8]
    assert {t.fingerprint for t in loaded.thresholds} == {loaded.fingerprint}
    recorded = json.loads(run_cli("info", out, "--json").stdout)["training"]["whitened"]
    assert recorded == {
        "data_digest": manifest.digest, "num_images": len(manifest.records), "altered": "strong",
        "num_identities": len({record.identity for record in manifest.records}), "seed": 5,
    }  # fmt: skip


def test_thresholds_are_fitted_to_kinds_that_the_last_layer_does_not_know(
    image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(adapted, "ONE_PICTURE", 1.01)  # to random weights all are much alike
    make(tmp_path / "start.safetensors", feature_rms=1.5)
    manifest = load_manifest(image_folder)
    lines = ["path,id,Split,ds_name"]
    for record in manifest.records:  # every identity belongs to one of two data sets
        kind = "even" if sum(record.id.encode()) % 2 == 0 else "odd"
        lines.append(f"{record.path},{record.id},{record.split},{kind}")
    filelist = image_folder / "two.csv"
    filelist.write_text("\n".join(lines))
    start, out = tmp_path / "start.safetensors", tmp_path / "out.safetensors"
    request = CalibrationRequest(checkpoint=start, filelist=filelist, output=out, whitened=True)
    result = recalibrate(request, Compute(device="cpu"))
    loaded = load_checkpoint(tmp_path / "out.safetensors")
    manifest = load_manifest(filelist)
    start = load_checkpoint(tmp_path / "start.safetensors")
    whitening = Whitening.of(start, manifest.select("TRAIN"), Compute(device="cpu"))
    assert whitening.fitted().fingerprint == loaded.fingerprint
    scores, adapted_scores, labels = [], [], []
    for name, other in (("even", "odd"), ("odd", "even")):
        without = whitening.fitted(without=name)
        others = [r for r in manifest.select("TRAIN").records if r.ds_name == other]
        assert without.training["whitened"]["num_images"] == len(others)
        own = [r for r in manifest.select("VAL").records if r.ds_name == name]
        val = dataclasses.replace(manifest, records=tuple(own))
        save_checkpoint(tmp_path / "without.safetensors", without)
        detector = load_detector(f"lcmem:{tmp_path / 'without.safetensors'}", device="cpu")
        features = detector.embed(val.paths())
        bank = [r for r in manifest.select("TRAIN").records if r.ds_name == name]
        kind, convert, _ = detector.adapted(
            detector.embed(dataclasses.replace(manifest, records=tuple(bank)).paths()),
            [record.path for record in bank],
        )
        moved = convert(features)
        for a, b in itertools.combinations(range(len(own)), 2):
            scores.append(detector.score_features(features[[a]], features[[b]])[0])
            adapted_scores.append(kind.score_features(moved[[a]], moved[[b]])[0])
            labels.append(own[a].id == own[b].id)
    labels = np.asarray(labels)
    recall = next(t for t in result.thresholds if t.name == "recall0.95")
    by_adapted = next(t for t in result.adapted_thresholds if t.name == "recall0.95")
    for threshold, positive in (
        (recall, np.asarray(scores)[labels]),
        (by_adapted, np.asarray(adapted_scores)[labels]),
    ):
        assert threshold.num_positives == labels.sum()
        assert threshold.num_negatives == len(labels) - labels.sum()
        assert (positive >= threshold.value - 1e-4).mean() >= 0.95
        assert np.abs(positive - threshold.value).min() < 1e-4
        assert threshold.fingerprint == loaded.fingerprint
        assert "fitted without it" in threshold.fitted_on
        assert "2 data set(s)" in threshold.fitted_on
    assert "adapted to its TRAIN images" in by_adapted.fitted_on
    assert loaded.adapted_thresholds == result.adapted_thresholds
    asked = load_detector(
        f"lcmem:{tmp_path / 'out.safetensors'}?adapt={image_folder}", device="cpu"
    )
    assert [t.value for t in asked.thresholds] == [t.value for t in loaded.adapted_thresholds]
    assert {t.fingerprint for t in asked.thresholds} == {asked.fingerprint}
    assert loaded.at_size(48).adapted_thresholds == ()


def test_whitening_refuses_what_it_cannot_do(run_cli, image_folder, tmp_path):
    checkpoint = make(tmp_path / "start.safetensors")
    manifest = load_manifest(image_folder).select("TRAIN")
    with pytest.raises(InputError, match="1 TRAIN images are too few"):
        Whitening.of(checkpoint, dataclasses.replace(manifest, records=manifest.records[:1]))
    one_set = [record._replace(ds_name="all") for record in manifest.records]
    whitening = Whitening.of(checkpoint, dataclasses.replace(manifest, records=tuple(one_set)))
    with pytest.raises(InputError, match="0 TRAIN images without data set all are too few"):
        whitening.fitted(without="all")
    with pytest.raises(InputError, match="reads no earlier stage"):
        Whitening.of(checkpoint, manifest, inner_bands=3)
    lines = ["path,id,Split,ds_name"]
    for record in load_manifest(image_folder).records:
        single = record.path == manifest.records[0].path
        kind = "rare" if single else "common"
        lines.append(f"{record.path},{record.id},{record.split},{kind}")
    (image_folder / "rare.csv").write_text("\n".join(lines))
    start, out = tmp_path / "start.safetensors", tmp_path / "out.safetensors"
    listed = image_folder / "rare.csv"
    rare = CalibrationRequest(checkpoint=start, filelist=listed, output=out, whitened=True)
    with pytest.raises(InputError, match="without data set common only 1 TRAIN images are left"):
        recalibrate(rare)
    for options, reason in (
        (("--whiten", "--adapt"), "leave --adapt out"),
        (("--bands", 3), "--bands has no effect without --whiten"),
        (("-o", tmp_path / "out.txt"), "expected a file name that ends in .safetensors"),
    ):
        done = run_cli(
            "calibrate", tmp_path / "start.safetensors", "--filelist", image_folder,
            "-o", tmp_path / "out.safetensors", *options, exit_code=2,
        )  # fmt: skip
        assert reason in done.stderr
    manifest.paths()[0].write_bytes(b"no image")
    with pytest.raises(InputError, match=manifest.paths()[0].name):
        Whitening.of(checkpoint, manifest)

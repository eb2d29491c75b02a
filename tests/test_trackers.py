"""Losses of each epoch for TensorBoard and Weights & Biases."""

import csv
import sys
import types

import pytest

from lcmem_cli.engine import config as cfg
from lcmem_cli.engine.check import CheckRequest, check_run
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.errors import ConfigError, MissingExtraError
from lcmem_cli.engine.training import trackers
from lcmem_cli.engine.training.run import open_training_folder
from lcmem_cli.engine.training.trackers import check_trackers, open_trackers

pytestmark = pytest.mark.usefixtures("no_drawing")

SMALL = [
    "--set=image.size=32",
    "--set=network.backbone=test_resnet",
    "--set=network.num_features=8",
    "--set=schedule.batch_size=8",
    "--set=runtime.device=cpu",
]
RECORD = {"epoch": 4, "train_loss": 0.5, "val_loss": 0.25, "learning_rate": 0.125}


def runtime(*names):
    return cfg.RuntimeSection(trackers=names, device="cpu")


def test_tensorboard_shows_what_history_holds_also_after_resuming(
    run_cli, image_folder, tiny_codec, tmp_path
):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    source = ["--filelist", image_folder, "--codec", tiny_codec, "--size", 32]
    run_cli("latents", *source, "-o", tmp_path / "latents")
    target = tmp_path / "run"
    train = ["train-stage1", "--latents", tmp_path / "latents", "-o", target, *SMALL]
    train.append(f"--set=codec.name={tiny_codec}")
    run_cli(*train, "--set=schedule.epochs=3", '--set=runtime.trackers=["tensorboard"]')
    events = accumulator.EventAccumulator(str(target / "tensorboard")).Reload()
    with (target / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"epoch"}
    for key in ("train_loss", "val_ntxent", "learning_rate"):
        points = [(point.step, point.value) for point in events.Scalars(key)]
        assert points == [
            (number, pytest.approx(float(row[key]), rel=1e-5))
            for number, row in enumerate(rows, start=1)
        ]
    run_cli(*train, "--set=schedule.epochs=3", "--resume")  # without the tracker: the same run


def test_wandb_is_told_the_run_and_its_config(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(("init", settings))
        return Run()

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: types.SimpleNamespace(origin=name))
    with open_trackers(runtime("wandb"), tmp_path / "run7", {"a": 1}, "f" * 64, Ranks()) as log:
        log(RECORD)
    (_, settings), (_, values, step), last = calls
    assert settings["project"] == "lcmem" and settings["name"] == "run7"
    assert settings["config"] == {"a": 1} and settings["id"] == "f" * 32
    assert values == {k: v for k, v in RECORD.items() if k != "epoch"} and step == 4
    assert last == ("finish",)


def test_only_the_first_process_logs(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    for ranks in (Ranks(1, 2), Ranks(0, 1)):
        with open_trackers(runtime("tensorboard"), tmp_path, {}, "0" * 64, ranks) as log:
            log(RECORD)
        assert (tmp_path / "tensorboard").exists() == ranks.is_main


def test_a_missing_package_names_the_extra(monkeypatch, run_cli, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"tensorboard.*lcmem\[trackers\]"):
        check_trackers(runtime("tensorboard"))
    with pytest.raises(MissingExtraError, match=r"wandb.*lcmem\[wandb\]"):
        check_trackers(runtime("wandb"))
    chosen = 'runtime.trackers=["wandb"]'
    arguments = ["-o", tmp_path / "run", "--set", chosen]
    refused = run_cli("train-stage1", *arguments, exit_code=2)
    assert "lcmem[wandb]" in refused.stderr and not (tmp_path / "run").exists()
    problems = [
        finding
        for finding in check_run(CheckRequest(config="finetune", overrides=[chosen])).findings
        if finding.level == "problem"
    ]
    assert [finding.group for finding in problems] == ["trackers"]


def test_the_runs_digest_does_not_depend_on_trackers(tmp_path):
    def digest(*overrides):
        config = cfg.load_config("finetune", cfg.FinetuneConfig, overrides=overrides)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with open_training_folder(folder, config, "data", resume=False) as found:
            return found

    plain = digest()
    assert digest('runtime.trackers=["tensorboard"]', "runtime.device=cpu") == plain
    assert digest("runtime.seed=1") != plain


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"kind": "stage1", "runtime": {"trackers": ["tensorbord"]}}, "trackers"),
        ({"kind": "stage1", "runtime": {"trackers": "wandb"}}, "trackers"),
        ({"kind": "codec", "runtime": {"trackers": ["wandb"]}}, "no effect"),
    ],
)
def test_wrong_trackers_are_refused(values, word):
    with pytest.raises(ConfigError, match=word):
        cfg.validate(values, source="x")

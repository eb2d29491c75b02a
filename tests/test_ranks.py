"""Several processes (gloo, on the CPU) make what one makes, and a lost one ends the job."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import codec_of, draw_identity, save_tiny_codec

from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.distributed import Ranks
from lcmem_cli.engine.models.checkpoint import load_checkpoint
from lcmem_cli.engine.models.siamese import SiameseNetwork
from lcmem_cli.engine.store.latents import LatentStore

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.usefixtures("no_drawing"),
]

SMALL_PARTS = {
    "lcmem_cli.engine.store.latents:SHARD_RECORDS": 7,
    "lcmem_cli.engine.evaluation.indexing:IMAGES_PER_SEGMENT": 10,
    "lcmem_cli.engine.detectors.embedding:_ROUND_IMAGES": 5,
}
TRAINING = (
    "--set=network.backbone=convnext_atto",  # no batch normalisation
    "--set=network.num_features=8",
    "--set=network.drop_path_rate=0.0",
    "--set=image.size=64",
    "--set=schedule.batch_size=11",  # leaves a batch of three, less than a pair for each of four
    "--set=schedule.epochs=2",
    "--set=optimiser.learning_rate=0.0001",
    "--set=runtime.device=cpu",
    "--set=runtime.num_workers=1",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    for identity in range(24):
        (folder / f"id{identity:02d}").mkdir(parents=True)
        for variant in range(2):
            path = folder / f"id{identity:02d}" / f"{variant}.png"
            draw_identity(identity, variant, side=24).save(path)
    judged = load_manifest(folder).select("TEST").records
    (folder / judged[3].path).write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def latents(images, tiny_codec):
    def command(output):
        return [
            "--quiet", "latents", "--filelist", images, "--codec", tiny_codec, "--size", 64,
            "--workers", 1, "--batch-size", 3, "--device", "cpu", "--max-unreadable", 1,
            "-o", output, "--json",
        ]  # fmt: skip

    return command


@pytest.fixture(scope="module")
def store(server, latents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    cache = {"LCMEM_CACHE": str(folder / "cache")}
    done = server.run(*latents(folder / "store"), patches=SMALL_PARTS, environment=cache)
    assert done.code == 0, done.stderr
    return folder / "store"


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".lock", ".tmp"))
    }


# --- training ------------------------------------------------------------------------------------


def compare_trainings(one, several):
    expected, found = (load_checkpoint(f / "checkpoint.safetensors") for f in (one, several))
    differences = []
    for key, value in expected.network_state.items():
        differences.append((found.network_state[key] - value).abs().flatten())
        # Adam divides by the gradient's size, so a gradient of nothing but rounding errors moves
        # a weight as far as any other: the largest difference is one of those. Of a bias they may
        # be half of the values. How far it comes depends on the processor's instructions.
        assert differences[-1].max() < 3e-5 and differences[-1].mean() < 5e-7, key
    assert torch.cat(differences).mean() < 1e-7
    # Its average of the gradients is not divided, and so shows a factor that the weights hide.
    averages = [gradients(folder) for folder in (one, several)]
    assert (averages[0] - averages[1]).norm() < 1e-4 * averages[0].norm()
    histories = [np.genfromtxt(f / "history.csv", delimiter=",") for f in (one, several)]
    np.testing.assert_allclose(histories[0][1:], histories[1][1:], rtol=0, atol=1e-5)
    results = [json.loads((folder / "training.json").read_text()) for folder in (one, several)]
    assert results[0]["test_auc"] == results[1]["test_auc"]


def test_several_ranks_train_the_network_of_one(server, store, images, tmp_path):
    command = [
        "--quiet",
        "train-stage1",
        "--latents",
        store,
        codec_of(store),
        *TRAINING,
        "--json",
        "-o",
    ]
    for count in (1, 4):
        done = server.run_ranks(count, *command, tmp_path / str(count))
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["num_epochs"] == 2
    assert moved(tmp_path / "1") > 5e-5, "an average weight has to move for this to mean much"
    compare_trainings(tmp_path / "1", tmp_path / "4")
    tuning = [
        "--quiet", "finetune", tmp_path / "1" / "checkpoint.safetensors", "--filelist", images,
        "--max-unreadable", 1, *TRAINING[4:], "--set=schedule.epochs=1",
        "--set=regularisation.drop_path_rate=0.0", "-o",
    ]  # fmt: skip
    for count in (1, 2):
        done = server.run_ranks(count, *tuning, tmp_path / f"tuned-{count}")
        assert done.code == 0, done.stderr
    compare_trainings(tmp_path / "tuned-1", tmp_path / "tuned-2")


def test_batch_normalisation_sees_the_whole_batch(server, store, tmp_path):
    # One step, as Adam turns the rounding errors of small gradients into whole steps.
    command = [
        "--quiet", "train-stage1", "--latents", store, codec_of(store), *TRAINING,
        "--set=schedule.batch_size=100",
        "--set=network.backbone=test_resnet", "--set=schedule.epochs=1",
    ]  # fmt: skip
    for count in (1, 2):
        done = server.run_ranks(count, *command, "-o", tmp_path / str(count))
        assert done.code == 0, done.stderr
    expected = gradients(tmp_path / "1")
    one = load_checkpoint(tmp_path / "1" / "checkpoint.safetensors").network_state
    statistics = [key for key in one if "running" in key or "num_batches" in key]
    assert statistics
    # Rounding changes which of two almost equal values a maximum takes: not 1e-5 here.
    assert (gradients(tmp_path / "2") - expected).norm() < 1e-2 * expected.norm()
    several = load_checkpoint(tmp_path / "2" / "checkpoint.safetensors").network_state
    for key in statistics:
        torch.testing.assert_close(several[key], one[key], rtol=1e-5, atol=1e-6)
    # Three pairs in three parts on two processes: some are empty, and nobody may wait for ever.
    done = server.run_ranks(
        2, *command, "--set=schedule.batch_size=9", "--set=schedule.accumulate=3",
        "-o", tmp_path / "parts",
    )  # fmt: skip
    assert done.code == 0, done.stderr


def gradients(folder):
    adam = torch.load(folder / "state.pt", weights_only=True)["adam"]["state"]
    return torch.cat([adam[number]["exp_avg"].flatten() for number in sorted(adam)])


def moved(folder):
    """Return how far a training has moved the average weight."""
    checkpoint = load_checkpoint(folder / "checkpoint.safetensors")
    torch.manual_seed(0)
    before = SiameseNetwork(checkpoint.network).state_dict()
    steps = [(v - before[key]).abs().flatten() for key, v in checkpoint.network_state.items()]
    return float(torch.cat(steps).mean())


def test_a_training_stopped_on_two_ranks_goes_on_with_one(server, store, tmp_path):
    command = [
        "--quiet",
        "train-stage1",
        "--latents",
        store,
        codec_of(store),
        *TRAINING,
        "--resume",
        "-o",
    ]
    assert server.run(*command, tmp_path / "whole").code == 0
    place = "lcmem_cli.engine.training.loop:forward_backward"
    ranks = server.start_ranks(2, *command, tmp_path / "out", at=(place, 3, "hold"))
    for rank in ranks:
        rank.wait_until_held()
        rank.send(signal.SIGTERM)
    assert {rank.wait().code for rank in ranks} == {143}
    done = server.run(*command, tmp_path / "out")
    assert done.code == 0, done.stderr
    compare_trainings(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    ("told", "size", "expected"), [("4", 8, 4), (None, 8, 8), ("", 8, 8), ("0", 2, 2), ("9", 2, 2)]
)
def test_cpus_are_shared_with_the_ranks_of_this_machine_only(monkeypatch, told, size, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if told is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    assert Ranks(0, size).local_size == expected


# --- the other commands --------------------------------------------------------------------------


def test_latents_of_any_number_of_ranks_are_the_same(server, latents, store, tmp_path):
    output = tmp_path / "several"
    place = "lcmem_cli.engine.store.latents:_encode"
    ranks = server.start_ranks(2, *latents(output), at=(place, 20, "hold"), patches=SMALL_PARTS)
    for rank in ranks:
        rank.wait_until_held()
    deadline = time.monotonic() + 30  # a shard is written while the next is encoded
    while len(list(output.glob("shards/0*.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.send(signal.SIGKILL)
    assert {rank.wait().code for rank in ranks} == {-signal.SIGKILL}
    kept = len(list(output.glob("shards/0*.json")))
    done = server.run_ranks(3, *latents(output), patches=SMALL_PARTS)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert kept >= 2 and result["num_encoded_now"] <= 47 - 6 * kept
    assert contents(output) == contents(store)
    rows = [record.path for record in LatentStore.open(output).records]
    assert len(rows) == len(set(rows)) == 47
    whole = LatentStore.open(store)
    assert result["mean"] == list(whole.mean) and result["std"] == list(whole.std)


MEASURES = ("--detectors", "mse,phash", "--input-size", 16, "--workers", 1, "--device", "cpu")


@pytest.mark.parametrize(
    ("name", "options", "files"),
    [
        ("benchmark", MEASURES, ("scores.csv", "benchmark_results.csv", "benchmark_results.json")),
        ("robustness", (*MEASURES, "--fit-rate", 0.4), ("robustness_results.csv",)),
        (
            "benchmark",
            # Batches of one, as a share of the images makes others, which round differently.
            ("--detectors", "lcmem", "--adapt", "--workers", 1, "--batch-size", 1),
            ("benchmark_results.json",),
        ),
    ],
)
def test_studies_of_two_ranks_are_those_of_one(server, images, tmp_path, name, options, files):
    for count in (1, 2):
        command = ["--quiet", name, "--filelist", images, *options, "--no-cache"]
        done = server.run_ranks(
            count, *command, "-o", tmp_path / str(count), "--json", patches=SMALL_PARTS
        )
        assert done.code == 0, done.stderr
        assert len(json.loads(done.stdout)["unreadable"]) == 1
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


def test_a_benchmark_on_latents_is_the_same(server, store, images, tmp_path):
    assert (
        server.run(
            "train-stage1", "--latents", store, codec_of(store), *TRAINING, "-o", tmp_path / "run"
        ).code
        == 0
    )
    detector = f"lcmem:{tmp_path / 'run' / 'checkpoint.safetensors'}"
    for count in (1, 2):
        command = ["--quiet", "benchmark", "--filelist", images, "--latents", store, *MEASURES[4:]]
        done = server.run_ranks(
            count, *command, "--detectors", detector, "-o", tmp_path / str(count), "--json"
        )
        assert done.code == 0, done.stderr
    one, two = (np.genfromtxt(tmp_path / n / "scores.csv", delimiter=",") for n in "12")
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-7)  # other batches, other rounding


def test_an_index_of_two_ranks_is_that_of_one(server, images, tmp_path):
    for count in (1, 2):
        done = server.run_ranks(
            count, "--quiet", "index", "build", images, "--detector", "phash", "--workers", 1,
            "--device", "cpu", "--max-unreadable", 1, "-o", tmp_path / str(count), "--json",
            patches=SMALL_PARTS,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["num_added"] == 47
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_audit_of_two_ranks_is_that_of_one(server, images, tmp_path):
    results = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        done = server.run_ranks(
            count, "--quiet", "audit", images / "id05", "--against", images, "--fpr", 0.1,
            "--detector", "phash", "--workers", 1, "--device", "cpu", "-o", folder, "--json",
            patches=SMALL_PARTS,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        results.append(json.loads(done.stdout))
        assert results[-1].pop("times")["seconds"] > 0
        assert results[-1]["num_exact_copies"] == 2
    assert results[0] == results[1]
    for name in ("matches.csv", "matches.parquet"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


# --- a lost process ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("latents", "lcmem_cli.engine.store.latents:_encode"),
        ("train-stage1", "lcmem_cli.engine.training.loop:forward_backward"),
    ],
)
def test_a_lost_rank_ends_the_others_in_one_line(server, latents, store, tmp_path, name, place):
    output = tmp_path / "out"
    command = latents(output)
    if name == "train-stage1":
        command = [
            "--quiet",
            name,
            "--latents",
            store,
            codec_of(store),
            *TRAINING,
            "--resume",
            "-o",
            output,
        ]
    ranks = server.start_ranks(2, *command, patches=SMALL_PARTS, at=(place, 2, "hold-rank-1"))
    ranks[1].wait_until_held()
    ranks[1].send(signal.SIGKILL)
    began = time.monotonic()
    done = ranks[0].wait()
    assert time.monotonic() - began < 30 and ranks[1].wait().code == -signal.SIGKILL
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[Gloo]")]
    assert done.code == 1 and len(lines) == 1, done.stderr
    assert "another process of this job ended" in lines[0]
    again = server.run_ranks(2, *command, patches=SMALL_PARTS)
    assert again.code == 0, again.stderr
    if name == "latents":
        assert contents(output) == contents(store)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_waited_for_some_minutes_only(server, latents, tmp_path, rank):
    started = server.start_ranks(
        2, *latents(tmp_path / "out"),
        at=("lcmem_cli.engine.distributed:launched", 1, f"hold-rank-{1 - rank}"),
        patches={"lcmem_cli.engine.distributed:RENDEZVOUS_SECONDS": 2.0},
    )  # fmt: skip
    started[1 - rank].wait_until_held()
    started[1 - rank].send(signal.SIGKILL)
    began = time.monotonic()
    done = started[rank].wait()
    assert time.monotonic() - began < 30 and done.code == 1
    # Before it torch's own library may have written what it tried.
    last = done.stderr.splitlines()[-1]
    assert f"process {rank} of 2 has waited 2 s for the others to start" in last


FAILING = """
import os, sys
from lcmem_cli.engine.store import latents
latents.SHARD_RECORDS = 10
write = latents._Shards.write
def fail(self, *arguments):
    if os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device", "/the/disk/of/rank/1")
    return write(self, *arguments)
latents._Shards.write = fail
from lcmem_cli.__main__ import main
main()
"""


@pytest.mark.slow  # starts Python four times; above, ranks fail without torchrun
def test_under_torchrun_a_failing_rank_ends_the_job_with_its_error(images, tmp_path):
    (tmp_path / "run.py").write_text(FAILING)
    codec = save_tiny_codec(tmp_path / "codec")
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(tmp_path / "run.py"), "--quiet", "latents", "--filelist", str(images),
            "--codec", str(codec), "--size", "64", "-o", str(tmp_path / "out"),
            "--max-unreadable", "1",
        ],  # --device auto, which without CUDA is no reason to work alone
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode != 0 and run.stdout == ""
    assert "error: /the/disk/of/rank/1: No space left on device" in run.stderr
    assert not (tmp_path / "out" / "meta.json").exists()

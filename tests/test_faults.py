"""Faults: signals, full and read-only disks, vanished and damaged files, NaN, two writers.

Each fault has to end in one clear line, and the same command has to end right afterwards.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import draw_identity

from lcmem_cli.cli import interrupts
from lcmem_cli.engine.store.index import Index
from lcmem_cli.engine.store.latents import LatentStore
from lcmem_cli.engine.training import loop

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.usefixtures("no_drawing"),
]

NETWORK = (
    "--set=network.backbone=test_convnext",
    "--set=network.num_features=8",
    "--set=network.drop_path_rate=0.0",
    "--set=image.size=64",
)
TRAINING = (
    "--set=schedule.batch_size=8",
    "--set=runtime.device=cpu",
    "--set=runtime.num_workers=1",
)
SMALL_PARTS = {
    "lcmem_cli.engine.store.latents:SHARD_RECORDS": 10,
    "lcmem_cli.engine.evaluation.indexing:IMAGES_PER_SEGMENT": 10,
}
COMMANDS = ("latents", "train-stage1", "finetune", "benchmark", "robustness", "index", "audit")
# Where each command is in the middle of its work, with something of it on the disk.
MIDDLE = {
    "latents": ("lcmem_cli.engine.store.latents:_encode", 17),
    "train-stage1": ("lcmem_cli.engine.training.loop:forward_backward", 4),
    "finetune": ("lcmem_cli.engine.training.loop:forward_backward", 4),
    "benchmark": ("lcmem_cli.engine.evaluation.study.benchmark:embed_files", 2),
    "robustness": ("lcmem_cli.engine.evaluation.study.robustness:score_listed", 6),
    "index": ("lcmem_cli.engine.store.index:Index.append", 2),
    "audit": ("lcmem_cli.engine.evaluation.audit.run:write_audit", 1),
}
RESULTS = {
    "latents": ("meta.json", "plan.json", "index.parquet", "shards"),
    "train-stage1": ("checkpoint.safetensors", "history.csv"),
    "finetune": ("checkpoint.safetensors", "history.csv"),
    "benchmark": (
        "benchmark_results.json", "benchmark_results.csv", "scores.csv", "thresholds.json",
        "stages", "config.toml", "environment.json", "inputs.json",
    ),
    "robustness": (
        "robustness_results.json", "robustness_results.csv", "thresholds.json", "stages"
    ),
    "index": ("index.json", "features.bin", "segments"),
    "audit": ("matches.csv", "matches.parquet"),
}  # fmt: skip


class World:
    """Images, and what every command makes of them when nothing goes wrong."""

    def __init__(self, folder, codec, server):
        self.folder, self.codec, self.server = folder, codec, server
        self.images = folder / "images"
        for identity in range(24):
            (self.images / f"id{identity:02d}").mkdir(parents=True)
            for variant in range(2):
                path = self.images / f"id{identity:02d}" / f"{variant}.png"
                draw_identity(identity, variant, side=24).save(path)
        self.generated = folder / "generated"
        self.generated.mkdir()
        for number in range(6):
            draw_identity(100 + number, 0, side=24).save(self.generated / f"{number}.png")
        shutil.copy(self.images / "id00" / "0.png", self.generated / "copy.png")

    def whole(self, name):
        """Return the folder of an uninterrupted run."""
        folder = self.folder / f"whole-{name}"
        if not folder.exists():
            done = self.server.run(*self.command(name, folder), patches=SMALL_PARTS)
            assert done.code == 0, done.stderr
        return folder

    def command(self, name, output):
        listed = ("--filelist", self.images)
        measures = ("--detectors", "mse,phash", "--input-size", 16, "--workers", 1)
        options = {
            "latents": lambda: [
                *listed, "--codec", self.codec, "--size", 64, "--batch-size", 4, "--workers", 1
            ],
            "train-stage1": lambda: [
                "--latents", self.whole("latents"), "--resume", *NETWORK, *TRAINING,
                f"--set=codec.name={self.codec}",
                "--set=schedule.epochs=3", "--set=optimiser.ema_decay=0.9",
            ],
            "finetune": lambda: [
                self.whole("train-stage1") / "checkpoint.safetensors", *listed, "--resume",
                *TRAINING, "--set=schedule.epochs=3", "--set=augmentation.preset=none",
            ],
            "benchmark": lambda: [*listed, *measures],
            "robustness": lambda: [
                *listed, *measures, "--detectors", "phash", "--fit-rate", 0.3
            ],
            "index": lambda: ["build", self.images, "--detector", "phash", "--workers", 1],
            "audit": lambda: [
                self.generated, "--against", self.images, "--fpr", 0.1, "--detector", "phash",
                "--workers", 1, "--sensitivity", 2,
            ],
        }  # fmt: skip
        return ["--quiet", name, *options[name](), "-o", output]

    def check(self, name, folder):
        """Compare the results with those of the uninterrupted run."""
        assert contents(name, folder) == contents(name, self.whole(name))

    @contextlib.contextmanager
    def without(self, path):
        """Take a file away for a while."""
        data = path.read_bytes()
        try:
            yield
        finally:
            path.write_bytes(data)


def contents(name, folder):
    found = {}
    for result in RESULTS[name]:
        path = folder / result
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found |= {str(file.relative_to(folder)): file.read_bytes() for file in files}
    assert not [file for file in found if file.endswith(".tmp")]
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_codec, server):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCMEM_CACHE", str(folder / "cache"))
        world = World(folder, tiny_codec, server)
        for name in COMMANDS:
            world.whole(name)
    return world


def lines(text):
    """Return what was said beside warnings about the data."""
    found = [line for line in text.splitlines() if line.strip()]
    return [line for line in found if not line.startswith("warning: ")]


# --- signals and two writers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, signal.SIGINT) for name in COMMANDS),
        *((name, signal.SIGTERM) for name in ("latents", "train-stage1")),
    ],
)
def test_a_stopped_command_says_so_and_is_continued(world, server, tmp_path, name, number):
    output = tmp_path / "out"
    place, count = MIDDLE[name]
    command = world.command(name, output)
    # Latents are held in a decoding thread, which would be waited for.
    grace = {"lcmem_cli.cli.interrupts:GRACE_SECONDS": 0.2} if name == "latents" else {}
    patches = {**SMALL_PARTS, **grace}
    running = server.start(*command, at=(place, count, "hold"), patches=patches)
    running.wait_until_held()
    if number == signal.SIGINT:
        second = server.run(*command)
        assert second.code == 1 and len(lines(second.stderr)) == 1, second.stderr
        assert str(output) in second.stderr and "another lcmem process" in second.stderr
    running.send(number)
    stopped = running.wait()
    assert stopped.code == 128 + number, stopped.stderr
    assert stopped.stdout == ""
    assert [line[:18] for line in lines(stopped.stderr)] == ["error: interrupted"]
    assert not list(output.rglob("*.tmp"))
    again = server.run(*command, patches=SMALL_PARTS)
    assert again.code == 0, again.stderr
    world.check(name, output)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_twice_ends_with_the_same_bytes(world, server, tmp_path, name):
    command = world.command(name, tmp_path / "out")
    place, count = MIDDLE[name]
    for moment in (count, 1):  # the second time it has just gone on
        running = server.start(*command, at=(place, moment, "hold"), patches=SMALL_PARTS)
        running.wait_until_held()
        running.send(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
    again = server.run(*command, patches=SMALL_PARTS)
    assert again.code == 0, again.stderr
    world.check(name, tmp_path / "out")


def test_a_command_held_up_in_a_library_is_ended_all_the_same(world, server, tmp_path):
    command = world.command("index", tmp_path / "out")
    running = server.start(
        *command,
        at=(*MIDDLE["index"], "block"),
        patches={**SMALL_PARTS, "lcmem_cli.cli.interrupts:GRACE_SECONDS": 0.2},
    )
    running.wait_until_held()
    running.send(signal.SIGTERM)
    stopped = running.wait()
    assert stopped.code == 143 and len(lines(stopped.stderr)) == 1, stopped.stderr
    assert "interrupted" in stopped.stderr
    assert server.run(*command, patches=SMALL_PARTS).code == 0
    world.check("index", tmp_path / "out")


def test_a_process_stopped_by_its_launcher_says_so(monkeypatch):
    monkeypatch.setattr(interrupts, "_received", [signal.SIGTERM])
    assert interrupts.message().startswith("interrupted; the same command continues")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process has failed" in interrupts.message()
    monkeypatch.setattr(interrupts, "_received", [signal.SIGINT])
    assert interrupts.message().startswith("interrupted")


def test_a_fresh_process_ends_on_ctrl_c(world, tmp_path):
    output = tmp_path / "out"
    command = [str(part) for part in world.command("latents", output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lcmem_cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (output / "plan.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert [line[:18] for line in lines(stderr)] == ["error: interrupted"]


# --- disks ---------------------------------------------------------------------------------------


class SmallDisk:
    """A folder on a disk of its own where that can be had, otherwise a limit on the file size."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.mounted = self._mount("-t", "tmpfs", "-o", "size=4k", "lcmem-test")

    def _mount(self, *options):
        if os.geteuid() or not sys.platform.startswith("linux"):
            return False
        command = ["mount", *options, str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def set_size(self, size):
        """Set the size in bytes; returns the options for a command that is to notice it."""
        if self.mounted:
            assert self._mount("-o", f"remount,size={size}")
            return {}
        return {"limit": size // 4}

    def set_writable(self, writable):
        if self.mounted:
            assert self._mount("-o", f"remount,{'rw' if writable else 'ro'}")
        else:
            self.folder.chmod(0o755 if writable else 0o555)

    def close(self):
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


SMALL_SIZE = {
    "latents": 200_000,
    "train-stage1": 1_500_000,
    "benchmark": 16_384,
    "index": 8192,
    "audit": 12_288,
}


@pytest.mark.parametrize("name", list(SMALL_SIZE))
def test_a_full_disk_is_named_and_room_is_all_that_is_needed(world, server, disk, name):
    command = world.command(name, disk.folder)
    options = disk.set_size(SMALL_SIZE[name])
    full = server.run(*command, patches=SMALL_PARTS, **options)
    assert full.code == 1, full.stderr
    assert len(lines(full.stderr)) == 1 and f"error: {disk.folder}" in full.stderr, full.stderr
    assert ("No space left" if disk.mounted else "cannot be written") in full.stderr
    disk.set_size(64 << 20)
    again = server.run(*command, patches=SMALL_PARTS)
    assert again.code == 0, again.stderr
    world.check(name, disk.folder)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written_is_named(world, server, disk, name):
    if not disk.mounted and not os.geteuid():
        pytest.skip("root may write anywhere, and nothing can be mounted")
    disk.set_size(64 << 20)
    disk.set_writable(False)
    refused = server.run(*world.command(name, disk.folder / "out"), patches=SMALL_PARTS)
    disk.set_writable(True)
    assert refused.code == 2, refused.stderr
    assert len(lines(refused.stderr)) == 1 and f"{disk.folder}/out: cannot write" in refused.stderr


def test_a_cache_that_cannot_be_written_is_a_warning(world, server, disk, tmp_path, monkeypatch):
    monkeypatch.setenv("LCMEM_CACHE", str(disk.folder))
    if not disk.mounted:
        pytest.skip("a limit on the file size would hold for the results too")
    disk.set_size(4096)
    done = server.run(*world.command("audit", tmp_path / "out"))
    assert done.code == 0 and "features cannot be kept" in done.stderr, done.stderr
    world.check("audit", tmp_path / "out")


# --- inputs that vanish --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "count", "code"),
    [
        ("latents", "lcmem_cli.engine.store.latents:_encode", 1, 1),
        ("finetune", "lcmem_cli.engine.training.loop:forward_backward", 1, 1),
        ("index", "lcmem_cli.engine.store.index:Index.append", 1, 1),
        ("benchmark", "lcmem_cli.engine.evaluation.study.benchmark:embed_files", 1, 0),
        ("robustness", "lcmem_cli.engine.evaluation.study.robustness:embed_perturbed", 1, 0),
        ("audit", "lcmem_cli.engine.evaluation.audit.run:embed_set", 1, 0),
    ],
)
def test_an_image_that_vanishes_is_named(world, server, tmp_path, name, place, count, code):
    output = tmp_path / "out"
    command = world.command(name, output)
    image = world.generated / "5.png" if name == "audit" else last_test_image(world)
    with world.without(image):
        done = server.run(*command, at=(place, count, f"remove {image}"), patches=SMALL_PARTS)
        shown = done.stderr + done.stdout
        assert done.code == code, shown
        assert "Traceback" not in shown
        if name != "audit":
            assert f"{image.parent.name}/{image.name}" in shown and "no such file" in shown
        else:
            result = json.loads((output / "audit.json").read_text())
            assert [bad["path"] for bad in result["generated"]["unreadable"]] == ["5.png"]
    again = server.run(*command, patches=SMALL_PARTS)
    assert again.code == 0, again.stderr
    if name != "index":
        world.check(name, output)
        return
    found, whole = Index.open(output), Index.open(world.whole(name))  # in another order
    assert sorted(e[:3] for e in found.entries) == sorted(e[:3] for e in whole.entries)
    for entry in found.entries:
        other = next(e for e in whole.entries if e.path == entry.path)
        assert (found.features[entry.row] == whole.features[other.row]).all()


def last_test_image(world):
    """Return an image that every command reads, and not first."""
    store = LatentStore.open(world.whole("latents"))
    return world.images / store.records[store.select("TEST")[-1]].path


def test_a_shard_that_vanishes_is_named(world, server, tmp_path):
    store = tmp_path / "latents"
    shutil.copytree(world.whole("latents"), store)
    command = world.command("train-stage1", tmp_path / "out")
    command[command.index(world.whole("latents"))] = store
    shard = store / "shards" / "000004.npy"  # of TEST or later batches
    place = "lcmem_cli.engine.training.loop:Trainer.run"
    with world.without(shard):
        done = server.run(*command, at=(place, 1, f"remove {shard}"))
        assert done.code == 1 and len(lines(done.stderr)) == 1, done.stderr
        assert f"{shard}: missing or damaged" in done.stderr
    assert server.run(*command).code == 0
    world.check("train-stage1", tmp_path / "out")


# --- damage --------------------------------------------------------------------------------------


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_index_or_checkpoint_is_named(world, run_cli, tmp_path):
    store, index = tmp_path / "latents", tmp_path / "index"
    shutil.copytree(world.whole("latents"), store)
    shutil.copytree(world.whole("index"), index)
    shutil.copy(world.whole("train-stage1") / "checkpoint.safetensors", tmp_path / "c.safetensors")
    flip(store / "shards" / "000002.npy", -9)
    flip(tmp_path / "c.safetensors", -9)
    train = ["train-stage1", "--latents", store, "-o", tmp_path / "out", *NETWORK, *TRAINING]
    train.append(f"--set=codec.name={world.codec}")
    assert "000002.npy: missing or damaged" in run_cli(*train, exit_code=1).stderr
    flip(store / "index.parquet", 9)
    assert "index.parquet" in run_cli("info", store, exit_code=1).stderr
    image = world.images / "id00" / "0.png"
    query = ["index", "query", index, image]
    flip(index / "features.bin", 70)
    assert "features.bin" in run_cli(*query, exit_code=1).stderr
    flip(index / "features.bin", 70)
    run_cli(*query)
    entries = index / "segments" / "00000001.parquet"
    flip(entries, entries.stat().st_size // 3)  # names, of which a query reads those it returns
    assert (
        "00000001.parquet: missing or damaged"
        in run_cli("index", "check", index, exit_code=1).stderr
    )
    for command in (
        ["infer", image, image, "--checkpoint"],
        ["finetune", "--filelist", world.images, "-o", tmp_path / "tuned"],
        ["info"],
    ):
        refused = run_cli(*command, tmp_path / "c.safetensors", exit_code=1).stderr
        assert "c.safetensors: content does not match its fingerprint" in refused


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_training_state_is_named(world, run_cli, tmp_path, damage):
    output = tmp_path / "out"
    shutil.copytree(world.whole("train-stage1"), output)
    command = world.command("train-stage1", output)[1:]
    state = output / "state.pt"
    if damage == "flip":
        flip(state, state.stat().st_size // 2)  # a weight: torch itself does not notice
        torch.load(state, weights_only=True)
    else:
        state.write_bytes(state.read_bytes()[:-100])
    assert f"{state}: not a readable training state" in run_cli(*command, exit_code=1).stderr
    state.unlink()
    run_cli(*command)
    world.check("train-stage1", output)


@pytest.mark.parametrize("name", ["benchmark", "robustness"])
def test_a_damaged_part_of_a_study_is_made_anew(world, server, tmp_path, name):
    output = tmp_path / "out"
    shutil.copytree(world.whole(name), output)
    for part in (output / "stages").iterdir():
        flip(part, -3)
    assert server.run(*world.command(name, output)).code == 0
    world.check(name, output)


def test_a_damaged_record_of_a_run_is_named(world, run_cli, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    command = world.command("train-stage1", tmp_path / "out")[1:]
    assert "run.json: not valid JSON" in run_cli(*command, exit_code=1).stderr


# --- NaN -----------------------------------------------------------------------------------------


def poison_loss(monkeypatch, at):
    original, calls = loop.pair_loss, []

    def poisoned(*arguments, **options):
        calls.append(1)
        loss = original(*arguments, **options)
        return loss._replace(total=loss.total * float("nan")) if len(calls) == at else loss

    monkeypatch.setattr(loop, "pair_loss", poisoned)


def poison_gradient(monkeypatch, at):
    original, calls = loop.forward_backward, []

    def poisoned(network, *arguments, **options):
        calls.append(1)
        loss = original(network, *arguments, **options)
        if len(calls) == at:
            network.head.bias.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(loop, "forward_backward", poisoned)


@pytest.mark.parametrize(
    ("poison", "at", "what"),
    [  # an epoch: two steps of training and one of validation
        (poison_loss, 5, "the loss became nan at epoch 2, step 2"),
        (poison_gradient, 3, "the gradient became inf at epoch 2, step 1"),
        (poison_loss, 6, "the VAL loss became nan after epoch 2"),
    ],
)
def test_nan_stops_with_the_step_and_the_last_good_state(
    world, run_cli, tmp_path, monkeypatch, poison, at, what
):
    output = tmp_path / "out"
    command = world.command("train-stage1", output)[1:]
    with monkeypatch.context() as patch:
        poison(patch, at)
        stopped = run_cli(*command, exit_code=1)
    last = [line for line in lines(stopped.stderr) if line.startswith("error")]
    assert len(last) == 1 and what in last[0] and f"is {output / 'state.pt'}" in last[0]
    run_cli(*command)
    world.check("train-stage1", output)


def test_nan_before_any_state_names_none(world, run_cli, tmp_path, monkeypatch):
    poison_loss(monkeypatch, 1)
    command = world.command("finetune", tmp_path / "out")[1:]
    stopped = run_cli(*command, exit_code=1)
    assert "epoch 1, step 1; no good state was saved before" in stopped.stderr
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()

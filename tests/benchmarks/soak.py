"""Kill the commands of a small pipeline at random moments, continue them, and compare.

Each command is started, killed with SIGKILL after a random time, and started again in the same
folder, until it comes to its end. Then its results have to be those of a run that nothing
happened to, byte for byte, with no row lost and none twice.

    python tests/benchmarks/soak.py --kills 20
    python tests/benchmarks/soak.py --kills 20 --ranks 2      # one process of two is killed
"""

from __future__ import annotations

import argparse
import collections
import csv
import itertools
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import Server
from conftest import draw_identity, save_tiny_codec

from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.models.checkpoint import load_checkpoint
from lcmem_cli.engine.store.index import Index
from lcmem_cli.engine.store.latents import LatentStore

COMMANDS = ("latents", "train-stage1", "finetune", "index", "benchmark")
# Small parts and a state after every step, so that there is much to be killed in.
PATCHES = {
    "lcmem_cli.engine.store.latents:SHARD_RECORDS": 5,
    "lcmem_cli.engine.evaluation.indexing:IMAGES_PER_SEGMENT": 5,
    "lcmem_cli.engine.detectors.embedding:_ROUND_IMAGES": 8,
    "lcmem_cli.engine.training.state:SECONDS_BETWEEN_STATES": 0.0,
    "lcmem_cli.engine.distributed:RENDEZVOUS_SECONDS": 30.0,
}
RESULTS = {
    "latents": ("meta.json", "plan.json", "index.parquet", "shards"),
    "train-stage1": ("checkpoint.safetensors", "history.csv"),
    "finetune": ("checkpoint.safetensors", "history.csv"),
    "index": ("index.json", "features.bin", "segments"),
    "benchmark": ("scores.csv", "benchmark_results.csv", "benchmark_results.json", "stages"),
}
TRAINING = (
    *("--set=schedule.batch_size=8", "--set=runtime.device=cpu", "--set=runtime.num_workers=1"),
    *("--set=optimiser.ema_decay=0.9", "--resume"),
)
NETWORK = (
    *("--set=network.backbone=test_convnext", "--set=network.num_features=8"),
    *("--set=image.size=64", "--set=schedule.epochs=8"),
)


class Soak:
    """The data, the commands, and what they make when nothing happens.

    Args:
        folder: for everything.
        identities: how many, with three images each.
        ranks: processes that work on each command.
        seed: of the moments.
    """

    def __init__(self, folder: Path, *, identities: int, ranks: int, seed: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.random = random.Random(seed)
        os.environ["LCMEM_CACHE"] = str(folder / "cache")
        self.images = folder / "images"
        self.num_images = 3 * identities
        for identity in range(identities):
            (self.images / f"id{identity:02d}").mkdir(parents=True)
            for variant in range(3):
                path = self.images / f"id{identity:02d}" / f"{variant}.png"
                draw_identity(identity, variant, side=32).save(path)
        self.codec = save_tiny_codec(folder / "codec")
        (folder / "said").mkdir()
        self.server = Server(folder / "said")
        self.seconds: dict[str, float] = {}
        self.kills: collections.Counter[str] = collections.Counter()
        self.finished: collections.Counter[str] = collections.Counter()

    def command(self, name: str, output: Path) -> list[object]:
        """Return the arguments of a command."""
        latents = self.folder / "whole-latents"
        stage1 = self.folder / "whole-train-stage1" / "checkpoint.safetensors"
        listed = ("--filelist", self.images)
        options: dict[str, tuple[object, ...]] = {
            "latents": (*listed, "--codec", self.codec, "--size", 64, "--batch-size", 3),
            "train-stage1": (
                "--latents",
                latents,
                *NETWORK,
                *TRAINING,
                f"--set=codec.name={self.codec}",
            ),
            "finetune": (stage1, *listed, *TRAINING, "--set=schedule.epochs=4"),
            "index": ("build", self.images, "--detector", "phash"),
            "benchmark": (*listed, "--detectors", "mse,phash,ncc", "--input-size", 16),
        }
        compute = () if "--resume" in options[name] else ("--workers", 1, "--device", "cpu")
        return ["--quiet", name, *options[name], *compute, "-o", output]

    def run(self, name: str, output: Path, *, kill_after: float | None = None) -> bool:
        """Run a command; returns whether it came to its end before it was killed."""
        arguments = self.command(name, output)
        running = self.server.start_ranks(self.ranks, *arguments, patches=PATCHES)
        if kill_after is not None:
            time.sleep(kill_after)
            self.random.choice(running).send(signal.SIGKILL)  # the other ones notice
        ended = [process.wait() for process in running]
        codes = {done.code for done in ended}
        if codes == {0}:
            return True
        if kill_after is None or -signal.SIGKILL not in codes:
            raise SystemExit(f"{name} failed:\n" + "\n".join(done.stderr for done in ended))
        return False

    def make_whole(self) -> None:
        """Run everything once without interruption."""
        for name in COMMANDS:
            started = time.monotonic()
            self.run(name, self.folder / f"whole-{name}")
            self.seconds[name] = time.monotonic() - started
            self.check_rows(name, self.folder / f"whole-{name}")

    def worry(self, name: str, most: int) -> None:
        """Kill a command up to ``most`` times, let it end, and compare."""
        output = self.folder / f"killed-{name}"
        cache = tempfile.mkdtemp(prefix="cache-", dir=self.folder)  # without the features so far
        os.environ["LCMEM_CACHE"] = cache
        for _ in range(most):
            if self.run(name, output, kill_after=self.random.uniform(0, self.seconds[name])):
                self.seconds[name] *= 0.8  # the machine is faster than it was
                break
            self.kills[name] += 1
        else:
            self.run(name, output)
        self.check_rows(name, output)
        found, whole = (contents(name, f) for f in (output, self.folder / f"whole-{name}"))
        different = sorted(n for n in {*found, *whole} if found.get(n) != whole.get(n))
        if different:
            raise SystemExit(f"{name}: differs from the uninterrupted run: {', '.join(different)}")
        if list(output.rglob("*.tmp")):
            raise SystemExit(f"{name}: temporary files of killed runs are left in {output}")
        self.finished[name] += 1
        print(
            f"{name:13} ended as uninterrupted, {len(found):2} files compared; killed "
            f"{self.kills[name]:2} time(s) so far",
            flush=True,
        )
        shutil.rmtree(output)

    def check_rows(self, name: str, output: Path) -> None:
        """Refuse lost and repeated rows."""
        if name == "latents":
            store = LatentStore.open(output)
            store.verify()
            rows = [record.path for record in store.records]
            expected = self.num_images
        elif name == "index":
            rows = [entry.path for entry in Index.open(output).entries]
            expected = self.num_images
        elif name == "benchmark":
            with (output / "scores.csv").open(newline="") as file:
                table = list(csv.DictReader(file))
            numbers = [row[detector] for row in table for detector in ("mse", "phash", "ncc")]
            if not all(math.isfinite(float(number)) for number in numbers):
                raise SystemExit(f"{name}: a pair has no score")
            rows = [str(number) for number in range(len(table))]  # a pair may be drawn twice
            expected = 2 * len(load_manifest(self.images).select("TEST"))
        else:
            load_checkpoint(output / "checkpoint.safetensors")
            with (output / "history.csv").open(newline="") as file:
                rows = [row["epoch"] for row in csv.DictReader(file)]
            expected = 8 if name == "train-stage1" else 4
        if not len(rows) == len(set(rows)) == expected:
            raise SystemExit(f"{name}: {len(rows)} rows, {len(set(rows))} distinct, not {expected}")


def contents(name: str, folder: Path) -> dict[str, bytes]:
    """Return the files of a command's results."""
    paths = [folder / result for result in RESULTS[name]]
    files = [f for path in paths for f in (sorted(path.iterdir()) if path.is_dir() else [path])]
    kept = [file for file in files if not file.name.endswith(".tmp")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--identities", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="lcmem-soak-") as name:
        soak = Soak(
            Path(name), identities=options.identities, ranks=options.ranks, seed=options.seed
        )
        try:
            soak.make_whole()
            for command in itertools.cycle(COMMANDS):
                if soak.kills[command] * len(COMMANDS) < options.kills:
                    soak.worry(command, most=soak.random.randint(1, 4))
                if all(soak.kills[c] * len(COMMANDS) >= options.kills for c in COMMANDS):
                    break
        finally:
            soak.server.close()
    print(
        f"{soak.kills.total()} kills, {soak.finished.total()} commands ended as uninterrupted: "
        + ", ".join(f"{command} {soak.kills[command]}" for command in COMMANDS)
    )


if __name__ == "__main__":
    main()

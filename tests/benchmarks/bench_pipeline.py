"""What decoding, augmenting and writing add to the computing that they should hide behind.

    python tests/benchmarks/bench_pipeline.py data/filelist.csv
    python tests/benchmarks/bench_pipeline.py data/filelist.csv --codec sd --size 128 \\
        --images 32 --only-latents

Each figure is a paired comparison of the same work: ``lcmem latents`` with a loop of the codec over
decoded tensors; an epoch of stage 1 with forward and backward passes on tensors in memory; an epoch
of fine-tuning with encoding, forward and backward passes on images in memory. Both sides take
turns; the ratio of the fastest runs counts. ``--codec sd`` is a random network of the shape of
Stable Diffusion's VAE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from lcmem_cli.engine.config import (
    FinetuneConfig,
    OptimiserSection,
    SamplingSection,
    ScheduleSection,
)
from lcmem_cli.engine.data.augment import Augmentation
from lcmem_cli.engine.data.images import load_image, to_tensor
from lcmem_cli.engine.data.manifest import Manifest, load_manifest
from lcmem_cli.engine.distributed import available_cpus, keep_freed_memory
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec, SiameseNetwork
from lcmem_cli.engine.store.latents import LatentStore, encode_latents
from lcmem_cli.engine.training.loop import Pairs, Trainer
from lcmem_cli.engine.training.sampling import PairSampler
from lcmem_cli.engine.training.sources import ImageSource, LatentSource, PairSource
from lcmem_cli.engine.training.step import StepPlan, forward_backward

BATCH = 32


def stable_diffusion_shape() -> Codec:
    """Return a codec of the shape of Stable Diffusion's, with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    return Codec(model.eval(), name="random", input_range="symmetric")


def clock(run) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(whole, bare, repeats: int) -> dict[str, float]:
    """Let both take turns; ``whole`` gets the number of the turn."""
    times = [(clock(lambda turn=turn: whole(turn)), clock(bare)) for turn in range(repeats)]
    whole_time, bare_time = (min(column) for column in zip(*times, strict=True))
    return {"whole_s": whole_time, "bare_s": bare_time, "ratio": whole_time / bare_time}


class InMemory(PairSource):
    """Gives the same pair of tensors for every batch."""

    def __init__(self, pair) -> None:
        self.pair = pair

    def stream(self, batches, part):
        """Yield the pair once a batch."""
        for _ in batches:
            yield self.pair


def trainer(
    source: PairSource, manifest: Manifest, network: SiameseNetwork, folder: Path
) -> Trainer:
    """Return a trainer of one epoch over all identities."""
    sampler = PairSampler(manifest.records, SamplingSection(), batch_size=BATCH, seed=0)
    pairs = Pairs(source=source, sampler=sampler)
    config = FinetuneConfig(
        kind="finetune",
        optimiser=OptimiserSection(freeze_statistics=True),
        schedule=ScheduleSection(epochs=1, batch_size=BATCH),
    )
    return Trainer(
        network, config, train=pairs, validation=pairs, folder=folder, run_digest="benchmark"
    )


def main() -> None:
    """Compare all three and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filelist", type=Path)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--codec", choices=("embedded", "sd"), default="embedded")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-latents", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    listed = load_manifest(options.filelist)
    step = max(1, len(listed) // options.images)
    manifest = Manifest(listed.records[::step][: options.images], listed.basedir, listed.source)
    codec = stable_diffusion_shape() if options.codec == "sd" else load_codec("embedded")
    images = torch.stack([to_tensor(load_image(p), options.size) for p in manifest.paths()])
    results: dict[str, object] = {"images": len(manifest), "size": options.size}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def bare_encoding() -> None:
            for batch in images.split(16):
                codec.encode(batch)

        def store(turn: int) -> None:
            encode_latents(manifest, codec, folder / f"store{turn}", image_size=options.size)

        results["latents"] = compare(store, bare_encoding, options.repeats)
        if options.only_latents:
            print(json.dumps(results, indent=1))
            return

        first = codec.encode(images[:BATCH]).clone()
        spec = NetworkSpec(
            backbone=options.backbone,
            in_channels=first.shape[1],
            num_features=512,
            input_size=first.shape[-1],
            normalisation="sample",
            stem_stride=1,
        )
        network = SiameseNetwork(spec).to(memory_format=torch.channels_last)
        # All single images: every image is its own identity, so that all batches are full.
        unique = Manifest(
            tuple(r._replace(id=str(i)) for i, r in enumerate(manifest.records)),
            manifest.basedir,
            manifest.source,
        )
        latents = LatentSource(LatentStore.open(folder / "store0"), range(len(unique)))
        pixels = ImageSource(
            unique.paths(),
            codec,
            image_size=options.size,
            augmentation=Augmentation.from_preset("strong"),
            num_workers=available_cpus(),
        )
        fixed = trainer(InMemory((first, first)), unique, network, folder)
        steps = len(fixed.train.sampler.epoch(0))

        def bare_steps(encode: bool) -> None:
            network.train()
            for _ in range(steps):
                pair = first, first
                if encode:
                    both = torch.cat([images[:BATCH], images[:BATCH]])
                    pair = codec.encode(both).clone().chunk(2)
                forward_backward(network, fixed._loss_of, *pair, StepPlan(num_pairs=BATCH))
                fixed.adam.step()
                fixed.adam.zero_grad(set_to_none=True)

        def epoch(source: PairSource) -> None:
            trainer(source, unique, network, folder)._train_epoch()

        for what, source, encode in (("stage1", latents, False), ("finetune", pixels, True)):
            results[what] = compare(
                lambda turn, source=source: epoch(source),
                lambda encode=encode: bare_steps(encode),
                options.repeats,
            )
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

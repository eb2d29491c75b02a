"""What the steps of the paper's pipeline cost on a graphics card, each beside its bare loop.

    python tests/benchmarks/bench_gpu.py                      # 8 minutes at most, no network
    python tests/benchmarks/bench_gpu.py --small --device cpu # does it run?

All images, features and weights are random. Images are made before and held in memory, so decoding
is left out. A bare loop does the same arithmetic on tensors that are on the card already; that of
fine-tuning leaves the encoding out. Where time runs out, steps are left out and fewer queries
asked. Prints JSON; peaks are of the card's memory in GiB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from bench_pipeline import stable_diffusion_shape

from lcmem_cli.engine.detectors.lcmem import LCMemDetector, load_lcmem
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.models.siamese import NetworkSpec, SiameseNetwork
from lcmem_cli.engine.precision import (
    CHANNELS_LAST,
    AskedPrecision,
    Precision,
    computing_in,
    resolve_precision,
    to_device,
)
from lcmem_cli.engine.store import device_search
from lcmem_cli.engine.store.search import BLOCK_ROWS
from lcmem_cli.engine.training.losses import TrainingLoss, pair_loss
from lcmem_cli.engine.training.step import StepPlan, forward_backward

LIMIT_S = 460.0
MATCHES = 5


class Size(NamedTuple):
    """How much is done.

    Attributes:
        side: of an image in pixels.
        images: encoded and embedded.
        batch: images per call.
        stage1: pairs of a step of stage 1.
        finetune: pairs of a step of fine-tuning.
        steps: of training.
        queries: of the search.
        bank: rows that are searched.
        features: columns.
        backbone: that is trained.
    """

    side: int = 512
    images: int = 512
    batch: int = 16
    stage1: int = 512
    finetune: int = 64
    steps: int = 5
    queries: int = 50_000
    bank: int = 1_000_000
    features: int = 512
    backbone: str = "convnext_tiny"


SMALL = Size(
    side=32,
    images=2,
    batch=2,
    stage1=4,
    finetune=4,
    steps=1,
    queries=20,
    bank=3000,
    features=16,
    backbone="convnext_atto",
)


class Place(NamedTuple):
    """Where and in what is computed."""

    device: torch.device
    precision: Precision

    def images(self, count: int, side: int) -> torch.Tensor:
        """Return random images in the memory of the CPU."""
        return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))

    def measure(self, work: Callable[[], object], count: int) -> dict[str, float]:
        """Return how many a second a piece of work does, after a first run, and its peak."""
        work()
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work()
        if is_cuda:
            torch.cuda.synchronize()
        found = {"per_second": count / (time.perf_counter() - began)}
        if is_cuda:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found


def latents(place: Place, size: Size) -> dict[str, object]:
    """Encode images from memory with a codec of Stable Diffusion's shape."""
    codec = _codec(place, size)
    images = place.images(size.images, size.side)
    ready = images[: size.batch].to(place.device)

    def whole() -> None:
        for batch in images.split(size.batch):
            with computing_in(place.precision, place.device):
                codec.encode(to_device(batch, place.device)).cpu()

    def bare() -> None:
        for _ in range(0, size.images, size.batch):
            with computing_in(place.precision, place.device):
                codec.encode(ready)

    return _beside(place, whole, bare, size.images)


def embedding(place: Place, size: Size) -> dict[str, object]:
    """Embed images from memory with the embedded model."""
    plain = load_lcmem(device=str(place.device))
    detector = LCMemDetector(
        plain.checkpoint, name="lcmem", device=str(place.device), precision=place.precision
    )
    images = place.images(size.images, detector.input_size)
    ready = images[: size.batch].to(place.device)

    def bare() -> None:
        for _ in range(0, size.images, size.batch):
            with torch.inference_mode(), computing_in(place.precision, place.device):
                detector.network(detector.codec.encode(ready))

    def whole() -> None:
        for batch in images.split(size.batch):
            detector.embed_batch(batch)

    return _beside(place, whole, bare, size.images)


def steps(place: Place, size: Size, *, encode: bool) -> dict[str, object]:
    """Train on latents in memory, or on images that are encoded in each step."""
    codec = _codec(place, size)
    pairs = size.finetune if encode else size.stage1
    side = size.side // codec.spec.downsampling
    spec = NetworkSpec(
        backbone=size.backbone,
        in_channels=codec.spec.latent_channels,
        num_features=size.features,
        input_size=side,
        normalisation="sample",
        stem_stride=1 if side < 32 else None,
    )
    network = SiameseNetwork(spec).to(place.device)
    if place.device.type in CHANNELS_LAST:
        network = network.to(memory_format=torch.channels_last)
    adam = torch.optim.AdamW(network.parameters(), lr=1e-4)
    images = place.images(2 * pairs, size.side) if encode else None
    given = torch.randn(2 * pairs, spec.in_channels, side, side).to(place.device)

    def autocast() -> object:
        return computing_in(place.precision, place.device)

    def loss_of(a: torch.Tensor, b: torch.Tensor, head: torch.nn.Linear) -> TrainingLoss:
        loss = pair_loss(a, b, head)
        return TrainingLoss(*loss, retention=loss.total.new_zeros(()))

    def encoded() -> Iterator[torch.Tensor]:
        assert images is not None
        for batch in images.split(size.batch):
            with autocast():
                yield codec.encode(to_device(batch, place.device)).clone()

    def whole() -> None:
        for _ in range(size.steps):
            both = torch.cat(list(encoded())) if encode else given
            plan = StepPlan(num_pairs=pairs, autocast=autocast)
            forward_backward(network, loss_of, *both.chunk(2), plan)
            adam.step()
            adam.zero_grad(set_to_none=True)

    def bare() -> None:
        for _ in range(size.steps):
            with autocast():
                network(given).float().square().mean().backward()
            adam.step()
            adam.zero_grad(set_to_none=True)

    return _beside(place, whole, bare, size.steps * pairs)


def search(place: Place, size: Size, seconds: float) -> dict[str, object]:
    """Search simulated features as an audit does; the bare loop only compares and sorts.

    Where the first queries show that all would take longer than ``seconds``, fewer are asked.
    """
    rng = np.random.default_rng(0)
    bank = rng.random((size.bank, size.features), dtype=np.float32)
    queries = rng.random((size.queries, size.features), dtype=np.float32)
    weight = rng.normal(-0.5, 1, size.features).astype(np.float32)
    score = device_search.weighted_l1(weight, place.device)
    few = torch.from_numpy(queries[:2048]).to(place.device)
    part = torch.from_numpy(bank[:BLOCK_ROWS]).to(place.device)
    detector = _head(weight, place.device)

    def whole(count: int) -> dict[str, float]:
        began = time.perf_counter()
        detector.top_k(queries[:count], bank, MATCHES)
        return {"seconds": time.perf_counter() - began, "queries": count}

    def bare() -> None:
        score.matrix(few, part).topk(MATCHES, dim=1)

    first = whole(len(few))
    count = min(size.queries, int(len(few) * max(1.0, seconds / first["seconds"])))
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = whole(count)
    found["per_second"] = count * size.bank / found["seconds"]
    if place.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {"whole": found, "bare": place.measure(bare, len(few) * len(part))}


def _head(weight: np.ndarray, device: torch.device) -> LCMemDetector:
    detector = load_lcmem(device=str(device))
    detector.weight, detector.bias = weight, 0.0
    return detector


def _codec(place: Place, size: Size) -> Codec:
    if size is SMALL:
        from lcmem_cli.engine.models.codec_loading import load_codec

        return load_codec("embedded", device=place.device)
    model = stable_diffusion_shape().model
    return Codec(model, name="random", device=place.device)


def _beside(
    place: Place, whole: Callable[[], object], bare: Callable[[], object], count: int
) -> dict[str, object]:
    found = {"whole": place.measure(whole, count), "bare": place.measure(bare, count)}
    ratio = found["bare"]["per_second"] / found["whole"]["per_second"]
    return {**found, "time_ratio": ratio}


def main() -> None:
    """Run all and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    options = parser.parse_args()
    asked: AskedPrecision = options.precision
    device = torch.device(options.device)
    place = Place(device, resolve_precision(asked, device))
    size = SMALL if options.small else Size()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    results: dict[str, object] = {
        "device": name,
        "precision": place.precision,
        "size": size._asdict(),
    }
    began = time.perf_counter()
    for what, work in {
        "latents": lambda: latents(place, size),
        "embedding": lambda: embedding(place, size),
        "stage1": lambda: steps(place, size, encode=False),
        "finetune": lambda: steps(place, size, encode=True),
        "search": lambda: search(place, size, (LIMIT_S - time.perf_counter() + began) / 2),
    }.items():
        if time.perf_counter() - began > LIMIT_S / 2:
            results[what] = "left out: the time is up"
            continue
        results[what] = work()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

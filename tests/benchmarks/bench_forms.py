"""Images per second of the embedded model in every form that was tried, in turn.

    python tests/benchmarks/bench_forms.py

The form in use is the first. ``onnx`` needs the extra [onnx]. Prints a table in Markdown with the
largest difference of a feature from the form in use.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lcmem_cli import load_detector
from lcmem_cli.engine.models.siamese import normalise


def main() -> None:
    """Time all forms on the same random images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    detector = load_detector("lcmem")
    size = detector.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch_size, 3, size, size, generator=generator)
    plain = detector.checkpoint.build().requires_grad_(False)
    folded = detector.network

    def run(network, *, pieces=8, channels_last=True):
        latents = detector.codec.encode(images, together=pieces)
        if not channels_last:
            how, mean, std = network.spec.normalisation, network.mean, network.std
            inputs = normalise(latents, how, mean=mean, std=std)
            inputs = inputs.flip(2, 3) if network.is_mirrored else inputs
            return network.features(inputs.contiguous()).numpy()
        return network(latents).numpy()

    def threads(count):
        def form():
            torch.set_num_threads(count)
            try:
                return detector.embed_batch(images)
            finally:
                torch.set_num_threads(cores)

        return form

    cores = torch.get_num_threads()
    compiled = torch.compile(folded)
    forms = {
        "in use: folded, network channels last, codec in eights": lambda: detector.embed_batch(
            images
        ),
        "codec one by one": lambda: run(folded, pieces=1),
        "codec in one batch": lambda: run(folded, pieces=options.batch_size),
        "neither normalisation nor padding folded": lambda: run(plain),
        "contiguous instead of channels last": lambda: run(
            folded.to(memory_format=torch.contiguous_format), channels_last=False
        ),
        "torch.compile": lambda: run(compiled),
        "one thread": threads(1),
    }
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        if onnxruntime is not None:
            from lcmem_cli.engine.detectors.export import export_checkpoint

            path = Path(name) / "model.onnx"
            export_checkpoint("embedded", path)
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = cores
            # Its threads would go on spinning in the time of the form that comes next.
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(str(path), settings)
            forms["ONNX Runtime"] = lambda: session.run(None, {"images": images.numpy()})[0]
        expected = None
        best, difference = {}, {}
        for _ in range(options.repeats):
            for form, call in forms.items():
                if form.startswith("contiguous"):
                    folded.to(memory_format=torch.contiguous_format)
                else:
                    folded.to(memory_format=torch.channels_last)
                if form not in best:
                    features = call()  # compile, and touch the memory
                    expected = features if expected is None else expected
                    difference[form] = float(np.abs(features - expected).max())
                began = time.perf_counter()
                call()
                rate = options.batch_size / (time.perf_counter() - began)
                best[form] = max(best.get(form, 0.0), rate)
    reference = next(iter(best.values()))
    print(f"| form ({size} px, {cores} threads) | images/s | ratio | largest difference |")
    print("| --- | --- | --- | --- |")
    for form, rate in best.items():
        print(f"| {form} | {rate:.0f} | {rate / reference:.2f} | {difference[form]:.0e} |")


if __name__ == "__main__":
    main()

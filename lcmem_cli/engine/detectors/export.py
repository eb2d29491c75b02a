"""Exporting a detector's network for other programs: ONNX and ``torch.export``."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lcmem_cli.engine.detectors.lcmem import LCMemDetector, load_lcmem
from lcmem_cli.engine.detectors.onnx import open_session
from lcmem_cli.engine.errors import InputError, LcmemError, MissingExtraError, first_line
from lcmem_cli.engine.files import atomic_path, check_writable, sha256_bytes
from lcmem_cli.engine.models.codec import Codec
from lcmem_cli.engine.models.export_header import EXPORT_KEY, ExportHeader
from lcmem_cli.engine.models.siamese import SiameseNetwork
from lcmem_cli.engine.reporter import SILENT, Reporter
from lcmem_cli.engine.results import Result

Format = Literal["onnx", "pt2"]

TOLERANCE = 1e-4
HEADER_FILE = "lcmem.json"
INPUT, OUTPUT = "images", "features"
_BATCH = "N"
_CHECK_BATCHES = [1, 3]
_MAX_ONNX_BYTES = (2 << 30) - (1 << 20)  # a protobuf message ends at 2 GiB
_NOT_COMPARED = (
    "onnxruntime is not installed, so the export was not compared with the checkpoint "
    "(pip install 'lcmem[onnx]')"
)
_SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """A network that was exported.

    Attributes:
        path: the file.
        format: ``onnx`` or ``pt2``.
        num_bytes: its size.
        sha256: of its content.
        fingerprint: of the checkpoint.
        image_size: side in pixels of the images that the network takes.
        num_features: numbers in a feature row.
        opset: of ONNX, ``None`` for ``pt2``.
        num_checked: images whose features were compared with those of the checkpoint.
        max_difference: the largest difference of a feature, ``None`` if nothing could compare.
        tolerance: largest difference that is allowed.
    """

    path: str
    format: Format
    num_bytes: int
    sha256: str
    fingerprint: str
    image_size: int
    num_features: int
    opset: int | None
    num_checked: int
    max_difference: float | None
    tolerance: float


class _Exported(nn.Module):
    """Codec and network as one module, from images in [0, 1] to features."""

    def __init__(self, codec: Codec, network: SiameseNetwork) -> None:
        super().__init__()
        self.codec = codec
        self.encoder = codec.encoder
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(self.codec.forward(images))
        return features


def export_checkpoint(
    checkpoint: str | Path | None,
    output: Path,
    *,
    codec: str | None = None,
    reporter: Reporter = SILENT,
) -> ExportResult:
    """Export codec and network as one file that needs no lcmem.

    The network takes ``images [N, 3, S, S]`` (float32 in [0, 1], resized) and returns ``features
    [N, n]``. Head and thresholds are in the file as JSON, see ``ExportHeader``: in the metadata of
    ONNX under ``lcmem``, in a ``.pt2`` archive as the extra file ``lcmem.json``. The file is
    written only if its features are those of the checkpoint.

    Args:
        checkpoint: its name, see ``locate_checkpoint``.
        output: ``*.onnx`` or ``*.pt2``.
        codec: folder or hub id, where the checkpoint does not hold it.
        reporter: receives warnings.

    Raises:
        InputError: another suffix, a network too large for ONNX, or no exporter for it.
        WeightsUnavailableError: checkpoint or codec are not on this machine.
        LcmemError: the network cannot be traced, or the export computes something else.
    """
    kind = _check_output(output)
    detector = load_lcmem(checkpoint, codec=codec, device="cpu")
    header = _header_of(detector)
    batches = _random_batches(detector.input_size)
    expected = [detector.embed_batch(batch) for batch in batches]  # before memory formats change
    program = _trace(detector, kind)
    opset, run = None, None
    if kind == "pt2":
        content = _to_archive(program, header)
        run = _archive_runner(content)
    else:
        content, opset = _to_onnx(program, header)
        if find_spec("onnxruntime"):
            run = _onnx_runner(content)
        else:
            reporter.warn(_NOT_COMPARED)
    difference = None
    if run is not None:
        difference = _difference([run(batch) for batch in batches], expected)
        _check_difference(difference, detector.name, output)
    with atomic_path(output) as temporary:
        temporary.write_bytes(content)
    return ExportResult(
        path=str(output),
        format=kind,
        num_bytes=len(content),
        sha256=sha256_bytes(content),
        fingerprint=detector.fingerprint,
        image_size=detector.input_size,
        num_features=detector.num_features,
        opset=opset,
        num_checked=0 if run is None else sum(len(batch) for batch in batches),
        max_difference=difference,
        tolerance=TOLERANCE,
    )


def _check_output(output: Path) -> Format:
    kind = _SUFFIXES.get(output.suffix.lower())
    if kind is None:
        raise InputError(f"{output}: expected a file name that ends in {' or '.join(_SUFFIXES)}")
    if kind == "onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise MissingExtraError("export to ONNX", "onnx")
    check_writable(output)
    return kind


def _header_of(detector: LCMemDetector) -> ExportHeader:
    return ExportHeader(
        fingerprint=detector.fingerprint,
        image_size=detector.input_size,
        head_weight=tuple(float(weight) for weight in detector.weight),
        head_bias=detector.bias,
        thresholds=detector.thresholds,
        codec=detector.codec.spec.describe(),
        adapted_to=tuple(sorted(detector.adapted_to)),
    )


def _random_batches(size: int) -> list[torch.Tensor]:
    """Return images in batches of one and of more: patterns of several sizes, one of them on black.

    A plain background is what sums of low precision show in.
    """
    generator = torch.Generator().manual_seed(0)
    images = []
    for index in range(sum(_CHECK_BATCHES)):
        side = max(2, size >> (2 * index))
        noise = torch.rand(1, 3, side, side, generator=generator)
        images.append(nn.functional.interpolate(noise, size=(size, size), mode="bilinear"))
    images[-1][:, :, size // 2 :] = 0
    return list(torch.split(torch.cat(images), _CHECK_BATCHES))


class _StagedGroupNorm(nn.Module):
    """Group normalisation that averages a row, then the rows, then the channels.

    ONNX Runtime adds up a whole group in the order of memory, and what that loses is as much as the
    deviation of an image with a plain background: features then differed by up to 1e-3.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        groups = torch.unflatten(maps, 1, (norm.num_groups, -1))
        centred = groups - _staged_mean(groups)
        deviation = (_staged_mean(centred.square()) + norm.eps).sqrt()
        alike: torch.Tensor = (centred / deviation).flatten(1, 2)
        if norm.weight is None:
            return alike
        each = (-1, *[1] * (maps.ndim - 2))  # the attention of a codec brings one axis, not two
        return alike * norm.weight.view(each) + norm.bias.view(each)


def _staged_mean(groups: torch.Tensor) -> torch.Tensor:
    """Average ``[B, G, C, ...]`` to ``[B, G, 1, ...]``, axis by axis from the last."""
    for axis in range(groups.ndim - 1, 1, -1):
        groups = groups.mean(axis, keepdim=True)
    return groups


def _stage_group_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.GroupNorm:  # those of timm that derive from it do more
            setattr(module, name, _StagedGroupNorm(child))
        else:
            _stage_group_norms(child)


def _trace(detector: LCMemDetector, kind: Format) -> torch.export.ExportedProgram:
    """Trace codec and network with a batch of any size.

    Raises:
        LcmemError: something in them cannot be traced.
    """
    module = _Exported(detector.codec, detector.network).eval()
    if kind == "onnx":
        module = copy.deepcopy(module)
        _stage_group_norms(module)
    module.to(memory_format=torch.contiguous_format)  # what a file is expected to hold
    size = detector.input_size
    try:
        with torch.no_grad():
            program = torch.export.export(
                module,
                (torch.full((2, 3, size, size), 0.5),),
                dynamic_shapes={INPUT: {0: torch.export.Dim(_BATCH)}},
            )
    except Exception as error:  # the tracer raises whatever it meets in a model
        raise LcmemError(
            f"{detector.name}: its network cannot be traced for export: {first_line(error)}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names paths on this machine
    return program


def _to_onnx(program: torch.export.ExportedProgram, header: ExportHeader) -> tuple[bytes, int]:
    """Return an ONNX file with its weights inside, and its opset."""
    num_bytes = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if num_bytes > _MAX_ONNX_BYTES:
        raise InputError(
            f"a network of {num_bytes / 2**30:.1f} GiB does not fit into one ONNX file (2 GiB); "
            "export to .pt2"
        )
    try:
        exported = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
        assert exported is not None
        model: Any = exported.model_proto
    except Exception as error:  # the exporter raises whatever it meets in a model
        raise LcmemError(f"the network cannot be exported to ONNX: {first_line(error)}") from error
    _tidy(model)
    model.metadata_props.add(key=EXPORT_KEY, value=header.to_json())
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return model.SerializeToString(deterministic=True), int(opset)


def _tidy(model: Any) -> None:
    """Remove what the exporter notes for its developers, and name the axis of the batch."""
    graph = model.graph
    del graph.value_info[:]
    del graph.metadata_props[:]
    for entry in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""
    for entry in (*graph.input, *graph.output):
        entry.type.tensor_type.shape.dim[0].dim_param = _BATCH


def _onnx_runner(content: bytes) -> Callable[[torch.Tensor], NDArray[np.float32]]:
    session = open_session(content, source="the exported network")

    def run(batch: torch.Tensor) -> NDArray[np.float32]:
        features: NDArray[np.float32] = session.run([OUTPUT], {INPUT: batch.numpy()})[0]
        return features

    return run


def _to_archive(program: torch.export.ExportedProgram, header: ExportHeader) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={HEADER_FILE: header.to_json()})
    return buffer.getvalue()


def _archive_runner(content: bytes) -> Callable[[torch.Tensor], NDArray[np.float32]]:
    module = torch.export.load(io.BytesIO(content)).module()

    @torch.no_grad()
    def run(batch: torch.Tensor) -> NDArray[np.float32]:
        features: NDArray[np.float32] = module(batch).numpy()
        return features

    return run


def _check_difference(difference: float, name: str, output: Path) -> None:
    if not difference <= TOLERANCE:  # NaN too
        raise LcmemError(
            f"{output}: not written: the exported network's features differ from those of {name} "
            f"by up to {difference:.3g} (allowed: {TOLERANCE:g}); try the other format, or another "
            "version of torch"
        )


def _difference(found: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> float:
    differences = [np.abs(a - b).max() for a, b in zip(found, expected, strict=True)]
    return float(np.max(differences))

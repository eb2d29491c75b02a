"""ONNX files: graphs of fixed operators, other people's and those of ``lcmem export``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.detectors.external import (
    FileDetector,
    choose_output,
    read_file,
    size_unknown,
)
from lcmem_cli.engine.detectors.head import HeadDetector
from lcmem_cli.engine.detectors.kinds import Request
from lcmem_cli.engine.distributed import available_cpus, resolve_device
from lcmem_cli.engine.errors import CheckpointError, InputError, MissingExtraError, first_line
from lcmem_cli.engine.models.export_header import EXPORT_KEY, ExportHeader


def build(request: Request) -> Detector:
    """Load an ONNX file; an export of lcmem is scored by its own head unless ``score`` is given.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: see ``OnnxDetector``.
        CheckpointError: not ONNX, or the header of the export is damaged.
    """
    network = OnnxDetector(request)
    if network.header is None or "score" in request.options:
        return network
    return ExportedDetector(network, network.header)


def load_export(request: Request) -> ExportedDetector:
    """Load an ONNX file that lcmem has exported; options of the name are not the file's.

    Raises:
        InputError: another ONNX file; or see ``build``.
        MissingExtraError: see ``build``.
        CheckpointError: see ``build``.
    """
    found = build(dataclasses.replace(request, options={}))
    if not isinstance(found, ExportedDetector):
        raise InputError(
            f"detector '{request.name}': {request.target} was not made by lcmem export"
        )
    return found


class OnnxDetector(FileDetector):
    """An ONNX file that takes images and returns feature vectors.

    The options ``size`` and ``layout`` are read from the file where it states them. An export of
    lcmem is fed [0, 1] and takes neither ``mean`` nor ``std``.

    Args:
        request: whose target is the model, with its weights inside. Device ``mps`` computes on the
            CPU.

    Attributes:
        header: what an export of lcmem says of itself, ``None`` for other files.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: no such file, no size, or an output that is not one vector per image.
        CheckpointError: not ONNX, or its weights are not inside.
    """

    def __init__(self, request: Request) -> None:
        name, options = request.name, request.options
        try:
            import onnx
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(f"detector '{name}'", "onnx") from error
        content = read_file(request)
        try:
            model = onnx.load_model_from_string(content)
        except Exception as error:  # protobuf's errors differ between its versions
            raise CheckpointError(
                f"{request.target}: cannot be loaded as ONNX: {first_line(error)}"
            ) from error
        _check_inside(model, source=request.target)
        del model
        self.session = open_session(content, source=request.target, device=request.device)
        header = self.session.get_modelmeta().custom_metadata_map.get(EXPORT_KEY)
        self.header = None
        if header is not None:
            self.header = ExportHeader.from_json(header, source=request.target)
            options = _exported_options(options, name)
        self.input = self._only_input(name)
        shape = list(self.input.shape)
        self.fixed_batch = shape[0] if isinstance(shape[0], int) else None
        self.precision = np.float16 if self.input.type == "tensor(float16)" else np.float32
        layout = _layout(shape, options.get("layout"), name)
        outputs = [output.name for output in self.session.get_outputs()]
        super().__init__(
            request,
            content,
            size=_size(shape, layout, options.get("size"), name),
            layout=layout,
            output=choose_output(outputs, options.get("output"), name),
            options=options,
        )

    def run(self, inputs: torch.Tensor) -> Any:
        """Run the network, in batches of its own size where it has one."""
        values = inputs.numpy().astype(self.precision)
        step = self.fixed_batch or len(values)
        rows = []
        for start in range(0, len(values), step):
            part = values[start : start + step]
            padding = np.zeros((step - len(part), *part.shape[1:]), dtype=part.dtype)
            whole = np.concatenate([part, padding])
            try:
                found = self.session.run([self.output], {self.input.name: whole})[0]
            except Exception as error:  # onnxruntime has no common base for its errors
                raise self.refused(inputs, first_line(error)) from error
            rows.append(found[: len(part)])
        return np.concatenate(rows)

    def _only_input(self, name: str) -> Any:
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shapes = ", ".join(f"{each.name} {each.shape}" for each in inputs)
            raise InputError(
                f"detector '{name}': needs one input of four axes, the file has {shapes}"
            )
        return inputs[0]


class ExportedDetector(HeadDetector):
    """An ONNX file made by ``lcmem export``, scored by the head in it.

    Args:
        network: what embeds.
        header: from its file. The thresholds in it are taken over: the export was compared with
            the checkpoint that they were fitted for.

    Attributes:
        exported_from: fingerprint of that checkpoint.

    Raises:
        CheckpointError: network and header do not fit together.
    """

    def __init__(self, network: OnnxDetector, header: ExportHeader) -> None:
        sizes = (network.input_size, network.num_features)
        if sizes != (header.image_size, len(header.head_weight)):
            raise CheckpointError(
                f"detector '{network.name}': its network takes {sizes[0]} pixels and makes "
                f"{sizes[1]} features, its header says {header.image_size} and "
                f"{len(header.head_weight)}: the file was edited; export the checkpoint again"
            )
        self.network = network
        self.name = network.name
        self.fingerprint = network.fingerprint
        self.exported_from = header.fingerprint
        self.adapted_to = frozenset(header.adapted_to)
        self.input_size, self.num_features = sizes
        self.weight = np.array(header.head_weight, dtype=np.float32)
        self.bias = header.head_bias
        self.thresholds = tuple(
            dataclasses.replace(threshold, fingerprint=self.fingerprint)
            for threshold in header.thresholds
            if threshold.fingerprint == header.fingerprint
        )

    def embed_batch(self, batch: torch.Tensor) -> FloatArray:
        """Embed ``[n, 3, input_size, input_size]`` in [0, 1] to float32 ``[n, num_features]``."""
        return self.network.embed_batch(batch)


def _check_inside(message: Any, *, source: str) -> None:
    """Refuse a model that keeps tensors in other files.

    onnxruntime would look for them in the working folder, and they are not in the fingerprint. They
    are looked for in the whole message, so in every subgraph, function and attribute.

    Raises:
        CheckpointError: naming the first.
    """
    for field, value in message.ListFields():
        if field.name == "external_data" or (field.name == "data_location" and value):
            entries = {entry.key: entry.value for entry in message.external_data}
            raise CheckpointError(
                f"{source}: tensor '{message.name}' lies in another file "
                f"({entries.get('location', 'not named')}); its weights must be inside the file: "
                "onnx.save_model(onnx.load(PATH), TARGET)"
            )
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                _check_inside(child, source=source)


def open_session(content: bytes, *, source: str, device: str = "cpu") -> Any:
    """Open an ONNX model with onnxruntime.

    Args:
        content: the model; so it is what was checked, whatever becomes of its file.
        source: for messages.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps`` (which computes on the CPU).

    Raises:
        CheckpointError: not ONNX.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = available_cpus()
    settings.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if resolve_device(device).startswith("cuda"):
        available = onnxruntime.get_available_providers()
        providers = [*({"CUDAExecutionProvider"} & set(available)), *providers]
    try:
        return onnxruntime.InferenceSession(content, settings, providers=providers)
    except Exception as error:  # onnxruntime has no common base for its errors
        raise CheckpointError(f"{source}: cannot be loaded as ONNX: {first_line(error)}") from error


def _exported_options(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the options with which an export of lcmem is fed images as they are.

    Raises:
        InputError: one was given that would feed it something else.
    """
    for key in ("mean", "std", "channels"):
        if key in options:
            raise InputError(
                f"detector '{name}': the file is an export of lcmem, which takes RGB images in "
                f"[0, 1]; leave {key} out"
            )
    return {**options, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def _layout(shape: list[Any], wanted: str | None, name: str) -> str:
    stated = "nchw" if shape[1] == 3 else "nhwc" if shape[3] == 3 else None
    if wanted and stated and wanted != stated:
        raise InputError(
            f"detector '{name}': the file's input has the shape {shape}, which is {stated}, "
            f"not {wanted}"
        )
    return wanted or stated or "nchw"


def _size(shape: list[Any], layout: str, wanted: int | None, name: str) -> int:
    height, width = shape[2:4] if layout == "nchw" else shape[1:3]
    stated = next((side for side in (height, width) if isinstance(side, int)), None)
    if isinstance(height, int) and isinstance(width, int) and height != width:
        raise InputError(f"detector '{name}': its input of {height} x {width} is not square")
    if wanted and stated and wanted != stated:
        raise InputError(f"detector '{name}': its input has {stated} pixels a side, not {wanted}")
    size = wanted or stated
    if not size:
        raise size_unknown(name)
    return size

"""Networks that a user brings as one file: TorchScript and ONNX, such as SSCD (Pizzi et al. 2022).

A TorchScript file holds a program. It is run by torch's own interpreter, which knows torch's
operators and nothing of Python, so it is far from the freedom of a pickle; still, use files only
from those you trust. An ONNX file holds a graph of fixed operators. A plain pickle is never loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcmem_cli.engine.detectors.base import Detector, FloatArray
from lcmem_cli.engine.detectors.head import EXPORT_KEY, ExportHeader, HeadDetector
from lcmem_cli.engine.detectors.vectors import NetworkDetector, Preprocessing, check_features
from lcmem_cli.engine.distributed import available_cpus, resolve_device
from lcmem_cli.engine.errors import CheckpointError, InputError, MissingExtraError, first_line
from lcmem_cli.engine.files import sha256_bytes, sha256_file


class TorchScriptDetector(NetworkDetector):
    """A TorchScript file that takes images and returns feature vectors.

    Args:
        path: made by ``torch.jit.save``.
        name: how the user named it.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        options: see ``read_options``; ``size`` is needed, ``mean`` and ``std`` are ImageNet's by
            default.

    Raises:
        InputError: no such file, no size, or an output that is not one vector per image.
        CheckpointError: not TorchScript.
    """

    def __init__(
        self, path: Path, *, name: str, device: str = "auto", options: Mapping[str, Any]
    ) -> None:
        _check_file(path, name)
        _check_torchscript(path)
        self.device = torch.device(resolve_device(device))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # files of this kind will be around
                load: Any = torch.jit.load
                self.model: Any = load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be loaded as TorchScript: {first_line(error)}"
            ) from error
        if "size" not in options:
            raise InputError(
                f"detector '{name}': the size of its input is not in the file; add ?size=PIXELS "
                "(288 for SSCD)"
            )
        self.layout = options.get("layout", "nchw")
        self.output = options.get("output")
        self.preprocessing = _preprocessing(options, int(options["size"]))
        self.name = name
        probe = torch.full((1, 3, self.preprocessing.size, self.preprocessing.size), 0.5)
        features = check_features(self.forward(probe), 1, None, source=f"detector '{name}'")
        super().__init__(
            name=name,
            fingerprint=_fingerprint(sha256_file(path), self.preprocessing, options),
            preprocessing=self.preprocessing,
            num_features=features.shape[1],
            likeness=options.get("score", "cosine"),
        )

    @torch.inference_mode()
    def forward(self, batch: torch.Tensor) -> Any:
        """Run the network: ``[n, 3, size, size]`` in [0, 1] to ``[n, num_features]``."""
        inputs = self.preprocessing.apply(batch.to(self.device, torch.float32))
        if self.layout == "nhwc":
            inputs = inputs.permute(0, 2, 3, 1).contiguous()
        try:
            found = self.model(inputs)
        except RuntimeError as error:
            raise InputError(
                f"detector '{self.name}': the network refuses an input of the shape "
                f"{list(inputs.shape)}: {str(error).strip().splitlines()[-1]}"
            ) from error
        return self._choose(found)

    def _choose(self, found: Any) -> Any:
        """Return the wanted one of several outputs."""
        if isinstance(found, torch.Tensor):
            return found
        names = list(found) if isinstance(found, dict) else [str(i) for i in range(len(found))]
        if self.output is None and len(names) == 1:
            return found[names[0]] if isinstance(found, dict) else found[0]
        if self.output not in names:
            raise InputError(
                f"detector '{self.name}': the network has the outputs {', '.join(names)}; choose "
                "one with ?output="
            )
        return found[self.output] if isinstance(found, dict) else found[int(self.output)]


def load_onnx(path: Path, *, name: str, device: str, options: Mapping[str, Any]) -> Detector:
    """Load an ONNX file; an export of lcmem is scored by its own head unless ``score`` is given.

    Args:
        path: the model, with its weights inside.
        name: how the user named it.
        device: see ``OnnxDetector``.
        options: see ``OnnxDetector``.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: see ``OnnxDetector``.
        CheckpointError: not ONNX, or the header of the export is damaged.
    """
    network = OnnxDetector(path, name=name, device=device, options=options)
    if network.header is None or "score" in options:
        return network
    return ExportedDetector(network, network.header)


def load_onnx_export(path: Path, *, name: str, device: str) -> ExportedDetector:
    """Load an ONNX file that lcmem has exported.

    Raises:
        InputError: another ONNX file; or see ``load_onnx``.
        MissingExtraError: see ``load_onnx``.
        CheckpointError: see ``load_onnx``.
    """
    found = load_onnx(path, name=name, device=device, options={})
    if not isinstance(found, ExportedDetector):
        raise InputError(f"detector '{name}': {path} was not made by lcmem export")
    return found


class OnnxDetector(NetworkDetector):
    """An ONNX file that takes images and returns feature vectors.

    Args:
        path: the model, with its weights inside.
        name: how the user named it.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps`` (which computes on the CPU).
        options: see ``read_options``; ``size`` and ``layout`` are read from the file where it
            states them, ``mean`` and ``std`` are ImageNet's by default. An export of lcmem is fed
            [0, 1] and takes neither.

    Attributes:
        header: what an export of lcmem says of itself, ``None`` for other files.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: no such file, no size, or an output that is not one vector per image.
        CheckpointError: not ONNX.
    """

    def __init__(
        self, path: Path, *, name: str, device: str = "auto", options: Mapping[str, Any]
    ) -> None:
        _check_onnxruntime(f"detector '{name}'")
        _check_file(path, name)
        content = path.read_bytes()
        self.session = open_session(content, source=str(path), device=device)
        self.header = _exported_header(self.session, source=str(path))
        if self.header is not None:
            options = _exported_options(options, name)
        self.name = name
        self.input = self._only_input()
        shape = list(self.input.shape)
        self.layout = _layout(shape, options.get("layout"), name)
        self.fixed_batch = shape[0] if isinstance(shape[0], int) else None
        self.precision = np.float16 if self.input.type == "tensor(float16)" else np.float32
        self.output = self._output_name(options.get("output"))
        self.preprocessing = _preprocessing(
            options, _onnx_size(shape, self.layout, options.get("size"), name)
        )
        probe = torch.full((1, 3, self.preprocessing.size, self.preprocessing.size), 0.5)
        features = check_features(self.forward(probe), 1, None, source=f"detector '{name}'")
        super().__init__(
            name=name,
            fingerprint=_fingerprint(sha256_bytes(content), self.preprocessing, options),
            preprocessing=self.preprocessing,
            num_features=features.shape[1],
            likeness=options.get("score", "cosine"),
        )

    def forward(self, batch: torch.Tensor) -> Any:
        """Run the network: ``[n, 3, size, size]`` in [0, 1] to ``[n, num_features]``."""
        inputs = self.preprocessing.apply(batch.to("cpu", torch.float32)).numpy()
        if self.layout == "nhwc":
            inputs = inputs.transpose(0, 2, 3, 1)
        inputs = np.ascontiguousarray(inputs, dtype=self.precision)
        step = self.fixed_batch or len(inputs)
        rows = []
        for start in range(0, len(inputs), step):
            part = inputs[start : start + step]
            padding = np.zeros((step - len(part), *part.shape[1:]), dtype=part.dtype)
            rows.append(self._run(np.concatenate([part, padding]))[: len(part)])
        return np.concatenate(rows)

    def _run(self, inputs: Any) -> Any:
        try:
            return self.session.run([self.output], {self.input.name: inputs})[0]
        except Exception as error:  # onnxruntime has no common base for its errors
            raise InputError(
                f"detector '{self.name}': the network refuses an input of the shape "
                f"{list(inputs.shape)}: {first_line(error)}"
            ) from error

    def _only_input(self) -> Any:
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shapes = ", ".join(f"{each.name} {each.shape}" for each in inputs)
            raise InputError(
                f"detector '{self.name}': needs one input of four axes, the file has {shapes}"
            )
        return inputs[0]

    def _output_name(self, wanted: str | None) -> str:
        names = [output.name for output in self.session.get_outputs()]
        if wanted is None and len(names) == 1:
            return str(names[0])
        if wanted not in names:
            raise InputError(
                f"detector '{self.name}': the network has the outputs {', '.join(names)}; choose "
                "one with ?output="
            )
        return str(wanted)


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


def open_session(content: bytes, *, source: str, device: str = "cpu") -> Any:
    """Open an ONNX model with onnxruntime.

    Args:
        content: the model. It is not read from its path, so that it cannot read other files as
            its weights.
        source: for messages.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps`` (which computes on the CPU).

    Raises:
        CheckpointError: not ONNX, or its weights are not inside.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = available_cpus()
    settings.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if resolve_device(device).startswith("cuda"):
        providers = [*_cuda(onnxruntime.get_available_providers()), *providers]
    try:
        return onnxruntime.InferenceSession(content, settings, providers=providers)
    except Exception as error:  # onnxruntime has no common base for its errors
        raise CheckpointError(
            f"{source}: cannot be loaded as ONNX (its weights must be inside the file): "
            f"{first_line(error)}"
        ) from error


def _check_onnxruntime(what: str) -> None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(what, "onnx") from error


def _exported_header(session: Any, *, source: str) -> ExportHeader | None:
    text = session.get_modelmeta().custom_metadata_map.get(EXPORT_KEY)
    return None if text is None else ExportHeader.from_json(text, source=source)


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


def _check_file(path: Path, name: str) -> None:
    if not path.is_file():
        raise InputError(f"detector '{name}': no such file: {path}")


def _check_torchscript(path: Path) -> None:
    """Refuse everything but the archive that ``torch.jit.save`` writes.

    Raises:
        CheckpointError: saying what the file seems to be.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not TorchScript (an archive made by torch.jit.save). If it is a pickle, "
            "loading it would execute code from the file; export the network with torch.jit.trace"
        )
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" not in names or not any(name.startswith("code/") for name in names):
        raise CheckpointError(
            f"{path}: a file of torch.save, not TorchScript: it holds weights but no network. "
            "Weights of a timm model: timm:NAME?weights=FILE; others: export the network with "
            "torch.jit.trace"
        )


def _preprocessing(options: Mapping[str, Any], size: int) -> Preprocessing:
    given = {key: options[key] for key in ("mean", "std", "channels") if key in options}
    return Preprocessing(size=size, **given)


def _fingerprint(content: str, preprocessing: Preprocessing, options: Mapping[str, Any]) -> str:
    """Hash the file and all that changes what it is fed or how its output is used."""
    rest = {key: options.get(key) for key in ("layout", "output", "score")}
    return hashlib.sha256(f"{content}/{preprocessing}/{sorted(rest.items())}".encode()).hexdigest()


def _layout(shape: list[Any], wanted: str | None, name: str) -> str:
    stated = "nchw" if shape[1] == 3 else "nhwc" if shape[3] == 3 else None
    if wanted and stated and wanted != stated:
        raise InputError(
            f"detector '{name}': the file's input has the shape {shape}, which is {stated}, "
            f"not {wanted}"
        )
    return wanted or stated or "nchw"


def _onnx_size(shape: list[Any], layout: str, wanted: int | None, name: str) -> int:
    height, width = shape[2:4] if layout == "nchw" else shape[1:3]
    stated = next((side for side in (height, width) if isinstance(side, int)), None)
    if isinstance(height, int) and isinstance(width, int) and height != width:
        raise InputError(f"detector '{name}': its input of {height} x {width} is not square")
    if wanted and stated and wanted != stated:
        raise InputError(f"detector '{name}': its input has {stated} pixels a side, not {wanted}")
    size = wanted or stated
    if not size:
        raise InputError(
            f"detector '{name}': the size of its input is not in the file; add ?size=PIXELS "
            "(288 for SSCD)"
        )
    return size


def _cuda(available: list[str]) -> list[str]:
    return [provider for provider in available if provider == "CUDAExecutionProvider"]

"""DICOM: values as a viewer shows them.

- Modality lookup table or rescale, then the first window that the file states (its own, or that of
  the frame's or of the shared functional groups); without one, minimum to maximum. MONOCHROME1 is
  inverted.
- An attribute that is empty, or holds no good number, counts as missing; a decimal comma is read.
- A palette is scaled by the largest value of its table, by the rule of depth in ``pixels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lcmem_cli.engine.data.decoders import Picture, Wanted
from lcmem_cli.engine.data.memory import room_for
from lcmem_cli.engine.data.pixels import Scale, from_values, scale_of
from lcmem_cli.engine.errors import UnreadableImageError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_BLOCK_VALUES = 1 << 19
_TABLE_BITS = 16
_NO_WINDOW = "values of a DICOM without a window stretched to their range"
_PALETTE_TABLES = tuple(f"{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue"))


def read_dicom(file: BinaryIO, wanted: Wanted) -> Picture:
    """Decode one frame of a DICOM file.

    Raises:
        UnreadableImageError: no image, or a library is missing that its compression needs.
    """
    data = _open(file, wanted)
    _fill_in(data)
    wanted.check(_whole(data, "Columns"), _whole(data, "Rows"))
    frames = max(1, _whole(data, "NumberOfFrames"))
    wanted.check_frame(frames)
    bytes_per_pixel = 8 * _whole(data, "SamplesPerPixel")
    with room_for(_whole(data, "Columns") * _whole(data, "Rows") * bytes_per_pixel):
        values, white_is_zero, scale = _values(data, wanted)
        image, _ = from_values(
            scale.to_bytes(values), white_is_zero=white_is_zero, size=wanted.size
        )
    return Picture(image=image, note=scale.note, frames=frames)


def count_frames(file: BinaryIO, wanted: Wanted) -> int:
    """Return how many frames a DICOM file says that it has."""
    return max(1, _whole(_open(file, wanted, stop_before_pixels=True), "NumberOfFrames"))


def _open(file: BinaryIO, wanted: Wanted, *, stop_before_pixels: bool = False) -> Dataset:
    try:
        import pydicom
    except ImportError:
        raise UnreadableImageError(wanted.path, "DICOM needs the extra [dicom]") from None
    data = pydicom.dcmread(file, force=True, stop_before_pixels=stop_before_pixels)
    if _whole(data, "Rows") < 1 or _whole(data, "Columns") < 1:
        raise UnreadableImageError(wanted.path, "not a DICOM image (no rows and columns)")
    return data


def _fill_in(data: Dataset) -> None:
    """Give attributes that decoding needs, and that are missing or empty, their usual values."""
    samples = _whole(data, "SamplesPerPixel") or 1
    allocated = _whole(data, "BitsAllocated") or 8
    stored = _whole(data, "BitsStored") or allocated
    usual = {
        "SamplesPerPixel": samples,
        "BitsAllocated": allocated,
        "BitsStored": stored,
        "HighBit": stored - 1,
        "PixelRepresentation": 0,
        "PhotometricInterpretation": "MONOCHROME2" if samples == 1 else "RGB",
    }
    for name, value in usual.items():
        if data.get(name) in (None, ""):
            setattr(data, name, value)
    if "NumberOfFrames" in data and not data.get("NumberOfFrames"):
        del data.NumberOfFrames


def _values(data: Dataset, wanted: Wanted) -> tuple[NDArray[Any], bool, Scale]:
    """Return the values of a frame, whether they are inverted, and their scale."""
    import pydicom

    stored = _decode(data, wanted)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(stored, data)
        tables = [np.frombuffer(data[name].value, colours.dtype) for name in _PALETTE_TABLES
                  if data.get(name)]  # fmt: skip
        table = np.concatenate(tables) if len(tables) == len(_PALETTE_TABLES) else colours
        return colours, False, scale_of(table)
    if stored.ndim == 3:
        return stored, False, Scale(0, 2 ** int(data.BitsStored) - 1)
    inverted = data.PhotometricInterpretation == "MONOCHROME1"
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > _TABLE_BITS // 8:
        shown, note = _grey(data, stored, wanted)
        return Scale(0, 1).to_bytes(shown), inverted, Scale(0, 255, note)
    # What becomes of a value is worked out once, not for every pixel.
    present, place = _present(stored)
    shown, note = _grey(data, present, wanted)
    table = np.zeros(2**_TABLE_BITS, dtype=np.uint8)
    table[place(present)] = Scale(0, 1).to_bytes(shown)
    return _by_blocks(lambda part: table[place(part)], stored), inverted, Scale(0, 255, note)


def _decode(data: Dataset, wanted: Wanted) -> NDArray[Any]:
    from pydicom.pixels import get_decoder, pixel_array

    syntax = data.file_meta.get("TransferSyntaxUID") if hasattr(data, "file_meta") else None
    if syntax is not None and syntax.is_compressed and syntax.is_encapsulated:
        try:
            is_decoded = get_decoder(syntax).is_available
        except NotImplementedError:
            raise UnreadableImageError(
                wanted.path, f"compressed as {syntax.name}, which is not read"
            ) from None
        if not is_decoded:
            raise UnreadableImageError(
                wanted.path, f"compressed as {syntax.name}, which needs the extra [dicom]"
            )
    return np.asarray(pixel_array(data, index=wanted.frame))


def _present(stored: NDArray[Any]) -> tuple[NDArray[Any], Callable[[NDArray[Any]], NDArray[Any]]]:
    """Return the values that occur in an image of at most 16 bits, and the place of a value."""
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")

    def place(values: NDArray[Any]) -> NDArray[Any]:
        return values.view(unsigned)

    occurs = np.zeros(2**_TABLE_BITS, dtype=bool)
    rows = max(1, _BLOCK_VALUES // stored.shape[1])
    for start in range(0, len(stored), rows):
        occurs[place(np.ascontiguousarray(stored[start : start + rows]))] = True
    return np.flatnonzero(occurs).astype(unsigned).view(stored.dtype), place


def _by_blocks(
    convert: Callable[[NDArray[Any]], NDArray[np.uint8]], values: NDArray[Any]
) -> NDArray[np.uint8]:
    result = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BLOCK_VALUES // values.shape[1])
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        result[part] = convert(np.ascontiguousarray(values[part]))
    return result


def _grey(
    data: Dataset, stored: NDArray[Any], wanted: Wanted
) -> tuple[NDArray[np.float64], str | None]:
    """Return grey values as they are meant to be shown, from 0 to 1, and what had to be guessed."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    if data.get("ModalityLUTSequence"):
        values = np.asarray(apply_modality_lut(stored, data))
    else:
        group = _group(data, wanted.frame, "PixelValueTransformationSequence")
        slope = _number(data, "RescaleSlope", group) or 1.0
        values = stored * slope + (_number(data, "RescaleIntercept", group) or 0.0)
    if not np.isfinite(values).all():
        raise UnreadableImageError(wanted.path, "holds values that are not finite")
    if data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        entries = np.asarray(apply_voi(np.rint(values).astype(np.int64), data))
        unit = entries.astype(np.float64) / (2**bits - 1)
        return unit.clip(0, 1), None
    group = _group(data, wanted.frame, "FrameVOILUTSequence")
    centre, width = _number(data, "WindowCenter", group), _number(data, "WindowWidth", group)
    if centre is not None and width is not None and width > 0:
        function = data.get("VOILUTFunction") or (group and group.get("VOILUTFunction"))
        return _window(values, centre, width, str(function or "LINEAR")).clip(0, 1), None
    shown = values
    padding = _number(data, "PixelPaddingValue")
    if padding is not None and (stored != padding).any():
        shown = values[stored != padding]
    low, high = float(shown.min()), float(shown.max())
    return ((values - low) / max(high - low, 1e-12)).clip(0, 1), _NO_WINDOW


def _window(
    values: NDArray[np.float64], centre: float, width: float, function: str
) -> NDArray[np.float64]:
    """Apply a window as DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3 define it, to the range [0, 1]."""
    if function == "SIGMOID":
        logistic: NDArray[np.float64] = 1 / (1 + np.exp(-4 * (values - centre) / width))
        return logistic
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if width <= 1:  # a step
        return np.asarray(values > centre - 0.5, dtype=np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def _group(data: Dataset, frame: int, name: str) -> Dataset | None:
    """Return an item of a frame's functional groups, or of those that all frames share."""
    per_frame = data.get("PerFrameFunctionalGroupsSequence") or []
    shared = data.get("SharedFunctionalGroupsSequence") or []
    for groups in (*per_frame[frame : frame + 1], *shared[:1]):
        if items := groups.get(name):
            return items[0]
    return None


def _number(data: Dataset, name: str, group: Dataset | None = None) -> float | None:
    """Return a number, or the first of several; ``None`` where there is no good one."""
    for place in (data, group):
        if place is None or name not in place:
            continue
        try:
            value: Any = place[name].value
        except (ValueError, TypeError, OverflowError, ArithmeticError):  # by the type it claims
            value = place.get_item(name).value
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        if not isinstance(value, (str, int, float)) and hasattr(value, "__getitem__"):
            value = value[0] if len(value) else None
        if value is None:
            continue
        try:
            number = float(str(value).split("\\")[0].strip().replace(",", "."))
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return None


def _whole(data: Dataset, name: str) -> int:
    """Return a whole number, 0 where there is no good one."""
    number = _number(data, name)
    return 0 if number is None else int(number)

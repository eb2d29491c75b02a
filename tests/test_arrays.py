"""Images in memory become what their PNG files would."""

from pathlib import Path

import numpy as np
import pytest
import torch
from audit_images import SmallCorrelation, picture
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lcmem_cli.engine.data.arrays import iter_pictures
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import InputError

UNIT = np.stack([np.asarray(picture(seed)) for seed in range(5)]) / 255  # [5, 48, 48, 3]
BYTES = np.rint(UNIT * 255).astype(np.uint8)
FIRST = torch.from_numpy(np.moveaxis(UNIT, -1, 1).copy())  # [5, 3, 48, 48]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("png")
    paths = [folder / f"{number}.png" for number in range(len(BYTES))]
    for path, pixels in zip(paths, BYTES, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


class Rows:
    """A data set as ``datasets`` has them: items are dictionaries, slices are one of lists."""

    column_names = ("image", "label")

    def __iter__(self):
        return ({"label": 3, "image": Image.fromarray(pixels)} for pixels in BYTES)

    def __getitem__(self, part):
        raise AssertionError("only to be iterated: a slice is a dictionary of columns")

    def __len__(self):
        return len(BYTES)


FORMS = {
    "PIL images": ([Image.fromarray(pixels) for pixels in BYTES], (0, 1)),
    "8-bit array": (BYTES, (0, 1)),
    "array in [0, 1]": (UNIT, (0, 1)),
    "half precision": (UNIT.astype(np.float16), (0, 1)),
    "array in [0, 255]": (UNIT * 255, (0, 255)),
    "array in [-1, 1]": (UNIT * 2 - 1, (-1, 1)),
    "list of arrays": (list(BYTES), (0, 1)),
    "tensor in [0, 1]": (FIRST.float(), (0, 1)),
    "tensor in [-1, 1]": (FIRST * 2 - 1, (-1, 1)),
    "8-bit tensor": (torch.from_numpy(np.moveaxis(BYTES, -1, 1).copy()), (0, 1)),
    "tensor with gradient": (FIRST.clone().requires_grad_(), (0, 1)),
    "list of tensors": (list(FIRST), (0, 1)),
    "list of batches": ([FIRST[:2], FIRST[2:]], (0, 1)),
    "loader with labels": (DataLoader(TensorDataset(FIRST, torch.arange(5)), batch_size=2), (0, 1)),
    "loader of dictionaries": (
        DataLoader([{"pixel_values": image, "label": 1} for image in FIRST], batch_size=3),
        (0, 1),
    ),
    "data set": (Rows(), (0, 1)),
    "pairs with labels": ([(image, "a label") for image in FIRST], (0, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_embedded_as_its_files_are(form, files):
    detector = load_detector("mse", input_size=32)
    images, value_range = FORMS[form]
    found = detector.embed(images, value_range=value_range, batch_size=2)
    np.testing.assert_array_equal(found, detector.embed(files))


def test_a_generator_is_read_once_and_one_image_needs_no_list(files):
    detector = SmallCorrelation()
    whole = detector.embed(iter(files))
    np.testing.assert_array_equal(whole, detector.embed(UNIT))
    for one in (BYTES[0], FIRST[0], Image.fromarray(BYTES[0]), files[0], str(files[0])):
        np.testing.assert_array_equal(detector.embed(one), whole[:1])
    assert detector.embed([]).shape == (0, detector.num_features)


def test_values_between_levels_go_to_the_nearest_as_in_a_png(tmp_path):
    values = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for image, tensor in zip(iter_pictures(values), values, strict=True):
        levels = (tensor.double() * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(tmp_path / "a.png")
        np.testing.assert_array_equal(image, load_image(tmp_path / "a.png"))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images_are_those_of_their_png(channels, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 6, channels), dtype=np.uint8)
    Image.fromarray(pixels if channels > 1 else pixels[..., 0]).save(tmp_path / "a.png")
    expected = load_image(tmp_path / "a.png")
    forms = [pixels, torch.from_numpy(np.moveaxis(pixels, -1, 0).copy())]
    for form in [*forms, pixels[..., 0]] if channels == 1 else forms:
        (found,) = iter_pictures(form)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (FIRST * 2, r"must lie in \[0, 1\], not \[0, .*value_range=\(-1, 1\)"),
        (FIRST * float("nan"), r"must lie in \[0, 1\]"),
        (UNIT * 2 - 1, r"not \[-1, 1\]"),
        (np.moveaxis(BYTES, -1, 1), r"\[n, H, W, 3\], not \[5, 3, 48, 48\].*torch.from_numpy"),
        (torch.from_numpy(UNIT), r"\[n, 3, H, W\], not \[5, 48, 48, 3\]"),
        (BYTES.astype(np.int64), "uint8 or floating point, not int64"),
        (7, "not int"),
        ([b"bytes"], "not bytes"),
        ([{"label": 1}], "under one of image, .*; it has label"),
    ],
)
def test_what_is_no_image_is_refused_by_what_it_is(images, message):
    with pytest.raises(InputError, match=message):
        list(iter_pictures(images))


def test_black_must_be_below_white():
    with pytest.raises(InputError, match="black and white"):
        list(iter_pictures(FIRST, value_range=(1, 0)))

"""Decoding: known pixels for every kind of file, and a reason for every bad one."""

import hashlib
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from lcmem_cli.engine.data.images import (
    DEPTH_NOTE,
    load_image,
    resized_pixels,
    to_tensor,
)
from lcmem_cli.engine.data.loading import hash_files
from lcmem_cli.engine.data.reading import content_hash
from lcmem_cli.engine.errors import UnreadableImageError

RED, GREEN = (200, 30, 40), (20, 180, 60)


def two_colours(width=8, height=4):
    """Left half red, right half green."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


def pixels(path):
    return np.asarray(load_image(path))


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.bmp", {}), ("a.tif", {}), ("a.tiff", {"compression": "tiff_lzw"}),
     ("a.webp", {"lossless": True}), ("a.ppm", {})],
)  # fmt: skip
def test_lossless_files_give_their_exact_pixels(tmp_path, name, options):
    two_colours().save(tmp_path / name, **options)
    np.testing.assert_array_equal(pixels(tmp_path / name), np.asarray(two_colours()))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_close(tmp_path):
    two_colours(32, 16).save(tmp_path / "a.avif", quality=95, subsampling="4:4:4")
    shown = pixels(tmp_path / "a.avif").astype(int)
    assert np.abs(shown - np.asarray(two_colours(32, 16))).max() < 12


def test_jpeg_is_close(tmp_path):
    two_colours(32, 16).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    shown = pixels(tmp_path / "a.jpg").astype(int)
    assert np.abs(shown - np.asarray(two_colours(32, 16))).max() < 12


def test_grey_and_palette_files_become_rgb(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert (pixels(tmp_path / "grey.png") == 77).all()
    two_colours().convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(pixels(tmp_path / "palette.png"), np.asarray(two_colours()))
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert (pixels(tmp_path / "bits.png") == 255).all()


def test_transparency_is_composited_over_black(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 50, 128)).save(tmp_path / "half.png")
    np.testing.assert_allclose(pixels(tmp_path / "half.png")[0, 0], [100, 50, 25], atol=1)
    Image.new("LA", (4, 4), (200, 0)).save(tmp_path / "clear.png")
    assert (pixels(tmp_path / "clear.png") == 0).all()


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = pixels(tmp_path / "a.jpg")[4, 4].astype(int)
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = Image.new("RGB", (32, 16), (128, 128, 128))
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # the top left quarter
    stored = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    image = load_image(tmp_path / f"a.{suffix}")
    assert image.size == (32, 16)
    corner, rest = (np.asarray(image)[y, x].astype(int) for y, x in ((4, 8), (12, 24)))
    assert corner[0] > 200 and corner[1] < 80 and abs(rest[1] - 128) < 20


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("highest", "bits"), [(255, 8), (4095, 12), (65535, 16)], ids=["8", "12", "16"]
)
def test_16_bit_files_use_the_whole_range_and_are_never_clipped(tmp_path, suffix, highest, bits):
    values = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = load_image(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(np.asarray(image)[..., 0], values * (255 / highest), atol=0.51)
    assert (DEPTH_NOTE in image.info) == (bits != 16)


def test_floating_point_tiff(tmp_path):
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "unit.tif")
    np.testing.assert_allclose(pixels(tmp_path / "unit.tif")[..., 0], values * 255, atol=0.51)
    Image.fromarray(values * 40 - 7).save(tmp_path / "wide.tif")
    np.testing.assert_allclose(pixels(tmp_path / "wide.tif")[..., 0], values * 255, atol=0.51)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tif")
    with pytest.raises(UnreadableImageError, match="not finite"):
        load_image(tmp_path / "nan.tif")


def test_the_first_frame_of_an_animation_is_used(tmp_path):
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), GREEN)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(tmp_path / "a.webp") == RED).all()


def write_dicom(path, values, **tags):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra [dicom]")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns = values.shape
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.SamplesPerPixel, data.PixelRepresentation = 15, 1, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


def test_dicom_window_and_inversion(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 16
    ramp = values / values.max() * 255
    write_dicom(tmp_path / "plain.dcm", values)
    np.testing.assert_allclose(pixels(tmp_path / "plain.dcm")[..., 0], ramp, atol=1)
    write_dicom(tmp_path / "inverted.dcm", values, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(pixels(tmp_path / "inverted.dcm")[..., 0], 255 - ramp, atol=1)
    write_dicom(
        tmp_path / "window.dcm", values, WindowCenter=500, WindowWidth=200, RescaleSlope=1,
        RescaleIntercept=0,
    )  # fmt: skip
    # DICOM PS3.3 C.11.2.1.2.1: from centre - 0.5 - (width - 1) / 2, over width - 1.
    expected = ((values - 499.5) / 199 + 0.5).clip(0, 1) * 255
    np.testing.assert_allclose(pixels(tmp_path / "window.dcm")[..., 0], expected, atol=1)
    notes = {p.stem: load_image(p).info.get(DEPTH_NOTE) for p in tmp_path.glob("*.dcm")}
    assert notes["window"] is None
    assert "without a window" in notes["plain"] and "without a window" in notes["inverted"]


def huge_png(path, width, height):
    """A valid header that declares many pixels, and hardly any data."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
    )


BAD = {
    "missing.png": "no such file",
    "empty.png": "empty file",
    "text.png": "not an image",
    "cut.png": "cannot be decoded",
    "cut.jpg": "cannot be decoded",
    "bomb.png": "pixels|decompression bomb",
    "folder.png": "is a folder",
    "text.dcm": "not a DICOM image",
}


def make_bad(folder):
    two_colours(64, 64).save(folder / "whole.png")
    two_colours(64, 64).save(folder / "whole.jpg")
    for suffix in ("png", "jpg"):
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(data[: len(data) * 2 // 3])
        (folder / f"whole.{suffix}").unlink()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "text.dcm").write_text("no image")
    huge_png(folder / "bomb.png", 60_000, 60_000)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_says_why(tmp_path, name):
    if name == "text.dcm":
        pytest.importorskip("pydicom", reason="needs the extra [dicom]")
    make_bad(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UnreadableImageError, match=BAD[name]) as caught:
        load_image(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_bad_files_are_listed_and_never_fatal_under_the_limit(
    run_cli, image_folder, tiny_codec, tmp_path
):
    make_bad(image_folder / "id03")
    (image_folder / "id03" / "text.dcm").unlink()
    common = ["latents", "--filelist", image_folder, "--codec", tiny_codec, "--size", 32]
    refused = run_cli(*common, "-o", tmp_path / "refused", exit_code=1)
    assert "5 images could not be read" in refused.stderr
    out = run_cli(*common, "-o", tmp_path / "kept", "--max-unreadable", 5, "--json")
    listed = {entry["path"]: entry["reason"] for entry in json.loads(out.stdout)["unreadable"]}
    names = ("empty.png", "text.png", "cut.png", "cut.jpg", "bomb.png")
    assert set(listed) == {f"id03/{name}" for name in names}
    assert all(listed.values()) and json.loads(out.stdout)["num_images"] == 72


def test_a_colour_profile_does_not_change_the_stored_values(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    two_colours().save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.asarray(two_colours()))


def test_resizing_and_scaling(tmp_path):
    two_colours(64, 16).save(tmp_path / "a.png")
    tensor = to_tensor(load_image(tmp_path / "a.png"), 8)
    assert tensor.shape == (3, 8, 8) and tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor[:, 4, 0] * 255, RED, atol=0.5)
    np.testing.assert_allclose(tensor[:, 4, 7] * 255, GREEN, atol=0.5)
    stored = resized_pixels(load_image(tmp_path / "a.png", size=8), 8)
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), stored.astype("f4") / 255)


def test_the_content_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"GIF89a")
    assert content_hash(tmp_path / "a") == hashlib.sha256(b"GIF89a").hexdigest()
    with pytest.raises(UnreadableImageError, match="no such file"):
        content_hash(tmp_path / "b")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_an_opened_image_is_embedded_as_its_file_is(mode, tmp_path):
    from lcmem_cli import load_detector

    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    image = Image.fromarray(np.asarray(grey, np.uint16) * 257) if mode == "I;16" else grey
    path = tmp_path / "image.tiff"
    image.convert(mode).save(path)
    detector = load_detector("ncc", input_size=8)
    with Image.open(path) as opened:
        features = detector.embed([opened, path])
    assert np.array_equal(features[0], features[1]) and features[0].any()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs special files")
def test_special_files_behind_links_and_huge_files_are_told_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    wanted = {}
    for name, target in (("pipe.png", tmp_path / "fifo"), ("zero.png", "/dev/zero")):
        (tmp_path / name).symlink_to(target)
        wanted[name] = "is not a regular file"
    (tmp_path / "folder.png").symlink_to(tmp_path)
    wanted["folder.png"] = "is a folder"
    (tmp_path / "empty.png").touch()  # as files of the system without an end look
    wanted["empty.png"] = "empty file"
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 1 << 40)  # takes no room, and an hour to be read
    wanted["huge.png"] = "not an image in a known format"
    paths = [tmp_path / name for name in wanted]
    hashes, reasons = hash_files(paths)
    assert hashes == [None] * len(paths)
    for number, (path, reason) in enumerate(zip(paths, wanted.values(), strict=True)):
        assert reasons[number].startswith(reason)
        with pytest.raises(UnreadableImageError, match=reason):
            load_image(path)

"""Kinds of files that tools of the field read wrongly: each with the right values known."""

import io
import struct
import sys
import threading
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import Listener, draw_identity
from PIL import Image, PngImagePlugin

from lcmem_cli.engine.compute import Compute
from lcmem_cli.engine.data import memory
from lcmem_cli.engine.data.formats import format_of, is_image
from lcmem_cli.engine.data.frames import split_frame
from lcmem_cli.engine.data.images import DEPTH_NOTE, list_frames, load_image
from lcmem_cli.engine.data.loading import iter_images
from lcmem_cli.engine.data.looks import look_at, same_blank, without_bars
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.pixels import from_image, from_values
from lcmem_cli.engine.data.reading import content_hash
from lcmem_cli.engine.data.remarks import BLANK, remarks_texts
from lcmem_cli.engine.data.tables import read_pairs
from lcmem_cli.engine.errors import ManifestError, UnreadableImageError


def picture(side=48, seed=1):
    """A colour picture that uses the whole range."""
    levels = np.asarray(draw_identity(seed, 0, side)).astype(np.float64)
    low, high = levels.min(), levels.max()
    return np.rint((levels - low) / (high - low) * 255).astype(np.uint8)


def pixels(path, **options):
    return np.asarray(load_image(path, **options))


def close(path, expected, levels=1):
    np.testing.assert_allclose(pixels(path).astype(int), expected.astype(int), atol=levels)


# --- depth ---------------------------------------------------------------------------------------


def png16(path, values):
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(values)))


@pytest.mark.parametrize("highest", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["png", "tif", "planar", "tiles", "lzw", "big", "ppm", "jp2"])
def test_colour_of_more_than_8_bits_goes_by_the_rule_of_depth(tmp_path, kind, highest):
    right = picture()
    values = np.rint(right / 255 * highest).astype(np.uint16)
    values[0, 0] = highest
    right[0, 0] = 255
    path = tmp_path / f"a.{'tif' if kind not in ('png', 'ppm', 'jp2') else kind}"
    if kind == "png":
        png16(path, values)
    elif kind == "ppm":
        path.write_bytes(b"P6\n# made here\n48 48\n65535\n" + values.astype(">u2").tobytes())
    elif kind == "jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(values, level=0, reversible=True))
    else:
        options = {
            "tif": {},
            "planar": {"planarconfig": "separate"},
            "tiles": {"tile": (16, 16), "compression": "zlib", "predictor": True},
            "lzw": {"compression": "lzw", "byteorder": ">"},
            "big": {"bigtiff": True, "compression": "zstd"},
        }[kind]
        stored = np.moveaxis(values, -1, 0) if kind == "planar" else values
        tifffile.imwrite(path, stored, photometric="rgb", **options)
    close(path, right)
    assert (DEPTH_NOTE in load_image(path).info) == (highest != 65535)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("highest", [4095, 65535])
def test_alpha_of_16_bits_is_of_the_same_depth(tmp_path, channels, highest):
    right = picture()
    right = np.repeat(right[..., :1], 3, axis=2) if channels == 2 else right
    values = np.rint(right / 255 * highest).astype(np.uint16)[..., : channels - 1]
    opaque = np.full((48, 48, 1), highest, np.uint16)
    opaque[:24] = 0
    right[:24] = 0
    png16(tmp_path / "a.png", np.concatenate([values, opaque], axis=2))
    close(tmp_path / "a.png", right)


@pytest.mark.parametrize("dtype", ["uint32", "uint64", "int8", "int16", "int32", "float64", "f2"])
@pytest.mark.parametrize("colour", [False, True])
def test_wide_and_signed_values_are_stretched_and_never_wrapped(tmp_path, dtype, colour):
    unit = picture().astype(np.float64) / 255
    unit = unit if colour else unit[..., 0]
    unit = (unit - unit.min()) / (unit.max() - unit.min())
    kind = np.dtype(dtype)
    low, high = (-3.0, 50.0) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    values = (unit * (float(high) - float(low)) * 0.999 + float(low)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb" if colour else "minisblack")
    right = unit if colour else np.repeat(unit[..., None], 3, axis=2)
    close(tmp_path / "a.tif", right * 255, levels=2)


def test_floating_point_colour_within_one_is_taken_as_it_is(tmp_path):
    right = picture()
    values = right.astype(np.float32) / 510
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    close(tmp_path / "a.tif", right / 2)
    values[3, 3, 1] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", values, photometric="rgb")
    with pytest.raises(UnreadableImageError, match="not finite"):
        load_image(tmp_path / "nan.tif")


def test_grey_tiffs_of_odd_kinds(tmp_path):
    right = picture()[..., 0]
    three = np.repeat(right[..., None], 3, axis=2)
    tifffile.imwrite(tmp_path / "zero.tif", (65535 - right.astype(np.uint16) * 257),
                     photometric="miniswhite")  # fmt: skip
    table = np.stack([np.arange(256), 255 - np.arange(256), np.zeros(256)]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "palette.tif", right, photometric="palette", colormap=table)
    close(tmp_path / "zero.tif", three)
    colours = np.stack([right, 255 - right, np.zeros_like(right)], axis=2)
    close(tmp_path / "palette.tif", colours)


def test_a_grey_tiff_of_12_bits(tmp_path):
    right = picture()[..., 0]
    try:
        tifffile.imwrite(tmp_path / "packed.tif", right.astype(np.uint16) * 16, bitspersample=12)
    except NotImplementedError:
        pytest.skip("this version of imagecodecs reads such files, but cannot write one")
    close(tmp_path / "packed.tif", np.repeat(right[..., None], 3, axis=2))


def test_a_tiff_that_is_no_picture_is_refused_with_its_kind(tmp_path):
    tifffile.imwrite(tmp_path / "waves.tif", np.zeros((8, 8), np.complex64))
    tifffile.imwrite(
        tmp_path / "bands.tif", np.zeros((8, 8, 7), np.uint16), photometric="minisblack",
        planarconfig="contig",
    )  # fmt: skip
    for name in ("waves", "bands"):
        with pytest.raises(UnreadableImageError, match="a kind of TIFF that is not read"):
            load_image(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_damaged_deep_file_is_refused(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 65535, (64, 64, 3), dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        png16(path, values)
    else:
        tifffile.imwrite(path, values, photometric="rgb", compression="zlib")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        load_image(path)


@pytest.mark.parametrize("deep", [False, True])
def test_jpeg_xl_and_heic_are_told_by_their_content(tmp_path, deep):
    right = picture()
    values = right.astype(np.uint16) * 257 if deep else right
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpegxl_encode(values, lossless=True))
    close(tmp_path / "a.jpg", right)
    heif = pytest.importorskip("pillow_heif", reason="needs the extra [formats]")
    smooth = Image.fromarray(right[:4, :4]).resize((128, 128), Image.Resampling.BICUBIC)
    heif.from_pillow(smooth).save(tmp_path / "b.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "b.jpg").astype(int) - np.asarray(smooth)).mean() < 4


def test_a_png_with_megabytes_of_text_is_read(tmp_path):
    right = picture()
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.fromarray(right).save(tmp_path / "text.png", pnginfo=text)
    Image.fromarray(right).save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    close(tmp_path / "text.png", right, levels=0)
    close(tmp_path / "profile.png", right, levels=0)


# --- background, blank images, looks -------------------------------------------------------------


@pytest.mark.parametrize(("ink", "ground"), [(0, 255), (40, 255), (128, 0), (255, 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_opaque_stays_visible(tmp_path, ink, ground, mode):
    image = Image.new("RGBA", (20, 20), (200, 200, 200, 0))
    image.paste((ink, ink, ink, 255), (5, 5, 15, 15))
    image.convert(mode).save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png")
    assert (found[10, 10] == ink).all() and (found[0, 0] == ground).all()


def test_an_image_of_one_colour_is_noticed_and_equals_only_its_like():
    def blank(*colour):
        return np.full((32, 32, 3), colour, np.uint8)

    assert look_at(blank(200, 30, 40)).blank == 0xC81E28
    noisy = blank(200, 30, 40) + np.random.default_rng(0).integers(0, 3, (32, 32, 3), np.uint8)
    assert same_blank(look_at(noisy.astype(np.uint8)).blank, 0xC81E28)
    assert not same_blank(look_at(blank(0, 0, 0)).blank, look_at(blank(255, 255, 255)).blank)
    drawn = blank(255, 255, 255)
    drawn[3, 5] = 200
    assert look_at(drawn).blank == -1 and not same_blank(-1, -1)


def test_blank_images_and_first_pages_are_told_once(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    paths = [tmp_path / "pages.tif", tmp_path / "red.png", tmp_path / "pages.tif#2"]
    (batch,) = iter_images(paths, 16, workers=0, batch_size=8)
    assert batch.remarks[:, BLANK].tolist() == [-1, 0xFF0000, -1]
    texts = remarks_texts(paths, batch.remarks)
    assert len(texts) == 2 and "3 in all" in texts[0] and "1 file(s)" in texts[0]
    assert "red.png" in texts[1]


def test_bars_are_cut_and_plain_ground_is_kept():
    scene = Image.fromarray(picture(60))
    framed = Image.new("RGB", (100, 90), (12, 12, 12))
    framed.paste(scene, (20, 10))
    cut = without_bars(framed)
    assert cut is not None and np.array_equal(np.asarray(cut), np.asarray(scene))
    assert without_bars(scene) is None
    thing = Image.new("RGB", (100, 100), "white")
    thing.paste("black", (49, 20, 52, 80))  # its tip ends the ground at a few points only
    thing.paste("black", (20, 49, 80, 52))
    assert without_bars(thing) is None
    assert without_bars(Image.new("RGB", (30, 30), "black")) is None


def test_a_grey_picture_is_told_from_one_with_little_colour():
    right = picture()
    grey = np.repeat(right[..., :1], 3, axis=2)
    assert look_at(grey).is_grey and not look_at(right).is_grey
    grey[7:12, 9:14] = (200, 30, 30)
    assert not look_at(grey).is_grey


# --- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_each_image_of_a_file_has_a_name(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    colours = ["red", "lime", "blue"]
    frames = [Image.new("RGB", (16, 16), colour) for colour in colours]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert list_frames(path) == [0, 1, 2]
    listed = load_manifest(tmp_path, need_split=False, frames="all").records
    assert [(r.path, r.id) for r in listed] == [(f"a.{suffix}#{n}", path.name) for n in (1, 2, 3)]
    for frame, record in zip(frames, listed, strict=True):
        close(tmp_path / record.path, np.asarray(frame), levels=0)
    assert content_hash(tmp_path / f"a.{suffix}#1") == content_hash(path)
    assert len({content_hash(tmp_path / record.path) for record in listed}) == 3
    with pytest.raises(UnreadableImageError, match="no image number 4, but 3"):
        load_image(tmp_path / f"a.{suffix}#4")
    (tmp_path / "list.csv").write_text(f"path,id\na.{suffix}#2,x\n")
    assert load_manifest(tmp_path / "list.csv", need_split=False).records[0].path == listed[1].path


def test_small_copies_in_a_tiff_are_no_further_images(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(picture(64), photometric="rgb")
        writer.write(picture(32), photometric="rgb", subfiletype=1)
    assert list_frames(tmp_path / "a.tif") == [0]
    (batch,) = iter_images([tmp_path / "a.tif"], 16, workers=0, batch_size=1)
    assert not remarks_texts([tmp_path / "a.tif"], batch.remarks)


def test_a_file_that_is_named_like_a_frame_is_itself(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a#2", format="PNG")
    assert split_frame(tmp_path / "a#2") == (tmp_path / "a#2", 0)
    assert split_frame(tmp_path / "b#2") == (tmp_path / "b", 1)


# --- folders and tables --------------------------------------------------------------------------


def test_images_are_told_by_content_and_the_rest_is_named(tmp_path):
    image = Image.fromarray(picture())
    for name, kind in {
        "a.jpg_large": "JPEG", "b.mpo": "JPEG", "c.apng": "PNG", "d.pjpeg": "JPEG", "e.dib": "DIB",
        "f.tga": "TGA", "g": "PNG", "h.download": "WEBP", "i.dcm": "PNG", "j.png": "JPEG",
    }.items():  # fmt: skip
        image.save(tmp_path / name, format=kind)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\0\0isomavc1")
    listening = Listener()
    listed = load_manifest(tmp_path, need_split=False, reporter=listening)
    assert len(listed) == 10 and listed.left_out == ("film.mp4", "notes.txt")
    assert "left out 2 file(s)" in listening.warnings[0] and "film.mp4" in listening.warnings[0]
    for path in listed.paths():
        assert load_image(path).size == (48, 48)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", None),
        (b"BM is a text", None),
        (b"P1 is one, P2 another", None),
        (b"P5 640 480 255 ", "PPM"),
    ],
)
def test_formats_by_their_beginning(head, name):
    assert format_of(head) == name


def test_a_pipe_is_no_image(tmp_path):
    assert not is_image(tmp_path / "nothing")


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", " ", "<NA>", "NULL", "N/A"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_missing_id_is_nobody(tmp_path, missing, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    path = tmp_path / f"list.{suffix}"
    if suffix == "csv":
        path.write_text(f"path,id\na.png,{missing}\nb.png,  p1 \n")
    else:
        table = {"path": ["a.png", "b.png"], "id": [missing, "  p1 "]}
        pq.write_table(pa.table(table), path)
    with pytest.raises(ManifestError, match=r"1 empty cell\(s\) in column 'id': (line|row)"):
        load_manifest(path)
    path.with_suffix(".csv").write_text("path,id\na.png,p2\nb.png,  p1 \n")
    listed = load_manifest(path.with_suffix(".csv"), need_split=False)
    assert [record.id for record in listed.records] == ["p2", "p1"]


def test_a_missing_number_in_parquet_is_nobody(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    pq.write_table(pa.table({"path": ["a.png"], "id": [float("nan")]}), tmp_path / "list.parquet")
    with pytest.raises(ManifestError, match="'nan' names nothing"):
        load_manifest(tmp_path / "list.parquet")


def test_pairs_are_read_by_the_rules_of_filelists(tmp_path):
    path = tmp_path / "pairs.csv"
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    path.write_text("﻿Note, PATH_A ,Path_B\nx, a.png,b.png \n")
    assert read_pairs(path) == [(tmp_path / "a.png", tmp_path / "b.png")]
    for content, words in (
        (b"path_a,path_b\na.png,b.png,c.png\n", "line 2: 3 cells"),
        (b"path_a,path_b\na.png,\n", "line 2: path_a or path_b is empty"),
        (b"path_a,path_c\na.png,b.png\n", "no column 'path_b'"),
        (b"path_a;path_b\n", "separated by ';'"),
        ("path_a,path_b\n".encode("utf-16"), "UTF-16"),
        ("path_a,path_b\n".encode("utf-16-le"), "UTF-16"),
        (b"path_a,path_b\n", "no pairs"),
    ):
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=words):
            read_pairs(path)


def test_a_name_that_is_not_there_is_told_what_is_odd_about_it(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "u\u0308ber.png")
    for name, words in (
        ("images\\a.png", "backslashes, as Windows"),
        ("images/\u00fcber.png", "another Unicode normal form"),
    ):
        (tmp_path / "list.csv").write_text(f"path,id\n{name},1\n")
        with pytest.raises(ManifestError, match=words):
            load_manifest(tmp_path / "list.csv")
        with pytest.raises(UnreadableImageError, match=words):
            load_image(tmp_path / name)


# --- memory and threads --------------------------------------------------------------------------


def test_large_images_are_decoded_one_after_the_other(monkeypatch):
    monkeypatch.setattr(memory, "MAX_BYTES", 100)
    inside, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        with memory.room_for(60):
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.01)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    with memory.room_for(1000):  # more than the bound, but alone
        pass


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_a_large_image_is_shrunk_in_blocks_to_nearly_the_same_copy(monkeypatch, mode):
    large = Image.fromarray(picture(48)).resize((1000, 700), Image.Resampling.BICUBIC)
    if mode == "I;16":
        values = np.asarray(large.convert("L")).astype(np.uint16) * 257

        def make(size):
            return from_values(values, size=size)[0].convert("RGB")
    else:

        def make(size):
            return from_image(large.convert(mode), size=size)

    whole = make(64)
    monkeypatch.setattr("lcmem_cli.engine.data.pixels.LARGE_PIXELS", 1 << 16)
    monkeypatch.setattr("lcmem_cli.engine.data.pixels._BLOCK_VALUES", 1 << 15)
    shrunk = make(64)
    assert whole.size == (1000, 700) and shrunk.size == (143, 140)
    a, b = (
        np.asarray(i.resize((64, 64), Image.Resampling.BILINEAR), float) for i in (whole, shrunk)
    )
    assert np.abs(a - b).max() < 8 and np.abs(a - b).mean() < 1


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path, monkeypatch):
    Image.fromarray(picture()).resize((640, 480)).save(tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg", size=32).size == (640, 480)
    monkeypatch.setattr("lcmem_cli.engine.data.images.LARGE_PIXELS", 1 << 16)
    assert load_image(tmp_path / "a.jpg", size=32).size == (160, 120)
    assert load_image(tmp_path / "a.jpg").size == (640, 480)


def test_bytes_that_were_read_are_decoded_as_the_file_is(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    assert np.array_equal(pixels(tmp_path / "a.png", data=data), picture())
    with pytest.raises(UnreadableImageError, match="empty file"):
        load_image(tmp_path / "a.png", data=b"")


# --- DICOM ---------------------------------------------------------------------------------------


def dicom(path, values, syntax=None, **tags):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra [dicom]")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns = values.shape[-2:]
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit, data.SamplesPerPixel = data.BitsStored - 1, 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PhotometricInterpretation = "MONOCHROME2"
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    data.save_as(path, enforce_file_format=True)


@pytest.fixture
def scan():
    """Values of 12 bits, and what a window over all of them shows."""
    values = picture()[..., 0].astype(np.uint16) * 16
    return values, np.repeat(np.rint(values / 4095 * 255)[..., None], 3, axis=2)


WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


@pytest.mark.parametrize(
    "tags",
    [
        {**WINDOW, "RescaleSlope": None, "RescaleIntercept": ""},
        {"WindowCenter": [2048, 40], "WindowWidth": [4096, 80]},
        {**WINDOW, "VOILUTFunction": ""},
        {**WINDOW, "NumberOfFrames": None},
        {**WINDOW, "RescaleSlope": 1, "RescaleIntercept": 0, "PixelPaddingValue": None},
    ],
)
def test_odd_attributes_count_as_missing(tmp_path, scan, tags):
    dicom(tmp_path / "a.dcm", scan[0], **tags)
    close(tmp_path / "a.dcm", scan[1])


@pytest.mark.parametrize("value", [None, "", "none"])
def test_an_empty_window_is_none(tmp_path, scan, value):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra [dicom]")
    dicom(tmp_path / "a.dcm", scan[0])
    data = pydicom.dcmread(tmp_path / "a.dcm")
    for name in WINDOW:
        element = pydicom.DataElement(pydicom.datadict.tag_for_keyword(name), "LO", value)
        data[element.tag] = element
    data.save_as(tmp_path / "a.dcm")
    image = load_image(tmp_path / "a.dcm")
    low, high = scan[0].min(), scan[0].max()
    right = (scan[0] - float(low)) / float(high - low) * 255
    np.testing.assert_allclose(np.asarray(image)[..., 0], right, atol=1)
    assert "without a window" in image.info[DEPTH_NOTE]


def test_a_decimal_comma_is_read(tmp_path, scan):
    dicom(tmp_path / "a.dcm", scan[0], WindowCenter="2048.0", WindowWidth="4096.0")
    data = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(
        data.replace(b"2048.0", b"2048,0").replace(b"4096.0", b"4096,0")
    )
    close(tmp_path / "a.dcm", scan[1])


def test_window_and_rescale_of_the_functional_groups(tmp_path, scan):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra [dicom]")

    def group(centre, width, slope):
        window, rescale, item = (pydicom.Dataset() for _ in range(3))
        window.WindowCenter, window.WindowWidth = centre, width
        rescale.RescaleSlope, rescale.RescaleIntercept = slope, 0
        item.FrameVOILUTSequence = pydicom.Sequence([window])
        item.PixelValueTransformationSequence = pydicom.Sequence([rescale])
        return item

    both = np.stack([scan[0], scan[0]])
    dicom(
        tmp_path / "a.dcm", both, NumberOfFrames=2,
        SharedFunctionalGroupsSequence=pydicom.Sequence([group(2048, 4096, 1)]),
        PerFrameFunctionalGroupsSequence=pydicom.Sequence(
            [pydicom.Dataset(), group(4096, 8192, 2)]
        ),
    )  # fmt: skip
    close(tmp_path / "a.dcm#1", scan[1])
    close(tmp_path / "a.dcm#2", scan[1])
    assert list_frames(tmp_path / "a.dcm") == [0, 1]


def test_a_palette_is_scaled_by_what_its_table_holds(tmp_path):
    right = picture()[..., 0]
    table = np.arange(256, dtype="<u2").tobytes()
    tags = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = table
    dicom(tmp_path / "a.dcm", right, PhotometricInterpretation="PALETTE COLOR", **tags)
    close(tmp_path / "a.dcm", np.repeat(right[..., None], 3, axis=2))
    assert "8-bit" in load_image(tmp_path / "a.dcm").info[DEPTH_NOTE]


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        ("JPEGLosslessSV1", imagecodecs.ljpeg_encode),
        ("JPEGLSLossless", imagecodecs.jpegls_encode),
        (
            "JPEG2000Lossless",
            lambda values: imagecodecs.jpeg2k_encode(
                values, codecformat="j2k", reversible=True, level=0
            ),
        ),
    ],
)
def test_lossless_dicom_shows_what_was_encoded(tmp_path, scan, syntax, encode):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra [dicom]")
    pytest.importorskip("gdcm", reason="needs the extra [dicom]")
    dicom(tmp_path / "a.dcm", scan[0], **WINDOW)
    data = pydicom.dcmread(tmp_path / "a.dcm")
    data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    data.PixelData = pydicom.encaps.encapsulate([encode(scan[0])])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    close(tmp_path / "a.dcm", scan[1])


def test_a_missing_decoder_is_named_with_its_extra(tmp_path, scan, monkeypatch):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra [dicom]")
    dicom(tmp_path / "a.dcm", scan[0], **WINDOW)
    data = pydicom.dcmread(tmp_path / "a.dcm")
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    data.PixelData = pydicom.encaps.encapsulate([bytes(16)])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEGLosslessSV1)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(UnreadableImageError, match=r"JPEG Lossless.*needs the extra \[dicom\]"):
        load_image(tmp_path / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UnreadableImageError, match=r"DICOM needs the extra \[dicom\]"):
        load_image(tmp_path / "a.dcm")


def test_orientation_of_a_deep_png(tmp_path):
    values = np.zeros((4, 6, 3), np.uint16)
    values[0] = 65535
    data = imagecodecs.png_encode(values)
    exif = Image.Exif()
    exif[0x0112] = 3
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    found = pixels(tmp_path / "a.png")
    assert (found[-1] == 255).all() and (found[0] == 0).all()


def test_an_opened_stream_is_not_needed(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "WEBP", lossless=True)
    assert np.array_equal(pixels(tmp_path / "x.bin", data=buffer.getvalue()), picture())


def test_images_of_a_set_are_embedded_with_their_remarks(tmp_path):
    from lcmem_cli import load_detector
    from lcmem_cli.engine.detectors.embedding import embed_files
    from lcmem_cli.engine.store.features import FeatureCaches

    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    paths = [tmp_path / "a.png", tmp_path / "red.png"]
    for passes in (2, 0):
        listening = Listener()
        compute = Compute(cache=FeatureCaches(tmp_path / "cache"), reporter=listening)
        made = embed_files(load_detector("phash"), paths, compute)
        assert made.encoder_passes == passes and made.blank.tolist() == [-1, 0xFF0000]
        assert "1 image(s) show nothing" in listening.warnings[0]

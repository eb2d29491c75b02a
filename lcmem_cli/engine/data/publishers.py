"""Tables that publishers ship with their data sets: whom an image shows, and its official split.

A table names images; a file belongs to the row of its name, whatever its folder and its suffix. So
it does not matter how the images were unpacked or converted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lcmem_cli.engine.data.formats import IMAGE_SUFFIXES
from lcmem_cli.engine.data.sources.base import MEMBER
from lcmem_cli.engine.data.tables import Columns, read_header, read_lines, read_table, some
from lcmem_cli.engine.errors import ManifestError

_VOLUME_SUFFIXES = (".nii.gz", ".nii")


class Entry(NamedTuple):
    """What a table says of an image; ``None`` where it does not say it.

    Attributes:
        id: patient, person, lesion or object.
        split: ``TRAIN``, ``VAL`` or ``TEST``.
    """

    id: str | None = None
    split: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a publisher writes the tables.

    Attributes:
        files: their names, for messages.
        image: columns that may name the image; the first one that is there does.
        identity: columns that may name the identity; of a row the first that is filled. Where none
            is, every image is its own.
        split: columns that may name the split.
        words: what the split is called there.
        lists: tables without a header, by a part of their name: what the second word of a line is,
            ``id``, ``split`` or nothing.
        named_splits: whether the name of a table tells the split of its images.
        unnamed_split: split of a table whose name tells none.
        name: what of a file's name is the image's.
        identity_in_name: what of the image's name is the identity.
    """

    files: str
    image: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    named_splits: bool = True
    unnamed_split: str | None = None
    name: re.Pattern[str] = re.compile(".+", re.DOTALL)
    identity_in_name: re.Pattern[str] | None = None

    def image_of(self, path: str) -> str | None:
        """Return the name of a file's image, as tables write it; ``None`` where it has none."""
        found = self.name.match(_stem(path))
        return found[0] if found else None


LAYOUTS: dict[str, Layout] = {
    "nih-cxr14": Layout(
        files="Data_Entry_2017.csv, train_val_list.txt, test_list.txt",
        image=("Image Index",),
        identity=("Patient ID",),
        lists={"train_val_list": "", "test_list": ""},
    ),
    "celeba": Layout(
        files="identity_CelebA.txt, list_eval_partition.txt",
        image=("image_id",),
        split=("partition",),
        words={"0": "TRAIN", "1": "VAL", "2": "TEST"},
        lists={"identity": "id", "partition": "split"},
        named_splits=False,
    ),
    "isic": Layout(
        files="metadata.csv of the archive, or a challenge's tables of metadata or ground truth",
        image=("isic_id", "image_name", "image", "image_id"),
        identity=("patient_id", "patient", "lesion_id"),
    ),
    "ham10000": Layout(
        files="HAM10000_metadata.csv, ISIC2018_Task3_Test_GroundTruth.csv",
        image=("image_id", "image"),
        identity=("lesion_id",),
        unnamed_split="TRAIN",
    ),
    "mimic-cxr-jpg": Layout(
        files="mimic-cxr-2.0.0-split.csv.gz",
        image=("dicom_id",),
        identity=("subject_id",),
        split=("split",),
        words={"train": "TRAIN", "validate": "VAL", "test": "TEST"},
        named_splits=False,
    ),
    "cxr-lt": Layout(
        files="train_labeled.csv, development_labeled_task1.csv, test_labeled_task1.csv",
        image=("dicom_id",),
        identity=("subject_id",),
        split=("split",),
        words={"train": "TRAIN", "development": "VAL", "validate": "VAL", "test": "TEST"},
    ),
    "ct-rate": Layout(
        files="train_metadata.csv, validation_metadata.csv",
        image=("VolumeName",),
        name=re.compile(r"(?:train|valid)_\d+_[a-z]+_\d+"),
        identity_in_name=re.compile(r"(?:train|valid)_\d+"),
    ),
    "imagenet": Layout(
        files="train_cls.txt, val.txt, test.txt, or LOC_train_solution.csv, LOC_val_solution.csv",
        image=("ImageId",),
        lists={"train_cls": "", "val": "", "test": ""},
    ),
}
"""By the name that ``lcmem manifest --from`` takes."""


def read_publisher(layout: Layout, tables: Sequence[Path]) -> dict[str, Entry]:
    """Read a publisher's tables.

    Args:
        layout: how they are written.
        tables: the files, in any order.

    Returns:
        What is known of each image, by its name without folder and suffix.

    Raises:
        ManifestError: a table cannot be read or is not one of the publisher's, two contradict each
            other, or no identity is known where the publisher tells them.
    """
    entries: dict[str, Entry] = {}
    for table in tables:
        for image, entry in _entries(layout, table):
            known = entries.get(image, Entry())
            for old, new in zip(known, entry, strict=True):
                if old is not None and new is not None and old != new:
                    raise ManifestError(f"{table}: says {new!r} of {image!r}, another {old!r}")
            entries[image] = Entry(entry.id or known.id, entry.split or known.split)
    tells = layout.identity or "id" in layout.lists.values()
    nameless = [image for image, entry in entries.items() if entry.id is None]
    if tells and len(nameless) == len(entries):
        raise ManifestError(f"{some(map(str, tables))}: no identities; pass {layout.files}")
    for image in nameless:
        entries[image] = entries[image]._replace(id=image)
    return entries


def _entries(layout: Layout, table: Path) -> Iterator[tuple[str, Entry]]:
    split = _split_named(table.name) or layout.unnamed_split if layout.named_splits else None
    meaning = next((what for part, what in layout.lists.items() if part in table.name), None)
    if meaning is not None and table.suffix == ".txt":
        for words in map(str.split, read_lines(table, what="list of images")):
            value = words[1] if meaning and len(words) > 1 else None
            yield (
                _stem(words[0]),
                Entry(
                    id=value if meaning == "id" else None,
                    split=_split_of(table, value, layout) if meaning == "split" else split,
                ),
            )
        return
    what = "publisher's table"
    header = {name.strip().casefold() for name in read_header(table, what=what)}
    image, *_ = [*_present(layout.image, header), None]
    if image is None:
        raise ManifestError(
            f"{table}: no column {' or '.join(map(repr, layout.image))}; expected {layout.files}"
        )
    identities = _present(layout.identity, header)
    splits = _present(layout.split, header)
    names = (image, *identities, *splits)
    cells = read_table(table, Columns(what=what, required=names)).cells
    for row in zip(*(cells[name] for name in names), strict=True):
        name = _stem(row[0].strip())
        ids = (cell.strip() for cell in row[1 : 1 + len(identities)])
        known = next(filter(None, ids), None)
        if layout.identity_in_name is not None:
            found = layout.identity_in_name.match(name)
            known = found[0] if found else None
        word = row[-1].strip() if splits else None
        yield name, Entry(known, split if word is None else _split_of(table, word, layout))


def _present(names: Iterable[str], header: set[str]) -> list[str]:
    return [name for name in names if name.casefold() in header]


def _split_of(table: Path, word: str | None, layout: Layout) -> str:
    if word is None or word not in layout.words:
        raise ManifestError(f"{table}: no split {word!r}; expected {', '.join(layout.words)}")
    return layout.words[word]


def _split_named(name: str) -> str | None:
    """Return the split that the name of a table tells."""
    name = name.casefold()
    if "train" in name:
        return "TRAIN"
    if "val" in name or "dev" in name:
        return "VAL"
    return "TEST" if "test" in name else None


def _stem(path: str) -> str:
    """Return a file's name without folder and suffix."""
    name = path.replace("\\", "/").rpartition("/")[2].rpartition(MEMBER)[2]
    for suffix in _VOLUME_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix}".lower() in IMAGE_SUFFIXES else name

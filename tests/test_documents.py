import dataclasses
import json
from typing import Literal

import pytest

from lcmem_cli.engine.documents import FileName, check_document, parse_document, read_document
from lcmem_cli.engine.errors import CorruptFileError, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    path: FileName
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    format: Literal["parts"]
    schema: Literal[3]
    parts: tuple[Part, ...]
    interval: tuple[float, float] | None


VALUES = {
    "format": "parts", "schema": 3, "interval": [0, 1], "new": "ignored",
    "parts": [{"path": "not-utf8-\udcff", "share": 1}],
}  # fmt: skip
WHOLE = Whole(
    format="parts",
    schema=3,
    parts=(Part(path="not-utf8-\udcff", share=1.0),),
    interval=(0.0, 1.0),
)


def test_a_document_is_read_as_its_type(tmp_path):
    (tmp_path / "whole.json").write_text(json.dumps(VALUES))
    assert read_document(tmp_path / "whole.json", Whole, remedy="run again") == WHOLE
    (tmp_path / "part.toml").write_text('path = "a.png"\nshare = 0.5\n')
    part = read_document(tmp_path / "part.toml", Part, remedy="run again")
    assert part == Part(path="a.png", share=0.5)
    row = {"path": "a.png", "share": "0.5"}  # of a table
    assert check_document(row, Part, source="a table", remedy="run again") == part


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"schema": 99}, InputError, r"whole: schema 99, this lcmem reads 3; run again"),
        ({"format": "x"}, InputError, "format 'x', this lcmem reads 'parts'"),
        ({"parts": [{"path": "a"}]}, CorruptFileError, r"parts\.0\.share: Field required; run"),
        ({"parts": [{"path": 1}]}, CorruptFileError, r"parts\.0\.path: .* \(and 1 more\)"),
        ({"interval": [0]}, CorruptFileError, r"interval\.1: Field required; run again"),
    ],
)
def test_what_is_wrong_with_a_document_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        parse_document(json.dumps(VALUES | changed), Whole, source="whole", remedy="run again")


@pytest.mark.parametrize("text", ["{", "[]", b"\xff", "[" * 100_000])
def test_other_text_is_no_document(text):
    with pytest.raises(CorruptFileError, match=r"whole: not valid.*; run again"):
        parse_document(text, Whole, source="whole", remedy="run again")


def test_a_missing_document_is_named(tmp_path):
    for path in (tmp_path / "no.json", tmp_path / "no" / "no.json"):
        with pytest.raises(InputError, match=r"no\.json: no such file; run again"):
            read_document(path, Whole, remedy="run again")
    with pytest.raises(InputError, match="cannot be read"):
        read_document(tmp_path, Whole, remedy="run again")

"""Cells of CSV files: text for spreadsheets, and the same text when read back."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcmem_cli.engine.files import guarded, unguarded, write_csv

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", "'=1", "''-a")


@pytest.mark.parametrize("cell", FORMULAS)
def test_formulas_become_text(cell):
    assert guarded(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["-0.5", "+3", "-1e-05", "-.5", "0.5", "a=1", "'", "", "a/-b.png"])
def test_numbers_and_words_stay_as_they_are(cell):
    assert guarded(cell) == cell


@given(st.text(alphabet="'=+-@\t\r.15ea"))
def test_every_text_is_read_back(text):
    assert unguarded(guarded(text)) == text


def test_a_file_holds_no_formula(tmp_path):
    write_csv(tmp_path / "table.csv", ("name", "value"), [(cell, "-1.5") for cell in FORMULAS])
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [unguarded(name) for name, _ in rows] == list(FORMULAS)
    assert all(name.startswith("'") and value == "-1.5" for name, value in rows)

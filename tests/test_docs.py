"""The set-up commands stand at README's top."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_set_up_stands_on_the_first_screen():
    head = "\n".join(README.read_text().splitlines()[:60])
    assert "pip install" in head and "lcmem demo" in head and "pytest" in head

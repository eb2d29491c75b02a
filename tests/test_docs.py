"""The docs hold what they promise: links, commands, samples, figures, plain sentences."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer.main
from figures import CARD, MARKED, PAGES, ROOT, figures, rewritten
from scipy.stats import beta

from lcmem_cli.cli.app import app
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.evaluation.calibration import required_null_size

README = ROOT / "README.md"
GENERATED = ROOT / "docs" / "cli.md"
WRITTEN = [page for page in PAGES if page != GENERATED]
MAX_WORDS = 25

_FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_LIST_ITEM = re.compile(r"^\s*([-*]|\d+\.)\s+")
_ENDS_SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][*)]))\s+(?=[*A-Z`(\[\"0-9])")
_MEASURED = re.compile(r"(?<![-\d])\d+\.\d+|\d+ %")
_SHELLS = ("bash", "yaml", "console")
_RUN = ("audit", "filter", "infer")


def of_pages(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path, *kinds: str) -> list[str]:
    return [match["body"] for match in _FENCE.finditer(read(page)) if match["kind"] in kinds]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """Return the arguments of each fenced lcmem command, as a shell would split them."""
    for body in fences(page, *_SHELLS):
        for line in body.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word[0] not in "&|;<>":
                    words.append(word)
                    continue
                for number, name in enumerate(words):
                    is_called = number == 0 or words[number - 1] in ("-m", "run:")
                    if Path(name).name in ("lcmem", "lcmem_cli") and is_called:
                        yield words[number + 1 :]
                        break
                words = []


def check_command(arguments: list[str]) -> None:
    """Parse a command line as ``lcmem`` would, without running it."""
    command = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "commands"):
        while words and words[0].startswith("-"):
            option = words.pop(0)
            known = {name: p for p in command.params for name in p.opts}
            assert option in known, f"lcmem has no option {option}"
            if not known[option].is_flag:
                words.pop(0)
        if not words:
            return
        name = words.pop(0)
        assert name in command.commands, f"lcmem has no command {name}"
        command = command.commands[name]
    command.make_context(command.name, words)


@of_pages(WRITTEN)
def test_links_lead_to_files_and_headings(page):
    text = _FENCE.sub("", read(page))
    for target in [match["target"] for match in _LINK.finditer(text)]:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


@of_pages(sorted((ROOT / "docs").glob("*.md")))
def test_the_index_of_the_docs_lists_every_page(page):
    index = ROOT / "docs" / "README.md"
    targets = {match["target"] for match in _LINK.finditer(read(index))}
    assert page == index or page.name in targets


@pytest.mark.parametrize(("page", "most"), [(README, 150), (CARD, 90)], ids=["readme", "card"])
def test_the_first_pages_are_short(page, most):
    assert len(read(page).splitlines()) <= most


def test_the_set_up_stands_on_the_first_screen():
    head = "\n".join(read(README).splitlines()[:60])
    assert "pip install" in head and "lcmem demo" in head and "pytest" in head


@of_pages(WRITTEN)
def test_fenced_commands_parse(page):
    for arguments in commands(page):
        try:
            check_command(arguments)
        except Exception as error:  # usage errors have no public class in Typer
            message = getattr(error, "format_message", lambda error=error: str(error))()
            pytest.fail(f"lcmem {' '.join(arguments)}: {message}")


@pytest.mark.parametrize(
    "line",
    [
        "lcmem audit A --against B",  # no --output
        "lcmem audit A --against B -o c --no-such-flag",
        "lcmem audit A --against B -o c --null wrong",
        "lcmem index bild A",
        "lcmem --no-such-flag info",
    ],
)
def test_wrong_commands_are_told(line, tmp_path):
    (page := tmp_path / "page.md").write_text(f"```bash\n{line}\n```\n")
    with pytest.raises(BaseException):  # noqa: B017 - an assertion or Typer's unnamed error
        check_command(next(commands(page)))


@of_pages([page for page in WRITTEN if fences(page, "yaml")])
def test_workflow_files_are_valid(page):
    yaml = pytest.importorskip("yaml")
    for body in fences(page, "yaml"):
        workflow = yaml.safe_load(body)
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["runs-on"] and all("uses" in step or "run" in step for step in job["steps"])


def test_the_table_of_held_out_images_is_right():
    """With the fewest images the largest null score is the threshold, so the rate is Beta(1, m)."""
    pattern = r"^\| ([\d.]+) % \| (\d+) \| ([\d.]+) to ([\d.]+) % \|$"
    rows = re.findall(pattern, read(ROOT / "docs" / "ci.md"), re.MULTILINE)
    assert len(rows) == 5
    for rate, needed, low, high in rows:
        assert int(needed) == required_null_size(float(rate) / 100)
        ends = beta.ppf([0.025, 0.975], 1, int(needed))
        assert [f"{100 * end:.3g}" for end in ends] == [low, high]


def test_readme_names_the_docs_of_every_task():
    targets = {match["target"] for match in _LINK.finditer(read(README))}
    wanted = ("audit", "ci", "reproduce", "training", "detectors", "sources", "python", "cli")
    assert {f"docs/{name}.md" for name in wanted} <= targets


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images that README and docs/python.md speak of, drawn and small."""
    folder = tmp_path_factory.mktemp("docs")
    seed = 0
    for name, count in (("generated", 6), ("training", 12), ("real", 99)):
        (folder / name).mkdir()
        for number in range(count):
            draw_scene(seed, side=48).save(folder / name / f"{number:03}.png")
            seed += 1
    draw_scene(6, side=48).save(folder / "generated" / "copy.png")  # of training/000.png
    draw_scene(6, side=48).save(folder / "a.png")
    np.savez(folder / "samples.npz", np.stack([draw_scene(i, side=48) for i in range(6)]))
    shutil.make_archive(str(folder / "training"), "zip", folder / "training")
    draw_scene(7, side=48).save(folder / "b.png")
    return folder


def test_the_commands_of_readme_run(workspace, run_cli, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LCMEM_CACHE", "cache")
    ran = []
    for arguments in commands(README):
        if arguments[0] in _RUN and Path(arguments[1]).exists():
            run_cli(*arguments)
            ran.append(arguments[0])
    assert set(ran) == set(_RUN)


@of_pages([page for page in WRITTEN if fences(page, "python")])
def test_python_samples_compile(page):
    for number, body in enumerate(fences(page, "python"), start=1):
        compile(body, f"{page.name}, sample {number}", "exec")


def test_the_sample_detector_runs(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("lcmem_cli.engine.detectors.registry._registered", {})
    names: dict[str, object] = {"__name__": "sample"}
    for body in fences(ROOT / "docs" / "detectors.md", "python"):
        exec(compile(body, "docs/detectors.md", "exec"), names)
    assert names["load_detector"]("mean-colour").score("a.png", "a.png") == 0


def test_python_samples_of_the_python_page_run(workspace, run_cli, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("LCMEM_CACHE", "cache")
    run_cli("index", "build", "training", "-o", "index")
    names: dict[str, object] = {}
    for body in fences(ROOT / "docs" / "python.md", "python"):
        exec(compile(body, "docs/python.md", "exec"), names)
    assert names["result"].num_exact_copies == 1  # type: ignore[attr-defined]


@of_pages(PAGES)
def test_figures_are_those_of_the_json_file(page):
    text = read(page)
    assert rewritten(text) == text, "run: python tests/figures.py"
    marks = len(re.findall(r"<!-- figures: ", text))
    assert marks == len(MARKED.findall(text)), "a mark without a table below it"


@of_pages(PAGES)
def test_the_command_stands_beside_its_figures(page):
    text = re.sub(r"\\\n\s*", "", read(page))
    for match in MARKED.finditer(read(page)):
        entry = figures()[match["name"]]
        assert re.fullmatch(r"[0-9a-f]{7,40}", entry["commit"])
        for command in entry["command"]:
            assert command in text, f"{match['name']}: the page lacks its command: {command}"


def test_every_figure_is_shown_somewhere():
    shown = {match["name"] for page in PAGES for match in MARKED.finditer(read(page))}
    assert shown == set(figures())


def test_readme_has_no_figures_besides():
    text = MARKED.sub("", _COMMENT.sub("", read(README)))
    known = {"2512.14421", "1 %"}  # the paper, the usual rate
    assert set(_MEASURED.findall(_FENCE.sub("", text))) <= known


def sentences(page: Path) -> Iterator[str]:
    """Return the sentences of a page's prose; roughly, for counting words."""
    text = _COMMENT.sub("", _FENCE.sub("\n", read(page)))
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith(("#", "|", "!")):
            stripped = ""
        if (not stripped or _LIST_ITEM.match(line)) and block:
            prose = _LINK.sub(lambda m: m["text"], " ".join(block))
            yield from _ENDS_SENTENCE.split(re.sub(r"`[^`]*`", "`code`", prose))
            block = []
        if stripped:
            block.append(_LIST_ITEM.sub("", line).strip())


@of_pages(WRITTEN)
def test_sentences_are_short(page):
    long = [s for s in sentences(page) if len(re.findall(r"\S*\w\S*", s)) > MAX_WORDS]
    assert not long, "\n".join(long)


def test_long_sentences_are_told(tmp_path):
    (page := tmp_path / "page.md").write_text(f"- {'word ' * 26}end.\n- Short. One.\n")
    assert [len(s.split()) for s in sentences(page)] == [27, 1, 1]

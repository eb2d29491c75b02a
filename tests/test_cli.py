"""The command line itself: help, global options, closed streams, pipes, limits and messages."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest
import typer.main

from lcmem_cli.cli.app import app
from lcmem_cli.cli.reference import reference

ROOT = typer.main.get_command(app)


def leaves(command, words=()):
    """Yield every command that does something, with its name."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*words, name))
    if not hasattr(command, "commands"):
        yield " ".join(words), command


COMMANDS = dict(leaves(ROOT))
GLOBAL = {"--quiet", "--debug", "--log-format", "--help"}


def shell(line, **environment):
    """Run a line of shell in which ``lcmem`` is the command; return code, stdout, stderr."""
    program = f'lcmem() {{ {sys.executable} -m lcmem_cli "$@"; }}\n{line}'
    done = subprocess.run(
        ["bash", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "index", "config", *COMMANDS])
def test_help_fits_80_columns_and_stands_in_panels(run_cli, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    text = run_cli(*name.split(), "--help").stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"<\w+>|bool|Options:", text)
    if name in COMMANDS:
        panels = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
        assert panels[-2:] == ["Everywhere:", "Examples:"], panels


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_a_command_are_lines_that_it_accepts(name):
    command = COMMANDS[name]
    lines = command.epilog.splitlines()
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[: 1 + len(name.split())] == ["lcmem", *name.split()]
        with typer.Context(ROOT, info_name="lcmem") as root:
            command.make_context(name, words[1 + len(name.split()) :], parent=root)


def test_commands_stand_in_panels_by_task(run_cli):
    text = run_cli("--help").stdout
    titles = ("Audit a set", "Compare pairs and detectors", "Train", "Models", "Tools")
    places = [text.index(f"{title}:\n") for title in titles]
    assert places == sorted(places)
    first = text[places[0] : places[1]]
    assert all(f"\n  {name} " in first for name in ("audit", "filter", "index", "demo"))


def test_every_option_has_one_declaration_or_says_why():
    """An option of many commands says the same in all, or it is known to differ."""
    differ = {
        "--adapt", "--against", "--checkpoint", "--codec", "--config", "--detector", "--detectors",
        "--filelist", "--fit-split", "--held-out", "--input-range", "--input-size", "--latents",
        "--max-unreadable", "--output", "--pairs", "--resume", "--revision", "--size", "--top-k",
        "--verify",
    }  # fmt: skip
    said = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            said.setdefault(parameter.opts[0], set()).add((parameter.help, parameter.metavar))
    several = {flag for flag, texts in said.items() if len(texts) > 1 and flag.startswith("--")}
    assert several == differ


PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


@pytest.mark.skipif(
    tuple(map(int, version("typer").split(".")[:2])) < (0, 29), reason="it lays help out otherwise"
)
def test_the_reference_in_the_docs_is_what_help_says():
    command = "python -m lcmem_cli.cli.reference > docs/cli.md"
    assert PAGE.read_text() == reference(), f"run: {command}"
    assert command in PAGE.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_flag_stands_in_the_reference_under_its_own_heading(name):
    _, _, section = PAGE.read_text().partition(f"\n## lcmem {name}\n")
    section = section.partition("\n## ")[0]
    assert " ".join(COMMANDS[name].help.split())[:40] in section
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name} {parameter.opts} has no help"
        for flag in (*parameter.opts, *parameter.secondary_opts):
            shown = flag if flag.startswith("-") else parameter.metavar
            assert re.search(rf"^  .*{re.escape(shown)}\b", section, re.MULTILINE), shown


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ("audit:AuditOptions", "evaluation.audit.run:audit"),
        ("benchmark:BenchmarkOptions", "evaluation.study.benchmark:benchmark"),
        ("robustness:RobustnessOptions", "evaluation.study.robustness:robustness"),
        ("checkpoints:ConvertOptions", "models.convert:convert_reference"),
        ("demo:DemoOptions", "evaluation.demo:run_demo"),
        ("hub:PushOptions", "models.hub:push"),
        ("hub:PullOptions", "models.hub:pull"),
    ],
)
def test_an_option_has_the_name_of_the_parameter_that_it_becomes(options, function):
    """These commands hand all that they are given to one function."""
    kind = resolve_name(f"lcmem_cli.cli.{options}")
    names = [name for base in kind.__mro__ for name in inspect.get_annotations(base)]
    given = kind(**dict.fromkeys(names, ",")).arguments()
    known = inspect.signature(resolve_name(f"lcmem_cli.engine.{function}")).parameters
    of_python = {"value_range", "task"}  # of images in memory; and ``leaks`` is another command
    assert set(given) == set(known) - of_python


# --- global options ------------------------------------------------------------------------------


def test_global_options_are_taken_in_any_place(run_cli, tmp_path):
    for before, behind in (((), ("--debug",)), (("--debug",), ())):
        done = run_cli(*before, "info", tmp_path / "nothing", *behind, exit_code=2)
        assert "Traceback" in done.stderr
    done = run_cli("info", tmp_path / "nothing", "--log-format", "json", exit_code=2)
    assert done.stderr.startswith('{"time"')


def test_quiet_behind_the_command_quiets_it(run_cli, tmp_path):
    target = tmp_path / "mine.toml"
    assert run_cli("config", "cp", "stage1", target).stderr == f"wrote {target}\n"
    target.unlink()
    assert run_cli("config", "cp", "stage1", target, "-q").stderr == ""
    other = tmp_path / "other.toml"
    assert run_cli("config", "cp", "stage1", other).stderr, "it holds for one command only"


# --- streams -------------------------------------------------------------------------------------

needs_shell = pytest.mark.skipif(os.name == "nt", reason="needs a shell")


@needs_shell
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("command", "code"), [("config ls", 0), ("config check nosuch", 2)])
def test_closed_streams_are_no_error(closed, command, code):
    done, out, err = shell(f"lcmem {command} {closed}")
    assert done == code
    assert (out == "") == (">&-" in closed.split() or code == 2)
    assert (err == "") == ("2>&-" in closed.split() or code == 0), err
    assert "Traceback" not in out + err


@needs_shell
def test_a_file_never_takes_the_number_of_a_closed_stream(tmp_path):
    """A library that writes to standard error would write into the result."""
    program = (
        "import os, sys\n"
        "import lcmem_cli.cli.app as cli\n"
        "def work(prog_name):\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        file.write('result')\n"
        "        file.flush()\n"
        "        os.write(2, b'a warning of a library')\n"
        "cli.app = work\n"
        "from lcmem_cli.__main__ import main\n"
        "main()\n"
    )
    (tmp_path / "program.py").write_text(program)
    target = tmp_path / "result"
    code, _, _ = shell(f"{sys.executable} {tmp_path / 'program.py'} {target} 2>&-")
    assert code == 0 and target.read_text() == "result"


@needs_shell
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("lcmem config ls | true; exit ${PIPESTATUS[0]}", 1),
        ("lcmem --log-format json config ls --json | true; exit ${PIPESTATUS[0]}", 1),
        ("lcmem config check nosuch 2>&1 | true; exit ${PIPESTATUS[0]}", 1),
        ("lcmem audit --help | head -1; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_a_reader_that_goes_early_is_no_complaint(line, code):
    done, _, err = shell(line)
    assert (done, err) == (code, "")


@needs_shell
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
@pytest.mark.parametrize("command", ["config ls", "config ls --json", "--version"])
def test_output_that_cannot_be_written_is_an_error(command):
    code, _, err = shell(f"lcmem {command} > /dev/full")
    assert code == 1 and len(err.splitlines()) == 1 and "No space left" in err


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "check", "a\x1b[31m"),
        ("no\x1b[31m",),
        ("config", "ls", "\x1b[31m"),
        ("config", "ls", "--\x1b[31m"),
        ("audit", "a", "--null", "\x1b[31m"),
        ("infer", "\x1b[31m", "b"),
        ("audit", "\x1b[31m", "--against", "b", "-o", "c"),
    ],
)
def test_control_characters_are_escaped(run_cli, arguments):
    done = run_cli(*arguments, exit_code=2)
    assert "\x1b" not in done.stderr + done.stdout and "\\x1b[31m" in done.stderr


def test_a_usage_error_is_one_message_that_names_the_help(run_cli):
    done = run_cli("audit", "a", exit_code=2)
    assert done.stderr == "error: Missing option '--against'.\nsee lcmem audit --help\n"


def test_the_bare_command_shows_help(run_cli):
    assert "Audit a set" in run_cli(exit_code=2).stderr


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
)
def test_too_little_memory_is_one_line(run_cli, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr("lcmem_cli.engine.config.shipped_configs", fail)
    done = run_cli("config", "ls", exit_code=1)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: not enough memory (")


@needs_shell
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit that is kept")
def test_too_little_room_for_addresses_is_told(tmp_path):
    code, _, err = shell("ulimit -v 1500000; lcmem info")
    assert code == 1 and "Traceback" not in err
    assert [line.partition(":")[0] for line in err.splitlines()] == ["warning", "error"], err

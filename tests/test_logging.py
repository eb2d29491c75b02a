"""``--log-format json``: every line on stderr is a JSON object, whoever wrote it."""

import json
import os
import subprocess
import sys
import time

import pytest

from lcmem_cli.cli import render
from lcmem_cli.engine.data.manifest import load_manifest, write_manifest

pytestmark = pytest.mark.usefixtures("no_drawing")

LEVELS = {"info", "warning", "error"}


def parse(code, expected_code, stderr):
    """Return the lines of stderr, parsed."""
    assert code == expected_code, stderr
    lines = [json.loads(line) for line in stderr.splitlines()]
    for line in lines:
        assert abs(line["time"] - time.time()) < 600
        assert line["level"] in LEVELS and isinstance(line["event"], str)
    return lines


@pytest.fixture
def run(server):
    """Run lcmem; return stdout and the parsed lines of stderr."""

    def run(*arguments, code=0):
        done = server.run("--log-format", "json", *arguments)
        return done.stdout, parse(done.code, code, done.stderr)

    return run


def run_program(program, *arguments, code=0):
    """Run a program in a fresh process; return the parsed lines of stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program, "--log-format", "json", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return parse(done.returncode, code, done.stderr)


def named(lines, event):
    return [line for line in lines if line["event"] == event]


def test_a_training_logs_tasks_epochs_and_warnings(image_folder, tiny_codec, tmp_path, run):
    source, target = tmp_path / "list.csv", tmp_path / "run"
    write_manifest(load_manifest(image_folder), source)
    common = ["--filelist", source, "--basedir", image_folder]
    run("latents", *common, "--codec", tiny_codec, "--size", 32, "-o", tmp_path / "latents")
    out, lines = run(
        "train-stage1", "--latents", tmp_path / "latents", "-o", target, "--json",
        f"--set=codec.name={tiny_codec}",
        "--set=image.size=32", "--set=network.backbone=test_resnet", "--set=schedule.epochs=2",
        "--set=network.num_features=8", "--set=schedule.batch_size=8", "--set=runtime.device=cpu",
    )  # fmt: skip
    assert json.loads(out)["num_epochs"] == 2
    assert [line["number"] for line in named(lines, "epoch")] == [1, 2]
    started, ended = named(lines, "task-started"), named(lines, "task-ended")
    assert [s["task"] for s in started] == [e["task"] for e in ended]
    assert {"epoch 1/2", "epoch 2/2"} <= {s["task"] for s in started}
    assert not any(e["failed"] for e in ended)
    assert all(e["done"] == e["total"] for e in ended if e["task"].startswith("epoch"))


def test_a_task_that_fails_says_so_and_the_error_is_the_last_line(image_folder, tmp_path):
    program = (
        "import sys\n"
        "from lcmem_cli.engine.detectors import pixel\n"
        "from lcmem_cli.engine.errors import LcmemError\n"
        "def fail(self, batch): raise LcmemError('the network broke')\n"
        "pixel.MSE.embed_batch = fail\n"
        "from lcmem_cli.__main__ import main\n"
        "main()\n"
    )
    index = ["index", "build", image_folder, "-o", tmp_path / "index", "--detector", "mse"]
    lines = run_program(program, *index, code=1)
    assert [line["failed"] for line in named(lines, "task-ended")] == [False, True]  # listing, too
    assert lines[-1]["level"] == "error" and "the network broke" in lines[-1]["message"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["infer", "nosuch.png", "other.png"], 2, "nosuch.png"),
        (["infer", "a.png"], 2, "two images"),
        (["infer", "--nosuch"], 2, "No such option"),
        (["--nosuch"], 2, "No such option"),
        (["config", "check", "nosuch"], 2, "no config file"),
        (["check", "--images", "some"], 2, "expected a number"),
        (["index"], 2, "no command"),
    ],
)
def test_errors_are_lines_too(run, arguments, code, words):
    _, lines = run(*arguments, code=code)
    errors = [line for line in lines if line["level"] == "error"]
    assert len(errors) == 1 and words in errors[0]["message"]
    assert lines[-1] is errors[0]


def test_what_libraries_write_becomes_lines():
    program = (
        "import sys, warnings, logging\n"
        "from lcmem_cli.cli.app import app\n"
        "from lcmem_cli.engine import config\n"
        "def talk():\n"
        "    warnings.warn('old name', FutureWarning)\n"
        "    logging.getLogger('lib').warning('two\\nlines')\n"
        "    sys.stderr.write('50%\\r100%\\n')\n"
        "    sys.stderr.write('no end')\n"
        "    return {}\n"
        "config.shipped_configs = talk\n"
        "app()\n"
    )
    lines = run_program(program, "config", "ls")
    assert named(lines, "python-warning")[0]["message"] == "old name"
    said = [line["message"] for line in named(lines, "output")]
    assert said == ["two", "lines", "50%", "100%", "no end"]


def test_an_unexpected_traceback_is_made_of_lines():
    program = (
        "from lcmem_cli.cli.app import app\n"
        "from lcmem_cli.engine import config\n"
        "def fail(): raise RuntimeError('a bug')\n"
        "config.shipped_configs = fail\n"
        "app()\n"
    )
    lines = run_program(program, "config", "ls", code=1)
    assert any("a bug" in line["message"] for line in named(lines, "output"))


def test_quiet_keeps_warnings_only(capsys, monkeypatch):
    monkeypatch.setattr(render, "settings", render.Settings())
    render.settings.log_format, render.settings.quiet = "json", True
    reporter = render.reporter()
    with reporter.task("work", 3) as task:
        task.advance(3)
    reporter.event("epoch", number=1)
    render.note("remark")
    reporter.warn("weaker")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [("warning", "weaker")]


def test_progress_lines_are_few(capsys, monkeypatch):
    monkeypatch.setattr(render, "settings", render.Settings(log_format="json"))
    clock = [100.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: clock[0])
    with render.reporter().task("work", 100, unit="image") as task:
        for number in range(100):
            clock[0] += 0.01 if number < 20 else 0.2  # an earlier run had done the first ones
            task.advance(loss=float("nan"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    progress = named(lines, "progress")
    assert 3 <= len(progress) <= 4 and progress[0]["total"] == 100 and progress[0]["loss"] is None
    assert progress[-1]["seconds_left"] == pytest.approx((100 - progress[-1]["done"]) / 5, abs=1)
    assert lines[-1]["seconds"] == pytest.approx(16.2, abs=0.5)


def test_debug_shows_the_traceback_and_keeps_the_exit_code(run_cli, tmp_path):
    for options, shown in (((), False), (("--debug",), True)):
        done = run_cli(*options, "info", tmp_path / "nothing", exit_code=2)
        assert ("Traceback" in done.stderr) is shown and "no such file" in done.stderr

"""Rules of the layout: who may import whom, and what the command line must not load."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_checkpoint

import lcmem_cli
from lcmem_cli.engine.data.scenes import draw_scene
from lcmem_cli.engine.models.checkpoint import save_checkpoint
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec

PACKAGE = Path(lcmem_cli.__file__).parent
BASE = {
    "compiled",
    "errors",
    "files",
    "results",
    "reporter",
    "config",
    "documents",
    "distributed",
    "runs",
    "compute",
    "precision",
}
MAY_IMPORT = {
    "data": {"data"},
    "models": {"models"},
    "store": {"store", "data", "models"},
    "detectors": {"detectors", "store", "data", "models"},
    "verification": {"verification", "detectors", "store", "data"},
    "report": {"report", "data"},
    "evaluation": {
        "evaluation",
        "training",
        "report",
        "verification",
        "detectors",
        "store",
        "data",
        "models",
    },
    "serving": {"serving", "evaluation", "verification", "detectors", "store", "data", "models"},
    "training": {"training", "evaluation", "report", "detectors", "store", "data", "models"},
    "describe": {"models", "store"},
    "check": {"training", "evaluation", "detectors", "store", "data", "models"},
}
HEAVY = (
    "torch", "timm", "diffusers", "matplotlib", "sklearn", "scipy", "pandas", "numpy", "PIL", "cv2",
)  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = {
    ".".join(("lcmem_cli", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in MODULES
}


def imported_files(path):
    """Return the files of the package that a file imports anywhere, the public names apart."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= named & set(FILES) or {node.module}
    return found & set(FILES) - {"lcmem_cli"}


def circle(graph):
    """Return the files of a circle, or nothing."""
    left = dict(graph)
    while True:  # what imports nothing that is left is in no circle
        free = [name for name, targets in left.items() if not targets & set(left)]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]


def test_no_files_import_each_other_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]
    found = circle({name: imported_files(path) for name, path in FILES.items()})
    assert not found, f"in a circle, or leading into one: {found}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_in_one_direction(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for name in imports(path):
        if not name.startswith("lcmem_cli."):
            assert name.split(".")[0] != "typer" or parts[0] == "cli", name
            assert name.split(".")[0] != "rich" or parts == ("cli", "render"), name
            continue
        target = name.split(".")[1:]
        if parts[0] == "engine":
            assert target[0] != "cli", f"{path} imports the command line"
            section = parts[1]
            if len(target) > 1 and target[1] not in BASE and section not in BASE | {"__init__"}:
                assert target[1] in MAY_IMPORT[section], f"{section} may not import {name}"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["infer", "--nosuch"], 2), (["nosuch"], 2),
     (["infer", "one.png"], 2), (["config", "ls"], 0)],
)  # fmt: skip
def test_help_and_usage_errors_load_nothing_heavy(arguments, code):
    program = (
        "import sys\n"
        "from lcmem_cli.cli.app import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert (end.code or 0) == %d, end.code\n"
        % code
        + f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def modules(importtime):
    """Return the names of the modules that ``-X importtime`` lists."""
    return {line.rpartition("|")[2].strip() for line in importtime.splitlines()}


def test_infer_on_pixels_does_without_diffusers(tmp_path):
    spec = NetworkSpec(
        backbone="resnet10t", in_channels=3, num_features=8, input_size=32, normalisation="imagenet"
    )
    checkpoint = random_checkpoint(spec, load_codec("none"), image_size=32)
    save_checkpoint(tmp_path / "pixels.safetensors", checkpoint)
    for seed in range(2):
        draw_scene(seed).save(tmp_path / f"{seed}.png")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lcmem_cli", "infer", "0.png", "1.png",
         "--checkpoint", "pixels.safetensors"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = modules(done.stderr)
    assert "timm" in loaded and "diffusers" not in loaded


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "lcmem_cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"lcmem {lcmem_cli.__version__}"


def test_public_names_are_imported_on_first_use():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, lcmem_cli; assert 'torch' not in sys.modules"]
    )
    assert done.returncode == 0
    for name in lcmem_cli.__all__:
        assert getattr(lcmem_cli, name) is not None
    assert callable(lcmem_cli.audit)
    with pytest.raises(AttributeError):
        _ = lcmem_cli.nosuch


def complete(*words):
    """Return what bash would offer for the last word, and the modules that were loaded."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lcmem_cli"],
        env={**os.environ, "_LCMEM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words),
             "COMP_CWORD": str(len(words) - 1)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), modules(done.stderr)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("lcmem", "train"), {"train-codec", "train-stage1"}),
        (("lcmem", "finetune", "--max"), {"--max-unreadable"}),
        (("lcmem", "train-stage1", "--config", "mini/s"), {"mini/stage1"}),
        (("lcmem", "config", "show", "fine"), {"finetune"}),
    ],
)
def test_completion_is_quick_and_knows_commands_options_and_configs(words, offered):
    found, loaded = complete(*words)
    assert set(found) == offered
    assert "typer" in loaded and not loaded & set(HEAVY)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_completion_is_installed_for_the_shell_in_use(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    program = f"{sys.executable} -m lcmem_cli --%s; exit $?"

    def bash(option):
        done = subprocess.run(
            ["bash", "-c", program % option], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "complete -o default -F _lcmem_completion lcmem" in bash("show-completion")
    assert "bash completion installed" in bash("install-completion")
    script = tmp_path / ".bash_completions" / "lcmem.sh"
    assert "_LCMEM_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()

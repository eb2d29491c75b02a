"""Checkpoints by name: fetched from a cache laid out as the hub's, published to a fake hub."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import random_checkpoint
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import (
    CheckpointError,
    HubError,
    InputError,
    LcmemError,
    WeightsUnavailableError,
)
from lcmem_cli.engine.models import checkpoint as ckpt
from lcmem_cli.engine.models import hub
from lcmem_cli.engine.models.card import model_card
from lcmem_cli.engine.models.codec_loading import load_codec
from lcmem_cli.engine.models.siamese import NetworkSpec
from lcmem_cli.engine.models.weights import hub_answers
from lcmem_cli.engine.results import Threshold

REPO = "somebody/model"
TRANSFER = (
    "for other kinds of images 1.0% became 0.20% to 3.00%, in the median 1.60% (2 kinds, each left "
    "out)"
)
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def make_checkpoint(path: Path, *, seed: int = 0) -> ckpt.Checkpoint:
    """Write a small random checkpoint of a network that sees pixels, with a threshold."""
    spec = NetworkSpec(
        backbone="test_resnet",
        in_channels=3,
        num_features=4,
        input_size=32,
        normalisation="imagenet",
    )
    training = {"config": {"schedule": {"epochs": 3}}}
    unfitted = random_checkpoint(
        spec, load_codec("none"), image_size=32, seed=seed, training=training
    ).with_fingerprint()
    threshold = Threshold(
        value=0.75, kind="fpr", rate=0.01, fingerprint=unfitted.fingerprint,
        fitted_on="VAL | pairs\nof <b>drawn</b> scenes", num_positives=12, num_negatives=3400,
        achieved_fpr=0.0095, achieved_recall=None, unseen_fprs={"drawn": 0.002, "scans": 0.03},
    )  # fmt: skip
    return ckpt.save_checkpoint(path, dataclasses.replace(unfitted, thresholds=(threshold,)))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A folder in the layout of the hub's cache with two revisions, and no connection."""
    folder = tmp_path / "hub"
    repo = folder / f"models--{REPO.replace('/', '--')}"
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        blob = repo / "blobs" / str(seed)
        make_checkpoint(blob, seed=seed)
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / hub.WEIGHTS_FILE).symlink_to(blob)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def fingerprint(cache: Path, seed: int) -> str:
    blob = cache / f"models--{REPO.replace('/', '--')}" / "blobs" / str(seed)
    return ckpt.load_checkpoint(blob).fingerprint


@pytest.mark.parametrize(
    ("revision", "seed"), [(None, 0), ("main", 0), ("v1", 1), (COMMITS["v1"], 1)]
)
def test_the_wanted_revision_is_fetched_and_written(cache, tmp_path, revision, seed):
    target = tmp_path / "new" / "out.safetensors"
    result = hub.pull(REPO, target, revision=revision)
    assert ckpt.load_checkpoint(target).fingerprint == result.fingerprint
    assert result.fingerprint == fingerprint(cache, seed)
    assert result.commit == list(COMMITS.values())[seed]
    assert not target.is_symlink() and result.num_bytes == target.stat().st_size
    in_cache = hub.pull(REPO, revision=revision)
    assert Path(in_cache.path).is_relative_to(cache)


def test_pull_runs_from_the_command_line(cache, tmp_path):
    target = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "lcmem_cli", "pull", REPO, str(target), "--revision", "v1"]
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert fingerprint(cache, 1) in done.stdout and COMMITS["v1"] in done.stdout
    assert done.stderr == "" and target.is_file()


def test_the_embedded_checkpoint_is_not_asked_for(run_cli):
    assert "comes with lcmem" in run_cli("pull", "embedded", exit_code=2).stderr


def test_an_unreachable_hub_is_asked_once_and_the_cache_is_used(cache, monkeypatch, run_cli):
    asked = []

    def no_answer(self, repo_id, **options):
        asked.append(repo_id)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_answer)
    assert hub.pull(REPO).fingerprint == fingerprint(cache, 0)
    refused = run_cli("pull", "somebody/else", exit_code=1)
    assert refused.stderr.startswith("error: hf:somebody/else: not in the local cache")
    assert asked == [REPO, "somebody/else"]


def test_a_hub_that_refuses_does_answer(monkeypatch):
    for kind, answers in (("no repository", True), ("server", True), ("other", False)):
        error = ERRORS[kind]

        def fail(self, repo_id, error=error, **options):
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
        assert hub_answers(REPO) is answers


def test_what_is_not_cached_cannot_be_had_offline(cache, run_cli, tmp_path):
    shown = run_cli("pull", "somebody/else", tmp_path / "out", "--revision", "v2", exit_code=1)
    assert "hf:somebody/else@v2: not in the local cache" in shown.stderr
    assert "lcmem pull somebody/else model.safetensors --revision v2" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_checkpoint_is_refused_and_not_written(cache, tmp_path):
    (blob,) = cache.glob("*/blobs/0")
    blob.unlink()
    save_file({"x": torch.zeros(2)}, blob)
    with pytest.raises(CheckpointError, match="not an lcmem checkpoint"):
        hub.pull(REPO, tmp_path / "out")
    blob.write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        hub.pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="is a folder"):
        hub.pull(REPO, tmp_path)


def test_checkpoints_have_names(cache, tmp_path):
    assert hub.locate_checkpoint(None) == ckpt.embedded_checkpoint()
    assert hub.locate_checkpoint("embedded") == ckpt.embedded_checkpoint()
    assert hub.locate_checkpoint(Path("embedded")) == Path("embedded")
    assert hub.locate_checkpoint("./embedded") == Path("embedded")
    assert hub.locate_checkpoint("run/c.safetensors") == Path("run/c.safetensors")
    assert COMMITS["v1"] in hub.locate_checkpoint(f"hf:{REPO}@v1").parts
    with pytest.raises(InputError, match="no revision after the @"):
        hub.locate_checkpoint(f"hf:{REPO}@")
    for name in ("a/b/c", "", "a b", "../x"):
        with pytest.raises(InputError, match="is no repository of the hub"):
            hub.locate_checkpoint(f"hf:{name}")


def test_every_command_takes_a_checkpoint_by_its_name_on_the_hub(cache, run_cli, image_folder):
    name = f"hf:{REPO}@{COMMITS['v1']}"
    wanted = fingerprint(cache, 1)
    assert json.loads(run_cli("info", name, "--json").stdout)["fingerprint"] == wanted
    assert load_detector(f"lcmem:{name}", device="cpu").fingerprint == wanted
    images = sorted(image_folder.rglob("*.png"))[:2]
    scored = run_cli("infer", *images, "--checkpoint", name, "--threshold", "fpr0.01")
    assert "0.750000 (fpr0.01)" in scored.stdout
    assert TRANSFER in " ".join(scored.stdout.split())
    out = image_folder.parent / "calibrated.safetensors"
    run_cli("calibrate", name, "--filelist", image_folder, "-o", out)
    assert ckpt.load_checkpoint(out).fingerprint == wanted
    run_cli("calibrate", name, "--filelist", image_folder, "--size", 48, "-o", out)
    assert json.loads(run_cli("info", out, "--json").stdout)["image_size"] == 48
    assert ckpt.load_checkpoint(out).thresholds
    assert run_cli("info", "hf:somebody/else", exit_code=1).stderr.startswith("error: hf:somebody")


class Answer(http.server.BaseHTTPRequestHandler):
    """Says that there is no such file, and that nobody is logged in."""

    def do_HEAD(self):
        self.answer(404, {"X-Error-Code": "EntryNotFound"})

    def do_POST(self):
        self.answer(401, {})

    def answer(self, status, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args):
        """Stay silent."""


def test_a_hub_that_refuses_is_an_error_with_advice(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("HF_HUB_CACHE", None)
    try:
        for arguments, message in (
            (("pull", REPO), "it holds no model.safetensors"),
            (("push", "embedded", REPO), "hf auth login"),
        ):
            command = [sys.executable, "-m", "lcmem_cli", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert (done.returncode, done.stdout) == (1, ""), done.stderr
            assert message in done.stderr and "Traceback" not in done.stderr
    finally:
        server.shutdown()
        server.server_close()


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error\nRequest ID: x")
    error.response = types.SimpleNamespace(status_code=status)
    return error


ERRORS = {
    "gated": http_error(GatedRepoError, 403),
    "no repository": http_error(RepositoryNotFoundError, 404),
    "no revision": http_error(RevisionNotFoundError, 404),
    "forbidden": http_error(HfHubHTTPError, 403),
    "server": http_error(HfHubHTTPError, 500),
    "not cached": LocalEntryNotFoundError("not there"),
    "offline": OfflineModeIsEnabled("offline"),
    "other": ConnectionError("refused"),
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gated", "access is restricted"),
        ("no repository", "no such repository, or a private one"),
        ("no revision", "there is no revision 'v9'"),
        ("forbidden", "no such repository, or a private one"),
        ("server", "could not be used: 500 Client Error; check"),
        ("not cached", "not in the local cache"),
        ("offline", "not in the local cache"),
        ("other", "could not be used: refused"),
    ],
)
def test_errors_of_a_pull_say_what_to_do(monkeypatch, kind, message):
    def refuse(*args, **kwargs):
        raise ERRORS[kind]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(WeightsUnavailableError, match=message) as caught:
        hub.pull(REPO, revision="v9")
    assert caught.value.exit_code == 1 and "hf:somebody/model@v9" in str(caught.value)


class FakeApi:
    """Keeps what was asked of it; raises ``failure`` where a commit is made, if there is one."""

    calls: list[tuple[str, dict]]
    failure: Exception | None

    def create_repo(self, repo_id, **options):
        self.calls.append(("repo", {"repo_id": repo_id, **options}))

    def create_branch(self, repo_id, **options):
        self.calls.append(("branch", {"repo_id": repo_id, **options}))

    def create_commit(self, repo_id, **options):
        if self.failure is not None:
            raise self.failure
        self.calls.append(("commit", {"repo_id": repo_id, **options}))
        return types.SimpleNamespace(oid="c" * 40, commit_url=f"https://hub/{repo_id}/commit/c")


@pytest.fixture
def api(monkeypatch) -> type[FakeApi]:
    FakeApi.calls, FakeApi.failure = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


def test_a_push_is_one_commit_of_checkpoint_and_card(api, tmp_path, run_cli):
    saved = make_checkpoint(tmp_path / "c.safetensors")
    shown = run_cli("push", tmp_path / "c.safetensors", REPO)
    assert saved.fingerprint in shown.stdout and f"hf:{REPO}@{'c' * 40}" in shown.stdout
    (first, made), (second, commit) = api.calls
    assert (first, second) == ("repo", "commit")
    assert made == {"repo_id": REPO, "private": True, "exist_ok": True}
    assert commit["revision"] is None and saved.fingerprint[:12] in commit["commit_message"]
    weights, card = commit["operations"]
    assert (weights.path_in_repo, card.path_in_repo) == ("model.safetensors", "README.md")
    assert Path(weights.path_or_fileobj) == tmp_path / "c.safetensors"
    assert card.path_or_fileobj.decode() == model_card(saved, REPO)


def test_branch_visibility_and_message_are_passed_on(api, tmp_path, run_cli):
    make_checkpoint(tmp_path / "c.safetensors")
    options = ("--revision", "next", "--public", "--message", "a new one", "--json")
    result = json.loads(run_cli("push", tmp_path / "c.safetensors", REPO, *options).stdout)
    assert result["revision"] == "next" and result["files"] == ["model.safetensors", "README.md"]
    (_, made), (_, branch), (_, commit) = api.calls
    assert made["private"] is False
    assert branch == {"repo_id": REPO, "branch": "next", "exist_ok": True}
    assert (commit["revision"], commit["commit_message"]) == ("next", "a new one")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no repository", "not logged in, or without the right to write"),
        ("forbidden", "not logged in, or without the right to write"),
        ("no revision", "there is no revision 'v9'"),
        ("server", "could not be used: 500 Client Error; check"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("other", "could not be used: refused"),
    ],
)
def test_errors_of_a_push_say_what_to_do(api, tmp_path, kind, message):
    make_checkpoint(tmp_path / "c.safetensors")
    api.failure = ERRORS[kind]
    with pytest.raises(HubError, match=message) as caught:
        hub.push(tmp_path / "c.safetensors", REPO, revision="v9")
    assert caught.value.exit_code == 1 and str(caught.value).startswith(f"{REPO}: not pushed")


def test_only_checkpoints_are_pushed(api, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for path, repo in (
        (tmp_path / "other.safetensors", REPO),
        (tmp_path / "no.safetensors", REPO),
        ("embedded", "not a name"),
    ):
        with pytest.raises(LcmemError) as caught:
            hub.push(path, repo)
        assert caught.value.exit_code == 2
    assert api.calls == []


def test_the_card_states_what_the_checkpoint_states(tmp_path):
    saved = make_checkpoint(tmp_path / "c.safetensors")
    card = model_card(saved, REPO)
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert "library_name: lcmem" in head and body.startswith("\n# model\n")
    assert f"`fpr0.01`: {TRANSFER}." in body
    row = next(line for line in body.splitlines() if line.startswith("| fpr0.01"))
    assert row == (
        "| fpr0.01 | 0.750000 | 0.950% | unknown | 12 | 3,400 "
        "| VAL \\| pairs of &lt;b>drawn&lt;/b> scenes |"
    )
    assert f"| fingerprint | `{saved.fingerprint}` |" in body
    assert f"lcmem pull {REPO} model.safetensors" in body
    assert '"epochs": 3' in body and card.isascii()
    bare = dataclasses.replace(saved, thresholds=(), training={"note": "````"})
    card = model_card(bare, REPO)
    assert "lcmem calibrate" in card and "`````json\n" in card


def test_progress_bars_of_the_client_are_off_and_come_back(monkeypatch, tmp_path):
    from huggingface_hub import utils

    seen = []

    def answer(*args, **kwargs):
        seen.append(utils.are_progress_bars_disabled())
        return str(tmp_path / "x")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    before = utils.are_progress_bars_disabled()
    hub.download(REPO)
    assert seen == [True] and utils.are_progress_bars_disabled() == before

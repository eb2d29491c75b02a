"""Checkpoints by name, and on the Hugging Face hub.

On the hub a checkpoint is the file ``model.safetensors`` of a model repository. It is read as
strictly as any other, so nothing that lies there is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcmem_cli.engine.errors import HubError, InputError, WeightsUnavailableError
from lcmem_cli.engine.files import atomic_path
from lcmem_cli.engine.models.card import model_card
from lcmem_cli.engine.models.checkpoint import embedded_checkpoint, load_checkpoint
from lcmem_cli.engine.models.codec import EMBEDDED
from lcmem_cli.engine.models.weights import hub_answers
from lcmem_cli.engine.results import Result

PREFIX = "hf:"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOG_IN = "log in with: hf auth login (or set HF_TOKEN)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PullResult(Result):
    """A checkpoint that was fetched.

    Attributes:
        repo_id: where it came from.
        revision: what was asked for, ``None`` for the default branch.
        commit: what that was; pass it as the revision to get the same bytes again.
        path: the file, in the hub's cache if no other was wanted.
        fingerprint: of the checkpoint.
        num_bytes: size of the file.
    """

    repo_id: str
    revision: str | None
    commit: str
    path: str
    fingerprint: str
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushResult(Result):
    """A checkpoint that was published.

    Attributes:
        repo_id: where it is.
        revision: branch it was pushed to, ``None`` for the default one.
        commit: the commit that holds it.
        url: page of the commit.
        files: names in the repository that were written.
        fingerprint: of the checkpoint.
        num_bytes: size of the checkpoint.
    """

    repo_id: str
    revision: str | None
    commit: str
    url: str
    files: tuple[str, ...]
    fingerprint: str
    num_bytes: int


def locate_checkpoint(name: str | Path | None) -> Path:
    """Return the file of a checkpoint.

    Args:
        name: ``embedded`` or ``None`` for the one inside the package; ``hf:REPO_ID[@REVISION]``
            for one on the hub, which is fetched unless it is cached; otherwise a file. A ``Path``
            is always a file.

    Raises:
        InputError: not a repository id, or nothing after the ``@``.
        WeightsUnavailableError: it cannot be had from the hub.
    """
    if name is None or name == EMBEDDED:
        return embedded_checkpoint()
    if isinstance(name, Path) or not name.startswith(PREFIX):
        return Path(name)
    repo_id, at, revision = name.removeprefix(PREFIX).partition("@")
    if at and not revision:
        raise InputError(f"'{name}': no revision after the @; expected {PREFIX}REPO_ID[@REVISION]")
    return download(repo_id, revision=revision or None)


def download(repo_id: str, *, revision: str | None = None) -> Path:
    """Return the checkpoint file of a repository in the hub's cache, fetching it if need be.

    Args:
        repo_id: such as ``name/model``.
        revision: branch, tag or commit; the default branch if not given.

    Raises:
        InputError: not a repository id.
        WeightsUnavailableError: no such repository, revision or file, no access, or no connection.
    """
    import huggingface_hub

    _check_repo_id(repo_id)
    if revision is not None and _COMMIT.fullmatch(revision):  # whose content never changes
        cached = huggingface_hub.try_to_load_from_cache(repo_id, WEIGHTS_FILE, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    try:
        with _no_progress_bars():
            file = huggingface_hub.hf_hub_download(
                repo_id,
                WEIGHTS_FILE,
                revision=revision,
                local_files_only=not hub_answers(repo_id),
            )
            return Path(file)
    except Exception as error:  # among them those of the http library that the hub's client uses
        raise WeightsUnavailableError(
            f"{PREFIX}{repo_id}{f'@{revision}' if revision else ''}: "
            + _explain(error, repo_id, revision, write=False)
        ) from error


def pull(repo_id: str, output: Path | None = None, *, revision: str | None = None) -> PullResult:
    """Fetch a checkpoint from the hub and verify it.

    Args:
        repo_id: such as ``name/model``.
        output: file to write; without it the checkpoint stays in the hub's cache.
        revision: branch, tag or commit; the default branch if not given.

    Raises:
        InputError: not a repository id, ``embedded``, or the output is a folder.
        CheckpointError: the file there is no lcmem checkpoint.
        CorruptFileError: it is damaged.
        WeightsUnavailableError: see ``download``.
    """
    if repo_id == EMBEDDED:
        raise InputError(
            "the embedded checkpoint comes with lcmem, there is nothing to fetch; the commands use "
            "it where none is given"
        )
    if output is not None and output.is_dir():
        raise InputError(f"{output}: is a folder; name the .safetensors file to write")
    cached = download(repo_id, revision=revision)
    checkpoint = load_checkpoint(cached)
    if output is not None:
        with atomic_path(output) as temporary:
            shutil.copyfile(cached, temporary)
    return PullResult(
        repo_id=repo_id,
        revision=revision,
        commit=cached.parent.name,
        path=str(output or cached),
        fingerprint=checkpoint.fingerprint,
        num_bytes=cached.stat().st_size,
    )


def push(
    checkpoint: str | Path | None,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = True,
    message: str | None = None,
) -> PushResult:
    """Publish a checkpoint with a model card, as one commit.

    The repository is made if need be; files of the same names are replaced. The whole header goes
    along: training config, names of the data sets, and thresholds.

    Args:
        checkpoint: see ``locate_checkpoint``.
        repo_id: such as ``name/model``.
        revision: branch, made if it does not exist; the default branch if not given.
        private: whether a repository that is made is private; one that exists stays as it is.
        message: of the commit.

    Raises:
        InputError: not a repository id, no such file, or not a checkpoint.
        HubError: not logged in, no write access, or no connection.
    """
    import huggingface_hub

    _check_repo_id(repo_id)
    path = locate_checkpoint(checkpoint)
    loaded = load_checkpoint(path)
    card = model_card(loaded, repo_id).encode()
    contents: dict[str, Any] = {WEIGHTS_FILE: str(path), CARD_FILE: card}
    api = huggingface_hub.HfApi()
    try:
        with _no_progress_bars():
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                operations=[
                    huggingface_hub.CommitOperationAdd(file, path_or_fileobj=content)
                    for file, content in contents.items()
                ],
                commit_message=message or f"lcmem checkpoint {loaded.fingerprint[:12]}",
                revision=revision,
            )
    except Exception as error:  # among them those of the http library that the hub's client uses
        raise HubError(
            f"{repo_id}: not pushed: " + _explain(error, repo_id, revision, write=True)
        ) from error
    return PushResult(
        repo_id=repo_id,
        revision=revision,
        commit=commit.oid,
        url=commit.commit_url,
        files=tuple(contents),
        fingerprint=loaded.fingerprint,
        num_bytes=path.stat().st_size,
    )


def _check_repo_id(repo_id: str) -> None:
    utils = _utils()
    try:
        utils.validate_repo_id(repo_id)
    except utils.HFValidationError as error:
        raise InputError(
            f"'{repo_id}' is no repository of the hub: expected one like name/model ({error})"
        ) from error


def _explain(error: Exception, repo_id: str, revision: str | None, *, write: bool) -> str:
    """Say what an error of the hub's client means and what to do."""
    utils = _utils()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, utils.GatedRepoError):
        return f"access is restricted: ask for it on the repository's page, then {_LOG_IN}"
    if isinstance(error, utils.RevisionNotFoundError):
        return f"there is no revision '{revision}'; expected a branch, a tag or a whole commit hash"
    if write and status in (401, 403, 404):
        return (
            "the hub refused: not logged in, or without the right to write there; "
            f"{_LOG_IN} and use a token with write access"
        )
    if isinstance(error, utils.RepositoryNotFoundError) or status in (401, 403):
        return f"no such repository, or a private one: check its name, and {_LOG_IN}"
    if write and isinstance(error, utils.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, (utils.LocalEntryNotFoundError, utils.OfflineModeIsEnabled)):
        at = f" --revision {revision}" if revision else ""
        return (
            "not in the local cache, and the hub could not be reached (or HF_HUB_OFFLINE is set).\n"
            f"On a machine with internet run: lcmem pull {repo_id} model.safetensors{at}\n"
            "then copy the file here and pass its path, or set HF_HOME to a copy of its cache"
        )
    if isinstance(error, utils.EntryNotFoundError):
        return f"it holds no {WEIGHTS_FILE}: expected a repository made by lcmem push"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the hub could not be used: {reason}; check the connection and try again"


def _utils() -> Any:
    """Return the module that has the errors in every version; it does not declare its exports."""
    import huggingface_hub.utils

    return huggingface_hub.utils


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the hub's client from drawing on the terminal."""
    utils = _utils()
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()

"""Adapters on the Hugging Face Hub: push a folder, and get one by its id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError of the HTTP library that it uses
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.files.names import exists
from prefixmemory.files.records import RECORD
from prefixmemory.memories import checkpoint
from prefixmemory.models.loading import SMOLLM2_HUB_ID, SMOLLM2_WHEEL
from prefixmemory.training.card import CARD, card_of, with_address

#: What a repository of an adapter holds: nothing else is pushed, and nothing else is fetched.
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD, RECORD)


def push_adapter(
    folder: str | Path, repo_id: str, private: bool = False, token: str | None = None, revision: str | None = None
) -> str:
    """Upload an adapter folder (of any PEFT method) to the Hub, in one commit; returns its address.

    ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md`` and ``run.json`` go up, checkpoints and
    whatever else lies there do not. A folder without a card gets one; the card's loading lines name ``repo_id``.

    Args:
        folder: what training left, or ``save_pretrained``.
        repo_id: ``user/name``; made if it does not exist.
        private: make it private.
        token: instead of the one that ``hf auth login`` stored.
        revision: branch to push to; made from ``main`` if it does not exist.

    Raises:
        PrefixMemoryError: the folder holds no whole adapter, ``private`` is asked for and the repository is public,
            or the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    config = checkpoint.check_config_file(folder, any_method=True)
    if (folder / RECORD).is_file():
        read_object(folder / RECORD, "Copy it again, or delete it: it is the record of a run, which nothing needs.")
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise PrefixMemoryError(f"{weights} is missing: there is nothing to push. Give the folder of a saved adapter.")
    checkpoint.check_weights_file(folder, config.get("weights_sha256"))
    api = HfApi(token=token, library_name="prefixmemory")
    with _explained("push to", repo_id, revision):
        repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
        repo_id = repository.repo_id
        if private and not api.model_info(repo_id).private:
            raise PrefixMemoryError(
                f"{repo_id} exists and is public, so nothing was pushed. Make it private in its settings on the Hub, "
                "choose another name, or push without private."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(CONFIG_NAME, _public_config(config)),
            CommitOperationAdd(SAFETENSORS_WEIGHTS_NAME, weights),
            CommitOperationAdd(CARD, _card(folder, repo_id).encode()),
        ]
        if (folder / RECORD).is_file():
            operations.append(CommitOperationAdd(RECORD, folder / RECORD))
        api.create_commit(repo_id, operations, commit_message=f"Upload {folder.resolve().name}", revision=revision)
    return str(repository) + (f"/tree/{revision}" if revision else "")


def adapter_folder(name: str, revision: str | None = None) -> Path:
    """The folder of an adapter: ``name`` itself if it is one, else the download of the Hub id ``name``.

    Args:
        name: a folder, or ``user/name`` on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        PrefixMemoryError: ``name`` is neither, or the Hub refuses or cannot be reached.
    """
    folder = Path(name).expanduser()
    if exists(folder) and folder.is_dir():
        if revision is not None:
            raise PrefixMemoryError(f"revision={revision!r} needs a Hub id, and {name} is a folder. Leave it out.")
        return folder
    if exists(folder) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        problem = "is a file" if exists(folder) else "does not exist"
        raise PrefixMemoryError(
            f"{name} {problem}. Give the folder that `prefixmemory train` wrote, or the id of an adapter on the Hub, "
            "user/name."
        )
    with _explained("load", name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    if not (folder / CONFIG_NAME).is_file():
        raise PrefixMemoryError(f"{name} on the Hub has no {CONFIG_NAME}: it holds no adapter. Give another id.")
    return folder


def _card(folder: Path, repo_id: str) -> str:
    file = folder / CARD
    if file.is_file():
        card = file.read_text(encoding="utf-8")
    else:
        record = folder / RECORD
        known = read_object(record, "Copy it again, or delete it.") if record.is_file() else {}
        card = card_of(folder, known)
    return with_address(card, repo_id)


def _public_config(config: dict[str, Any]) -> bytes:
    """The config with a base model that others can load, where we know what a local file is a copy of."""
    base = Path(config.get("base_model_name_or_path") or "")
    if base.parent.name == SMOLLM2_WHEEL and base.suffix == ".gguf":
        config = {**config, "base_model_name_or_path": SMOLLM2_HUB_ID}
    return json.dumps(config, indent=2, sort_keys=True).encode()


@contextmanager
def _explained(action: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    try:
        yield
    except PrefixMemoryError:
        raise
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # RuntimeError: hf_xet
        reason = _reason(error, action, repo_id, revision)
        raise PrefixMemoryError(f"Could not {action} {repo_id!r} on the Hub: {reason}") from error


def _reason(error: Exception, action: str, repo_id: str, revision: str | None) -> str:
    pushing = action == "push to"
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return f"this is no Hub id ({first_line.rstrip('.')}). Give user/name."
    if isinstance(error, GatedRepoError):
        return "its owner decides who may read it. Ask for access on its page, then run `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}. Give one that its page lists, or leave the revision out."
    if isinstance(error, RepositoryNotFoundError) and not pushing:
        return (
            "it does not exist there (nor as a folder here), or it is private. Check the spelling; if it is private, "
            "run `hf auth login`."
        )
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "you are not logged in, or your token is no longer valid. Run `hf auth login`."
    if status == 403 or isinstance(error, RepositoryNotFoundError):
        return (
            f"you may not write to {repo_id.partition('/')[0]!r}. Push to your own user name, or run `hf auth login` "
            "with a token that may write there."
        )
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids the network. Unset it."
    if isinstance(error, LocalEntryNotFoundError | HTTPError) and status is None:
        return f"{constants.ENDPOINT} cannot be reached ({_root(error)}). Check the network, or HF_ENDPOINT."
    return f"{first_line.rstrip('.')}."


def _root(error: BaseException) -> str:
    """The first line of what is at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Fetch a model from the Hugging Face hub into its cache: the config first, then no more than training needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

from jaxtune.errors import UserError

# Weights and tokenizer in the formats that are read here; never pickles, and no file of a subdirectory.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*", "adapter_*"]


def fetch(
    repo_id: str,
    revision: str | None,
    *,
    local_files_only: bool,
    check: Callable[[Path], object],
    weights: bool = True,
) -> Path:
    """Bring a model into the hub's cache, or find it there.

    `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and the rest of the hub's settings hold.

    Args:
        repo_id: "owner/name" or "name".
        revision: branch, tag or commit; None for the main branch.
        local_files_only: never ask the hub.
        check: called with config.json's path before any weight is fetched; raises to stop.
        weights: with False, what is fetched is the config and the tokenizer.

    Returns:
        The snapshot's directory; its name is the commit.

    Raises:
        UserError: not found, no access, not in the cache while offline, no safetensors, or a failed download; names the
            remedy.
    """
    config = fetch_config(repo_id, revision, local_files_only=local_files_only)
    check(config)
    # The commit that config.json came from: the branch may move between the two calls.
    commit = config.parent.name
    try:
        snapshot = snapshot_download(
            repo_id,
            revision=commit,
            local_files_only=local_files_only,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED if weights else [*_UNWANTED, "*.safetensors"],
        )
    except (errors.HTTPError, OSError) as error:
        raise UserError(_explain(error, repo_id, revision)) from error
    if weights and not any(Path(snapshot).glob("*.safetensors")):
        raise UserError(
            f"model.name_or_path {repo_id!r}: no safetensors weights in {snapshot}. Pickled weights are not fetched: "
            "opening them can run any code. Name a model or a model.revision that has safetensors; if the cache holds "
            "only a part of the model, download it once with a connection"
        )
    return Path(snapshot)


def fetch_config(repo_id: str, revision: str | None, *, local_files_only: bool) -> Path:
    """Bring a model's config.json into the hub's cache, or find it there; arguments and errors are those of `fetch`."""
    try:
        return Path(hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=local_files_only))
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise UserError(_explain(error, repo_id, revision)) from error


def check_login(repo_id: str) -> None:
    """Ask the hub who is logged in, before work is done whose result could not be uploaded.

    Raises:
        UserError: nobody is, or the hub does not answer.
    """
    try:
        HfApi().whoami()
    except (errors.HTTPError, errors.LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"--push-to-hub {repo_id}: the hub knows no login here ({type(error).__name__}); run `hf auth login` "
            "with a token that may write"
        ) from error


def push(directory: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a directory's files as one commit; the repository is made where it is not there.

    Args:
        directory: what to upload.
        repo_id: "owner/name".
        private: of a repository that is made now.

    Returns:
        The commit's address.

    Raises:
        UserError: a wrong name, no right to write, or a failed upload; what is in `directory` stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload model"))
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise UserError(
            f"--push-to-hub {repo_id}: the upload failed ({type(error).__name__}: {error}); the files are in "
            f"{directory}: correct the name or the rights, and upload them with `hf upload {repo_id} {directory}`"
        ) from error


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    """What happened and what to do about it, from the most special kind of error to the most general."""
    what = f"model.name_or_path {repo_id!r}"
    if isinstance(error, errors.HFValidationError):
        return f"{what} is neither an existing file or directory nor a hub id (owner/name); correct it"
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: accept its licence on its hub page, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{what} is not on the hub, or is private, and no such directory is here; check the spelling, or log in "
            "with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} has no revision {revision!r}; correct model.revision"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{what} has no config.json on the hub: it is no transformers model; name one that is"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{what} is not, or not wholly, in the hub's cache, and the hub was not asked or did not answer; download "
            "it once with a connection (HF_HUB_OFFLINE unset, model.local_files_only false), or name a local directory"
        )
    return f"{what} could not be downloaded ({type(error).__name__}: {error}); try again"

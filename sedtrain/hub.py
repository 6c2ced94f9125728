"""The Hugging Face Hub: uploads of a folder, and machines without network."""

import socket
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sedtrain.errors import UserError, one_line


def go_offline_if_unreachable() -> None:
    """Uses only the Hub's local cache if its host name does not resolve; the client would retry for most of a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if datasets := sys.modules.get("datasets"):  # datasets copied the value on import
            datasets.config.HF_HUB_OFFLINE = True


def refuse_impossible(repo: str, dry_run: bool) -> None:
    """Raises UserError for a name that the Hub refuses, and for an upload without a token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError("hub", repo, str(error), "write hub=USER/NAME") from error
    if "/" not in repo:
        raise UserError("hub", repo, "this names no user or organization", "write hub=USER/NAME")
    if not dry_run and huggingface_hub.get_token() is None:
        wrong = "an upload needs a token of the Hub that may write, and there is none"
        write = "set the variable HF_TOKEN, or run `hf auth login`; dry_run=true uploads nothing"
        raise UserError("hub", repo, wrong, write)


def files_of(folder: Path) -> dict[str, int]:
    """The files of a folder by their name in the repository, with their sizes in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def upload(folder: Path, repo: str, private: bool) -> str:
    """Creates the repository if it is missing, uploads the folder as one commit, and returns its address.

    Raises UserError if the Hub refuses it or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model exported by sedtrain")
    except (OSError, huggingface_hub.errors.HTTPError) as error:  # type: ignore[attr-defined]
        write = "write hub=USER/NAME of yours; the folder in out is complete"
        raise UserError("hub", repo, f"the Hub did not take it: {one_line(error)}", write) from error
    return str(made)

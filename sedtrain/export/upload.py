"""Puts a folder on the Hugging Face Hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sedtrain.errors import UserError


def refuse_impossible(repo: str, dry_run: bool) -> None:
    """Raises UserError for a name that the Hub does not take, and for an upload without a token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError("hub", repo, str(error), "write hub=USER/NAME") from error
    if "/" not in repo:
        raise UserError("hub", repo, "this names no user or organization", "write hub=USER/NAME")
    if not dry_run and huggingface_hub.get_token() is None:
        wrong = "an upload needs a token of the Hub that may write, and there is none"
        raise UserError(
            "hub", repo, wrong, "set the variable HF_TOKEN, or run `hf auth login`; dry_run=true uploads nothing"
        )


def files_of(folder: Path) -> dict[str, int]:
    """The files of a folder, as they are named in its repository, and their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def upload(folder: Path, repo: str, private: bool) -> str:
    """Makes the repository if there is none, uploads the folder as one commit, and returns its address.

    Raises UserError where the Hub refuses it or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model exported by sedtrain")
    except (OSError, huggingface_hub.errors.HTTPError) as error:  # type: ignore[attr-defined]
        wrong = f"the Hub did not take it: {' '.join(str(error).split())[:200]}"
        raise UserError(
            "hub", repo, wrong, "write hub=USER/NAME of yours; the folder is complete, and out names it"
        ) from error
    return str(made)

"""The upload to the Hub, by a client whose requests are answered here."""

import huggingface_hub
import pytest
from huggingface_hub import RepoUrl

from sedtrain.errors import UserError
from sedtrain.hub import files_of, refuse_impossible, upload


@pytest.fixture
def asked(monkeypatch):
    """What HfApi was asked for."""
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        calls.append(("upload_folder", repo_id, files_of(folder_path)))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_a_repository_is_made_and_the_whole_folder_is_uploaded(tmp_path, asked):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/encoder.onnx").write_bytes(b"12345")
    (tmp_path / "README.md").write_text("card")
    assert upload(tmp_path, "me/digits", private=True) == "https://huggingface.co/me/digits"
    assert asked == [
        ("create_repo", "me/digits", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/digits", {"README.md": 4, "onnx/encoder.onnx": 5}),
    ]


def test_a_hub_that_refuses_or_is_not_there_is_told_in_words(tmp_path, asked, monkeypatch):
    def refuse(self, *_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError) as caught:
        upload(tmp_path, "me/digits", private=True)
    assert caught.value.wrong == "the Hub did not take it: no network"
    assert "the folder in out is complete" in caught.value.write
    assert asked == []


def test_an_upload_needs_a_token_and_a_dry_run_none(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refuse_impossible("me/digits", dry_run=True)
    with pytest.raises(UserError, match="HF_TOKEN"):
        refuse_impossible("me/digits", dry_run=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    refuse_impossible("me/digits", dry_run=False)

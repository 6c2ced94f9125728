"""The options of the group `data`, before anything is read."""

from collections.abc import Mapping
from typing import Any

from sedtrain.data.buckets import buckets_of
from sedtrain.data.corpus import each_source, is_same_for_all, stands_for_several
from sedtrain.data.paths import absolute_path
from sedtrain.errors import UserError


def lasting(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they hold in any folder and at any time: absolute paths, and the buckets themselves as `batches`."""
    lasting = dict(data)
    if lasting.get("path"):
        lasting["path"] = absolute_path(lasting["path"])
    if lasting.get("mix"):
        lasting["mix"] = {
            name: {**source, "path": absolute_path(source["path"])} if source.get("path") else source
            for name, source in lasting["mix"].items()
        }
    if lasting.get("batches"):
        lasting["batches"] = [bucket._asdict() for bucket in buckets_of(lasting["batches"])]
    return lasting


def refuse_same_for_all(data: Mapping[str, Any]) -> None:
    """Raises UserError where training, validation and test data would be the same files."""
    errors = []
    for name, source in each_source(data).items():
        if not is_same_for_all(source):
            continue
        if stands_for_several(source["path"]):
            wrong = "the same files would be training, validation and test data at once"
            write = "PATTERN with {split} where they differ (what is for all splits serves task=evaluate)"
        else:
            wrong = "one file would be training, validation and test data at once"
            write = "FOLDER with train, validation and test files (a single file serves task=evaluate)"
        errors.append(UserError(f"{name}.path", source["path"], wrong, f"write {name}.path={write}"))
    if errors:
        raise UserError.all_of(errors)

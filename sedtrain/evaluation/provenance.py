"""The code behind a number: its commit, and the versions of what it runs on."""

import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sedtrain", "torch", "transformers", "lightning", "datasets", "rapidfuzz", "sacrebleu")


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and of PACKAGES; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def commit() -> dict[str, Any] | None:
    """The commit of the working directory, and whether its files have changed since; None outside a checkout.

    A checkout's configuration may name commands that git runs when it compares files (filters, fsmonitor, submodules'). So git
    compares them in an empty repository without configuration, by a copy of the index.
    """
    try:
        asked = git("rev-parse", "HEAD", "--show-toplevel", "--git-path", "objects", "--git-path", "index")
        if asked.returncode:
            return None
        head, *paths = asked.stdout.splitlines()
        top, objects, index = map(os.path.abspath, paths)
        with tempfile.TemporaryDirectory() as bare:
            for name in ("objects", "refs"):
                Path(bare, name).mkdir()
            Path(bare, "HEAD").write_text(head)
            shutil.copy2(index, bare)  # copy2 keeps its time, which git compares with those of files
            places = {"GIT_DIR": bare, "GIT_INDEX_FILE": f"{bare}/index", "GIT_WORK_TREE": top}
            options = "--quiet", "--ignore-submodules=dirty", "--no-ext-diff", "--no-textconv"
            compared = git("diff", *options, "HEAD", GIT_OBJECT_DIRECTORY=objects, **places)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return {"id": head, "dirty": compared.returncode == 1} if compared.returncode in (0, 1) else None


def git(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, environment = ["git", *arguments], {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)

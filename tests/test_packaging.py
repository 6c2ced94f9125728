"""What a wheel carries, and what the files around the package say of it."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_wheel_carries_every_option_file_the_corpus_and_the_style_of_pages(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    options = {f"sedtrain/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    corpus = {f"sedtrain/data/spoken_digits/{split}.parquet" for split in ("train", "validation", "test")}
    assert len(options) > 40
    assert {*options, *corpus, "hydra_plugins/sedtrain_optuna.py", "sedtrain/evaluation/page.css"} <= names
    assert wheel.stat().st_size < 8_500_000


def test_git_holds_no_large_file_but_the_embedded_corpus():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    large = [name for name in names if (ROOT / name).stat().st_size > 100_000]
    assert len(names) > 500
    assert {str(Path(name).parent) for name in large} == {"sedtrain/data/spoken_digits"}


@pytest.mark.parametrize(
    ("package", "bad"),
    [
        ("lightning", ["2.6.2", "2.6.3", "2.6.5"]),  # two malicious uploads; load_from_checkpoint that ran remote code
        ("hydra-core", ["1.3.7"]),  # instantiates what 1.3.8 has on its block list
        ("torch", ["2.5.1"]),  # torch.load ran code with weights_only=True (CVE-2025-32434)
        ("datasets", ["3.6.0"]),  # ran scripts of a dataset
        ("pyarrow", ["14.0.0"]),  # ran code of an IPC or Parquet file (CVE-2023-47248)
        ("pyyaml", ["5.3.1"]),  # ran code of a document (CVE-2020-14343)
    ],
)
def test_no_version_that_is_known_to_be_bad_may_be_installed(package, bad):
    listed = {each.name: each.specifier for each in map(Requirement, PROJECT["dependencies"])}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert [version for version in bad if listed[package].contains(version)] == []
    assert listed[package].contains(pinned[{"pyyaml": "PyYAML"}.get(package, package)])
    assert pinned["pytorch-lightning"] == pinned["lightning"]


def test_every_extra_that_a_page_a_message_or_the_image_names_exists():
    files = [ROOT / "README.md", ROOT / "Dockerfile", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
    texts = [file.read_text(encoding="utf-8") for file in [*files, *ROOT.glob("sedtrain/**/*.py")]]
    found = {each for text in texts for names in re.findall(r"sedtrain\[([\w,]+)\]", text) for each in names.split(",")}
    assert {"lora", "onnx", "serve"} <= found <= set(PROJECT["optional-dependencies"])


def test_workflows_and_the_script_of_ci_call_what_there_is():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / ".github/workflows").glob("*.yml"))]
    jobs = [job for workflow in workflows for job in workflow["jobs"].values()]
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    called = re.findall(r"^make (\w+)$", "\n".join([*commands, (ROOT / ".ci/run").read_text()]), re.MULTILINE)
    assert {"docs", "lint", "test"} <= set(called) <= targets and ".ci/run" in commands
    tried = {f"Programming Language :: Python :: {each}" for each in jobs[0]["strategy"]["matrix"]["python"]}
    assert tried == {each for each in PROJECT["classifiers"] if "Python :: 3." in each}

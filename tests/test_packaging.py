"""What a wheel carries."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_carries_every_option_file_and_the_corpus(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    options = {f"sedtrain/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    corpus = {f"sedtrain/data/spoken_digits/{split}.parquet" for split in ("train", "validation", "test")}
    assert len(options) > 40
    assert {*options, *corpus, "hydra_plugins/sedtrain_optuna.py"} <= names
    assert wheel.stat().st_size < 8_500_000

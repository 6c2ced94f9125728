"""Everything that two processes have to show, in one launch: two_ranks.py FOLDER."""

import os
import sys
from pathlib import Path

import datasets
import exactness
import sharded

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    datasets.config.HF_DATASETS_CACHE = folder / f"cache {os.environ['RANK']}"
    exactness.measure_ranks(folder)
    sharded.run_all(folder, folder / "corpus")

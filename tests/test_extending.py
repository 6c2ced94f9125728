"""The encoder, decoder and adapter of a user's own, as docs/extending.md writes them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def train_own(train, folder, heading, *overrides):
    """Writes the files of a section, runs its command, and scores the model again in another process."""
    section = re.search(rf"^## {heading}$(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]
    files = re.findall(r"^`(mine/[^`\n]+)`\n```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    [command] = re.findall(r"^`python -m sedtrain (.*)`$", section, re.MULTILINE)
    run = train(folder / "run", *command.split(), *overrides)
    again = ["task=evaluate", f"checkpoint={run}", f"run_dir={folder / 'again'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-m", "sedtrain", *again], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    metrics = [json.loads((each / "results.json").read_text())["metrics"] for each in (run, folder / "again")]
    assert metrics[0] == metrics[1]
    return [name for name, _ in files], json.loads((run / "model/config.json").read_text())


def test_an_encoder_of_one_s_own_trains_and_is_found_again_in_another_process(train, own_folder):
    files, config = train_own(train, own_folder, "Your own encoder", "encoder.width=40")
    assert files == ["mine/encoder/gru.yaml", "mine/gru.py"]
    assert config["encoder"]["hidden_size"] == 40


def test_a_decoder_and_an_adapter_of_one_s_own_train_and_are_found_again_in_another_process(train, own_folder):
    files, config = train_own(train, own_folder, "Your own decoder and adapter", "decoder.width=40")
    assert files == ["mine/decoder/gru.yaml", "mine/adapter/pool.yaml", "mine/parts.py"]
    assert config["decoder"]["hidden_size"] == 40
    assert config["adapter"] == {"kind": "pool", "settings": {"stride": 2}}

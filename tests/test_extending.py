"""The encoder, decoder and adapter of a user's own, as docs/extending.md writes them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def train_own(train, folder, heading, run, *overrides):
    """Writes the files of a section and runs its command; returns the names of the files."""
    section = re.search(rf"^## {heading}$(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]
    files = re.findall(r"^`(mine/[^`\n]+)`\n```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    [command] = re.findall(r"^`python -m sedtrain (.*)`$", section, re.MULTILINE)
    train(folder / run, *command.split(), *overrides)
    return [name for name, _ in files]


def read_json(path):
    return json.loads(path.read_text())


def test_components_of_one_s_own_train_and_are_found_again_in_another_process(train, sedtrain, own_folder):
    files = train_own(train, own_folder, "Your own encoder", "encoder", "encoder.width=40")
    assert files == ["mine/encoder/gru.yaml", "mine/gru.py"]
    config = read_json(own_folder / "encoder/model/config.json")
    assert config["encoder"]["hidden_size"] == 40

    files = train_own(train, own_folder, "Your own decoder and adapter", "decoder", "decoder.width=40")
    assert files == ["mine/decoder/gru.yaml", "mine/adapter/pool.yaml", "mine/parts.py"]
    config = read_json(own_folder / "decoder/model/config.json")
    assert config["decoder"]["hidden_size"] == 40
    assert config["adapter"] == {"kind": "pool", "settings": {"stride": 2}}

    again = ["-m", "task=evaluate", "checkpoint=encoder,decoder", "hydra.sweep.dir=again"]
    own = ["--config-dir", "mine", "encoder=gru", "decoder=gru", "adapter=pool"]
    command = [sys.executable, "-m", "sedtrain", *again, *own]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    refused = sedtrain("task=evaluate", "checkpoint=decoder")
    assert refused.status == 2
    assert "adapter._target_=mine.parts.Pool, and what only a folder names is never imported" in refused.err
    write = "write adapter=OPTION or experiment=NAME, with --config-dir FOLDER if it is your own, as for the training"
    assert write in refused.err
    for number, run in enumerate(("encoder", "decoder")):
        metrics = [read_json(own_folder / each / "results.json")["metrics"] for each in (run, f"again/{number}")]
        assert metrics[0] == metrics[1]

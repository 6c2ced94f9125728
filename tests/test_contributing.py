"""The decoder and the adapter of a contributor's own, as CONTRIBUTING.md writes them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path


def test_contributing_s_own_decoder_and_adapter_train_and_are_found_again_in_another_process(train, own_folder):
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"^`(mine/[^`\n]+)`\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["mine/decoder/gru.yaml", "mine/adapter/pool.yaml", "mine/parts.py"]
    for name, content in files:
        (own_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (own_folder / name).write_text(content)
    [command] = re.findall(r"^`python -m sedtrain (.*)`$", text, re.MULTILINE)
    folder = train(own_folder / "run", *command.split(), "decoder.width=40")
    config = json.loads((folder / "model/config.json").read_text())
    assert config["decoder"]["hidden_size"] == 40
    assert config["adapter"] == {"kind": "pool", "settings": {"stride": 2}}
    again = ["task=evaluate", f"checkpoint={folder}", f"run_dir={own_folder / 'again'}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-m", "sedtrain", *again], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    metrics = [json.loads((run / "results.json").read_text())["metrics"] for run in (folder, own_folder / "again")]
    assert metrics[0] == metrics[1]

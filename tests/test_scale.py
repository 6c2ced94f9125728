"""What the page on scale tells to type composes, and what it says of the launcher is so."""

import re
import shlex
from pathlib import Path

import pytest

from sedtrain.config.hydra_calls import hydra_known
from sedtrain.config.overrides import check_command_line
from sedtrain.config.schema import conf_dir, register

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash)?\n(.*?)```", PAGE.replace("\\\n", " "), flags=re.DOTALL)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if "-m sedtrain" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(command):
    arguments = shlex.split(command.split(" #")[0])
    assert check_command_line(arguments[arguments.index("sedtrain") + 1 :])


def test_the_page_has_a_command_for_each_launch():
    assert len(COMMANDS) > 10
    for words in (
        "torchrun --nnodes 8",
        "torchrun --nproc-per-node 2",
        "hydra/launcher=slurm",
        "srun ",
        "strategy=fsdp",
    ):
        assert any(words in command for command in COMMANDS)


def test_a_job_of_slurm_has_a_task_for_each_gpu():
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=8"]
        config = compose("train", overrides, return_hydra_config=True)
    with hydra_known(config):
        launcher = config.hydra.launcher
        assert (launcher.tasks_per_node, launcher.timeout_min, launcher.max_num_timeout) == (8, 1440, 100)

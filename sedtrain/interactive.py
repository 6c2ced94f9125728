"""The command line from Python: the same options and checks, and objects to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose as composed
from hydra import initialize_config_dir
from omegaconf import DictConfig

from sedtrain.build import training_run
from sedtrain.config.overrides import check_command_line
from sedtrain.config.schema import conf_dir, register
from sedtrain.console import close_log, open_log, quieten_libraries
from sedtrain.errors import UserError
from sedtrain.job import perform
from sedtrain.training.run import TrainingRun


def run(*options: str) -> Path:
    """Runs `sedtrain OPTIONS` in this process. Returns the run's folder, which some tasks do not make.

        folder = sedtrain.run("encoder=hubert", "decoder=bert", "trainer.max_steps=200")

    Raises UserError or Unfinished when the command would end with a message. For several processes, use the command line.
    """
    with as_on_command_line():
        config, checked = configuration(options)
        perform(config, checked)
    return Path(config.run_dir)


def compose(*options: str) -> TrainingRun:
    """The connected model, tokenizer, data and Trainer of `sedtrain OPTIONS`, before training. Raises UserError."""
    with as_on_command_line():
        config, _ = configuration(options)
        return training_run(config)


def configuration(options: tuple[str, ...]) -> tuple[DictConfig, list[str]]:
    """The composed configuration of one run, and its options in Hydra's form. Raises one UserError for all mistakes."""
    for option in options:
        if not isinstance(option, str) or option.startswith("-") or "=" not in option:
            raise UserError("options", option, "this is no option with a value", "write 'NAME=VALUE'")
    register()
    checked = check_command_line(list(options))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return composed("train", checked), checked


@contextmanager
def as_on_command_line() -> Iterator[None]:
    """Inside, errors name options as on the command line, not as Python arguments, and messages go where the command's go."""
    open_log()
    quieten_libraries()
    try:
        yield
    except UserError as error:
        for mistake in (error, *error.errors):
            mistake.on_command_line = True
        raise
    finally:
        close_log()

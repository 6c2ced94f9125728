"""Rules about options that no signature tells: each is a single value, or one that another option asks for."""

from collections.abc import Iterator
from inspect import formatannotation

from omegaconf import DictConfig, OmegaConf

from sedtrain.config.annotations import misfits
from sedtrain.config.values import plain
from sedtrain.errors import UserError
from sedtrain.ranges import Positive

POSITIVE = formatannotation(Positive)
DECIDED = {
    "logger": "write logger=csv, logger=[csv,tensorboard] or logger=none",
    "callbacks": "add yours to the group: +callbacks.NAME._target_=package.module.Name",
    "default_root_dir": "write run_dir=FOLDER",
    "use_distributed_sampler": "leave it out: batches are shared among the devices when they are made",
    "enable_checkpointing": "leave it out: a run keeps its best and its last weights",
    "enable_model_summary": "leave it out: the components of the model are shown before training starts",
    "overfit_batches": "write trainer.limit_train_batches=NUMBER, or data.path=PATH of data with few utterances",
}
"""Options of the Trainer that follow from others, and what to write instead."""


def broken_rules(config: DictConfig) -> Iterator[UserError]:
    """An error for each rule that a composed configuration breaks."""
    task = config.get("task")
    if task in ("evaluate", "transcribe") and config.get("checkpoint") is None:
        write = "write checkpoint=RUN_FOLDER, a Hugging Face folder or a Hub id"
        yield UserError("checkpoint", None, f"task={task} needs a trained model", write)
    if task == "transcribe" and not config.get("audio"):
        write = "write audio=FILE, 'audio=FOLDER/*.wav' or audio=FOLDER"
        yield UserError("audio", None, "task=transcribe needs audio", write)
    mix = plain(config.data, "mix") if isinstance(config.get("data"), DictConfig) else None
    for name, dataset in mix.items() if isinstance(mix, dict) else ():
        if isinstance(dataset, dict):
            yield from misfits(f"data.mix.{name}.weight", dataset.get("weight", 1.0), POSITIVE)
    if task in ("train", "fit_batches"):
        yield from training_rules(config)


def training_rules(config: DictConfig) -> Iterator[UserError]:
    if isinstance(config.get("trainer"), DictConfig):
        yield from trainer_rules(config.trainer)
    if isinstance(config.get("callbacks"), DictConfig) and not config.callbacks.get("checkpoints"):
        write = "leave callbacks.checkpoints as it is; other callbacks may go"
        yield UserError("callbacks.checkpoints", None, "a run keeps its best weights by it", write)
    attention = OmegaConf.select(config, "attention.implementation", default=None)
    precision = str(OmegaConf.select(config, "trainer.precision", default=None))
    if attention == "flash_attention_2" and precision.startswith("32"):
        wrong = f"it computes in 16 bits, and trainer.precision is {precision}"
        yield UserError("attention", attention, wrong, "write trainer.precision=bf16-mixed")


def trainer_rules(trainer: DictConfig) -> Iterator[UserError]:
    """Lightning's Trainer would take these, or refuse them late."""
    for option, write in DECIDED.items():
        if option in trainer:
            yield UserError(f"trainer.{option}", plain(trainer, option), f"{option} is decided elsewhere", write)
    for option in ("val_check_interval", "accumulate_grad_batches"):
        value = plain(trainer, option)
        if isinstance(value, int) and value < 1:
            write = f"write a whole number, e.g. trainer.{option}=1"
            yield UserError(f"trainer.{option}", value, "expected a whole number of 1 or more", write)
    max_time = plain(trainer, "max_time")
    if isinstance(max_time, int | float):
        write = 'write trainer.max_time="DD:HH:MM:SS", or trainer.max_time={minutes: NUMBER}'
        yield UserError("trainer.max_time", max_time, "this has no unit", write)

"""The folder of a run: its model in `model`, the configuration of its training, its checkpoints."""

from pathlib import Path

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
"""The newest checkpoint, the one before it, and that of the best validation: those that a training can go on from."""


def run_folder(checkpoint: str) -> Path:
    """The folder that `checkpoint` names, if it names one; it may also be the Hub's name of a model."""
    return Path(checkpoint).expanduser()


def model_of(checkpoint: str) -> str:
    """What `from_pretrained` takes: the model within a run's folder, else the checkpoint itself."""
    folder = run_folder(checkpoint)
    return str(next((place for place in (folder / "model", folder) if place.is_dir()), checkpoint))


def config_of(checkpoint: str) -> Path:
    """The resolved configuration of a run; of any other checkpoint there is no such file."""
    return run_folder(checkpoint) / "config.yaml"


def checkpoints_of(run: str) -> Path:
    """The folder of a run's checkpoints."""
    return run_folder(run) / "checkpoints"


def is_finished(run: str) -> bool:
    """Whether a training is at its end, the model scored: the model's card is the last thing that is written."""
    card = run_folder(run) / "model" / "README.md"
    return card.is_file() and card.stat().st_size > 0


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)

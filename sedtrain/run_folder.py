"""Where a trained model lies: the folder of a run holds it in `model`, beside the configuration of its training."""

from pathlib import Path


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

"""`task=transcribe` and `task=serve`: texts of recordings. Imports neither Lightning nor `datasets`, which take a second."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sedtrain import terminal
from sedtrain.config.hydra_calls import create, import_target
from sedtrain.data.audio_paths import audio_paths, stored
from sedtrain.data.buckets import Bounds
from sedtrain.decoding.outputs import Outputs
from sedtrain.decoding.transcriber import Transcriber
from sedtrain.devices import device
from sedtrain.errors import Attempts, Unfinished, UserError
from sedtrain.models.saved import SavedModel, load

logger = logging.getLogger(__name__)


def transcribe(cfg: DictConfig) -> None:
    """Prints or writes the text of every recording. A recording that fails does not stop the others."""
    paths = audio_paths(cfg.audio)
    outputs, num_failed = outputs_of(cfg), 0
    names, transcriber = outputs.names(paths), transcriber_of(cfg)
    for path in terminal.with_progress(paths, is_shown=bool(names) or not sys.stdout.isatty()):
        try:
            with stored(path) as file:
                found = transcriber.transcription_of(file, name=path)
            outputs.write(found, names.get(path))
        except UserError as error:
            if len(paths) == 1 or error.option == "out":
                raise
            logger.error("audio=%s: %s", path, error.wrong)
            num_failed += 1
    if num_failed:
        raise Unfinished(f"{num_failed} of {len(paths)} files could not be transcribed")


def serve(cfg: DictConfig) -> None:
    """Serves transcription over HTTP until Ctrl-C. Raises UserError if its packages are not installed."""
    try:
        from sedtrain.serving.server import serve
    except ModuleNotFoundError as error:
        wrong = f"it needs packages that are not installed: {error}"
        raise UserError("task", cfg.task, wrong, "pip install 'sedtrain[serve]'") from error
    options, folder = create(cfg, "serve"), Path(cfg.checkpoint).expanduser().resolve()
    serve(transcriber_of(cfg), options, options.model or (folder.name if folder.exists() else cfg.checkpoint))


def transcriber_of(cfg: DictConfig) -> Transcriber:
    """The connected components of `task=transcribe`. Raises one UserError for everything that they refuse."""
    attempt = Attempts()
    saved, options = attempt(saved_model, cfg), attempt(create, cfg, "decoding")
    make = partial(Transcriber, language=cfg.data.get("language"), target=cfg.target)
    with_words, bounds = outputs_of(cfg).formats != ("text",), attempt(bounds_of, cfg)
    made: Transcriber = attempt(make, saved, options, with_words, bounds)
    attempt.report()
    saved.model.to(device(cfg.trainer.get("accelerator")))
    return made


def bounds_of(cfg: DictConfig) -> Bounds:
    """The bounds of a batch, from the options of `data`."""
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    names = ("batch_seconds", "batch_tokens", "num_buckets", "batches")
    return Bounds.of(**{name: data[name] for name in names if name in data})


def outputs_of(cfg: DictConfig) -> Outputs:
    """The folder and formats of the texts of `task=transcribe`."""
    formats = (cfg.format,) if isinstance(cfg.format, str) else tuple(cfg.format)
    return Outputs(formats, Path(cfg.out).expanduser() if cfg.out else None, cfg.data.get("language"))


def saved_model(cfg: DictConfig) -> SavedModel:
    """The model of `checkpoint`. Imports a user's own classes first, which registers them."""
    for group in ("encoder", "decoder", "adapter"):
        import_target(cfg, group)
    return load(cfg.checkpoint)

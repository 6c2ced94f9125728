"""Small corpora that tests of several wings write, read as a data module, and train on."""

import io
import json

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import Wav2Vec2FeatureExtractor

from sedtrain.data.collate import Collator
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.source import Source
from sedtrain.data.utterances import UtteranceRows
from sedtrain.errors import UserError
from sedtrain.text.tokenizers import train_tokenizer

COLUMNS = {"audio": "audio", "transcription": "text", "translation": "translation"}
WITH_SECONDS = {**COLUMNS, "seconds": "seconds"}
WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four"}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TOKENIZER = train_tokenizer([*WORDS, *WORDS.values()], "char", 100)
STREAMED = {"streaming": True, "block_utterances": 5}
OVERLAPPING = {"mix": {"all": {"weight": 1.5}, "again": {"train_split": "train-1", "weight": 0.4}}}
CARD = """---
configs:
- config_name: de
  data_files:
  - {split: train, path: de/a.parquet}
  - {split: validation, path: de/b.parquet}
  - {split: test, path: de/b.parquet}
---
"""


def wav(seconds, seed=0, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)), rate, format="WAV")
    return file.getvalue()


def write(path, lengths, **columns):
    """A Parquet file of utterances of so many seconds."""
    german, english = zip(*(list(WORDS.items())[i % len(WORDS)] for i in range(len(lengths))), strict=True)
    rows = {"audio": [wav(each, i) for i, each in enumerate(lengths)], "text": english, "translation": german}
    pyarrow.parquet.write_table(pa.table({**rows, **columns}), path)


def write_mix(folder):
    """Writes three datasets, each with its own layout, columns, splits, target and language; returns their options."""
    (folder / "parquet").mkdir()
    for split, number in {"learn": 6, "dev": 2, "eval": 1}.items():
        write(folder / f"parquet/{split}.parquet", [0.3 + 0.1 * i for i in range(number)])
    (folder / "sound").mkdir()
    for i in range(9):
        (folder / f"sound/{i}.wav").write_bytes(wav(0.2 + 0.05 * i, i))
    lines = [{"file": f"{i}.wav", "said": NUMBERS[i], "name": f"n{i}"} for i in range(9)]
    (folder / "manifest").mkdir()
    for split, number in {"train": 9, "validation": 3, "test": 2}.items():
        text = "\n".join(map(json.dumps, lines[:number]))
        (folder / f"manifest/{split}.jsonl").write_text(text)
    (folder / "hub/de").mkdir(parents=True)
    (folder / "hub/README.md").write_text(CARD)
    for name, number in {"a": 4, "b": 2}.items():
        write(folder / f"hub/de/{name}.parquet", [0.4] * number, tongue=["fr", None, "", "it"][:number])
    return {
        "parquet": {
            "path": str(folder / "parquet"),
            "target": "translation",
            "language": "de",
            "train_split": "learn",
            "validation_split": "dev",
            "test_split": "eval",
        },
        "manifest": {
            "path": str(folder / "manifest"),
            "audio_folder": str(folder / "sound"),
            "columns": {"audio": "file", "transcription": "said", "id": "name"},
        },
        "hub": {
            "path": str(folder / "hub"),
            "name": "de",
            "language": "es",
            "columns": {"language": "tongue"},
        },
    }


def data_module(path, folder=None, columns=COLUMNS, **options):
    data = SpeechTextDataModule(path and str(path), columns, folder=str(folder or path), **options)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    data.collator = Collator(extractor, TOKENIZER, TOKENIZER.bos_token_id)
    return data


def mix_module(folder, mix, **options):
    """Several datasets as one, of texts in English where nothing else says their language."""
    return data_module(None, folder, mix=mix, batch_seconds=3, language="en", **options)


def utterance_rows(rows, columns, path, name, folder=None):
    return UtteranceRows(rows, Source(path, columns, {}, audio_folder=folder), name)


def known(lengths):
    """Lengths of utterances as a list, with None where they are not known."""
    return [None if np.isnan(each) else each for each in lengths.tolist()]


def listed(folder):
    """The utterances that a run left out."""
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def refused(action, *arguments, **options):
    """The message of the error that an action raises."""
    with pytest.raises(UserError) as raised:
        action(*arguments, **options)
    return str(raised.value)


class Remember(lightning.LightningModule):
    """A model with one weight, which keeps what it is trained and validated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.trained.append((self.current_epoch, *utterances(batch)))
        return 0.0 * self.weight

    def validation_step(self, batch, index):
        self.validated.append((self.current_epoch, *utterances(batch)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def utterances(batch):
    lengths = batch.attention_mask.sum(1)
    return [
        (id, row[:length].numpy().tobytes()) for id, row, length in zip(batch.ids, batch.inputs, lengths, strict=True)
    ]


def fit(data, epochs, *, checkpoint=None, save_in=None, **options):
    """The model that was trained, from `checkpoint` on; each step's checkpoint goes into the folder `save_in`."""
    model = Remember()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = [ModelCheckpoint(save_in, "{step}", every_n_train_steps=1, save_top_k=-1)] if save_in else []
    lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", use_distributed_sampler=False, callbacks=saving,
        enable_checkpointing=bool(saving), **quiet, **options,
    ).fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)  # fmt: skip
    return model


def syllables(seconds, level=0.1, seed=0):
    """(S,) noise at 16 kHz whose loudness goes up and down four times a second, as that of speech does."""
    loudness = np.sin(4 * np.pi * np.arange(round(seconds * 16_000)) / 16_000) ** 2
    return (level * loudness * np.random.default_rng(seed).standard_normal(len(loudness))).astype(np.float32)


def mistake(call, *arguments):
    """The option that a call refuses, its value, what is wrong and what to write instead."""
    with pytest.raises(UserError) as raised:
        call(*arguments)
    error = raised.value
    return error.option, error.value, error.wrong, error.write

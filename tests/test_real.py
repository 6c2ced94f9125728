"""Real weights and real recordings, where they are kept beside the project."""

import io
import json

import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import cut_corpus
from transformers import WhisperForConditionalGeneration

import sedtrain as package
from sedtrain.batch import Utterance
from sedtrain.decoding.collator import collator_of
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions


@pytest.fixture(scope="module")
def run(shared, sedtrain, tmp_path_factory):
    """Twelve steps of speech translation with Whisper's encoder and a BERT, both pretrained."""
    folder = tmp_path_factory.mktemp("real")
    data = cut_corpus(shared / "data/artikulate-st", folder / "data", train=160, validation=6, test=8)
    ended = sedtrain(
        "encoder=whisper",
        f"encoder.checkpoint={shared / 'models/whisper-tiny.en'}",
        "decoder=bert",
        f"decoder.checkpoint={shared / 'models/minilm-l6'}",
        "data=parquet",
        f"data.path={data}",
        "data.batch_seconds=8",
        "target=translation",
        "trainer.max_steps=12",
        "trainer.log_every_n_steps=1",
        "decoding.max_new_tokens=20",
        f"run_dir={folder / 'run'}",
    )
    assert ended.status == 0, ended.err
    return folder / "run"


def test_the_loss_falls(run):
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    losses = [float(line[lines[0].index("train/loss")]) for line in lines[1:] if line[lines[0].index("train/loss")]]
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_bleu_is_reported(run):
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    assert 0 <= metrics["bleu"]["low"] <= metrics["bleu"]["value"] <= metrics["bleu"]["high"] <= 1


def test_the_saved_model_loads_and_writes_english(run, sedtrain, shared):
    ended = sedtrain(
        "task=evaluate", f"checkpoint={run}", f"run_dir={run.parent / 'again'}", "decoding.max_new_tokens=20"
    )
    assert ended.status == 0, ended.err
    again, first = (json.loads((folder / "results.json").read_text()) for folder in (run.parent / "again", run))
    assert again["metrics"] == first["metrics"]


@torch.no_grad()
def test_a_whole_whisper_has_the_logits_and_texts_of_transformers(shared):
    folder = shared / "models/whisper-tiny.en"
    saved, stock = package.load(folder), WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    utterances = []
    for row in pyarrow.parquet.read_table(shared / "data/fsdd-connected/validation.parquet").slice(0, 3).to_pylist():
        audio, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        utterances.append(Utterance("", torch.from_numpy(audio), rate, row["text"], None, None, len(audio) / rate))
    batch = collator_of(saved)(utterances)
    heard = stock.get_encoder()(batch.inputs)
    logits = saved.model(batch.inputs, batch.attention_mask, labels=batch.labels).logits
    torch.testing.assert_close(stock(encoder_outputs=heard, labels=batch.labels).logits, logits, atol=1e-5, rtol=0)
    written = stock.generate(encoder_outputs=heard, max_new_tokens=30)
    texts = saved.tokenizer.batch_decode(written, skip_special_tokens=True)
    found = decode_batch(saved.model, saved.tokenizer, batch, DecodingOptions(max_new_tokens=30))
    assert [each.texts[0] for each in found] == [text.strip() for text in texts]

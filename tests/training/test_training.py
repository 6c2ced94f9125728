"""Whole runs through the real entry point, on 24 spoken digit strings."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning
import numpy as np
import pyarrow.parquet
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import transformers
from conftest import EMBEDDED
from forked import Forked
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file

from sedtrain.config.overrides import check_command_line

GOLDEN = Path(__file__).parents[1] / "golden" / "hubert_bert.json"
RESULT_KEYS = [
    "task", "split", "num_utterances", "audio_seconds", "metrics", "normalizer", "decoding", "rtfx", "train", "skipped",
    "versions", "training_normalizer", "not_scored", "num_empty", "num_cut", "signatures", "resampled",
    "num_speakers", "num_without_speaker", "data", "run_dir", "checkpoint", "commit", "float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained_with(train, trained, tmp_path_factory):
    """The folder of a run with this encoder and decoder, trained once."""
    folders = {("hubert", "bert"): trained}

    def folder(encoder="hubert", decoder="bert"):
        if (encoder, decoder) not in folders:
            path = tmp_path_factory.mktemp("matrix") / "run"
            folders[encoder, decoder] = train(path, f"encoder={encoder}", f"decoder={decoder}")
        return folders[encoder, decoder]

    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def losses(folder):
    """The training loss of every step, from metrics.csv."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]


# --- the matrix


def assert_whole_results(stored):
    assert list(stored) == RESULT_KEYS
    assert (stored["task"], stored["split"], stored["num_utterances"]) == ("transcription", "test", 6)
    assert stored["skipped"] == {}
    assert list(stored["metrics"]) == ["wer", "cer"]
    for interval in stored["metrics"].values():
        assert list(interval) == ["value", "low", "high"]
        assert 0 <= interval["low"] <= interval["value"] <= interval["high"]
    assert list(stored["normalizer"]) == ["name", "version"]
    assert list(stored["train"]) == [
        "seconds", "steps", "utterances", "audio_seconds_per_second", "planned_steps", "ended_by",
    ]  # fmt: skip
    assert stored["train"]["steps"] == 3
    assert stored["audio_seconds"] > 0
    assert stored["rtfx"] > 0
    assert (stored["resampled"], stored["num_speakers"], stored["data"]) == ("utterance", None, "digits, test")


def transcribed_as_the_card_says(folder, wav):
    """What the code in the model card prints."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    audio, _ = soundfile.read(wav, dtype="float32")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"audio": audio})
    return printed.getvalue().strip()


@pytest.mark.parametrize("encoder", ["hubert", "w2v_bert", "whisper", "speech_to_text"])
def test_an_encoder_of_each_kind_of_input_trains_and_transcribes_as_its_card_says(trained_with, sedtrain, wav, encoder):
    folder = trained_with(encoder)
    assert_whole_results(results(folder))
    assert all(np.isfinite(losses(folder)))
    card = (folder / "model/README.md").read_text()
    is_part_of_a_family = encoder in ("whisper", "speech_to_text")
    assert ("from transformers import SpeechEncoderDecoderModel" in card) is not is_part_of_a_family
    text = transcribed_as_the_card_says(folder / "model", wav)
    if encoder != "whisper":  # its feature extractor pads to 30 seconds, without a mask
        ended = sedtrain("task=transcribe", f"checkpoint={folder}", f"audio={wav}", "decoding.max_new_tokens=12")
        assert ended.out == f"{wav}\t{text}\n"


@pytest.mark.parametrize("decoder", ["gpt2", "bart"])
def test_other_decoders_train_and_generate(trained_with, decoder):
    folder = trained_with(decoder=decoder)
    assert_whole_results(results(folder))
    assert all(np.isfinite(losses(folder)))


def test_translation_is_scored_with_bleu(train, tmp_path):
    stored = results(train(tmp_path / "run", "target=translation"))
    assert stored["task"] == "translation"
    assert next(iter(stored["metrics"])) == "bleu"
    assert stored["metrics"]["bleu"]["value"] <= 1
    assert stored["normalizer"]["name"] == "none"
    signature = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{stored['versions']['sacrebleu']}"
    assert stored["signatures"]["bleu"] == signature
    card, page = ((tmp_path / "run" / name).read_text() for name in ("model/README.md", "report.html"))
    assert f"\n- `BLEU: {signature}`\n" in card and f">BLEU: {signature}<" in page
    column = pyarrow.parquet.read_table(EMBEDDED / "train.parquet", columns=["translation"]).slice(0, 24)
    letters = set("".join(column["translation"].to_pylist()).replace(" ", ""))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert letters <= set(tokenizer.get_vocab())
    assert "\n- speech-translation\n" in card  # the Hub's task `translation` is of text


# --- the same again


def test_another_seed_has_other_losses(train, trained, tmp_path):
    assert len(losses(trained)) == 3
    assert losses(train(tmp_path / "other", "seed=1", steps=1))[0] != losses(trained)[0]


def test_ten_steps_have_the_losses_they_always_had(train, tmp_path):
    """To rewrite them, with the reason stated: `SEDTRAIN_WRITE_GOLDEN=1 python -m pytest tests/training/test_training.py`."""
    measured = losses(train(tmp_path / "run", "encoder=hubert", "decoder=bert", "data.batch_seconds=12", steps=10))
    assert len(measured) == 10
    if os.environ.get("SEDTRAIN_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(measured, indent=2) + "\n")
    assert measured == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


# --- what a run leaves


def test_a_run_leaves_its_configuration_checkpoints_model_metrics_results_report_and_log(trained):
    for name in (
        "config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "metrics.csv", "results.json", "report.html",
        "sedtrain.log", "model/config.json", "model/model.safetensors", "model/generation_config.json",
        "model/tokenizer.json", "model/README.md",
    ):  # fmt: skip
        assert (trained / name).stat().st_size > 0, name
    assert (trained / "report.html").read_text().count("<svg") >= 3


def test_config_yaml_is_resolved(trained):
    text = (trained / "config.yaml").read_text()
    assert "${" not in text
    assert "???" not in text


def test_the_log_tells_of_plan_and_scores_without_bars_and_escape_codes(trained):
    log = (trained / "sedtrain.log").read_text()
    for words in ("what will be trained", "24 utterances", "val/wer", "95 % interval", "examples", "saved in"):
        assert words in log
    assert "\x1b" not in log
    assert "\r" not in log
    assert "━━━━━━╸" not in log
    assert not re.search(r"\d+%\|", log)


def test_the_model_card_names_no_place_on_this_machine(trained, corpus):
    card = (trained / "model/README.md").read_text()
    assert "\npipeline_tag: automatic-speech-recognition\n" in card
    assert "trained with sedtrain on `digits`" in card
    assert str(trained) not in card
    assert str(corpus.parent) not in card


def test_metrics_csv_holds_training_and_validation(trained):
    heading = (trained / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train/loss", "train/cross_entropy", "train/ctc_loss", "val/loss", "val/wer", "val/cer"} <= set(
        heading
    )


def test_checkpoints_hold_weights_optimizer_and_step(trained):
    for name in ("best", "last"):
        checkpoint = torch.load(trained / f"checkpoints/{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 3
        assert checkpoint["optimizer_states"]


def test_the_screen_shows_plan_scores_examples_and_places(sedtrain, corpus, tmp_path, monkeypatch):
    """And a run leaves nothing in the folder it was started in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ended = sedtrain(
        "data=parquet", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1",
        "trainer.log_every_n_steps=1", "decoding.max_new_tokens=5", "finetune=feature_encoder_frozen",
        "data.columns.speaker=speaker",
    )  # fmt: skip
    assert ended.status == 0
    for words in ("trainable", "frozen", "hours", "steps", "encoder", "wer", "reference", "hypothesis", "saved in"):
        assert words in ended.out
    assert "\ntest: 6 scored" in ended.out
    assert "WER, CER: normalizer lowercase 1" in ended.out
    speakers = set(pyarrow.parquet.read_table(corpus / "test.parquet")["speaker"].to_pylist())
    units = f"by speaker (only {len(speakers)} speakers)"
    for text in (ended.out, *((tmp_path / "run" / name).read_text() for name in ("model/README.md", "report.html"))):
        assert units in text
    stored = results(tmp_path / "run")
    assert (stored["resampled"], stored["num_speakers"]) == ("speaker", len(speakers))
    assert list(Path().iterdir()) == []


# --- the model elsewhere


def transcribed_by_transformers(folder, wav):
    """What the model card says, without any of sedtrain."""
    model = transformers.SpeechEncoderDecoderModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    audio, sampling_rate = soundfile.read(wav, dtype="float32")
    inputs = processor(audio, sampling_rate=sampling_rate, return_tensors="pt")
    return processor.decode(model.generate(**inputs)[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("where", ["", "model"])
def test_stock_transformers_writes_what_task_transcribe_writes(sedtrain, trained, wav, where):
    ended = sedtrain("task=transcribe", f"checkpoint={trained / where}", f"audio={wav}", "decoding.max_new_tokens=12")
    assert ended.status == 0, ended.err
    [line] = ended.out.splitlines()
    assert line == f"{wav}\t{transcribed_by_transformers(trained / 'model', wav)}"
    assert line.partition("\t")[2]


def test_feature_extractor_and_tokenizer_also_load_on_their_own(trained):
    processor = transformers.AutoProcessor.from_pretrained(trained / "model")
    feature_extractor = transformers.AutoFeatureExtractor.from_pretrained(trained / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "model")
    assert feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_globs_and_folders_are_transcribed_in_order(sedtrain, trained, wav):
    again = wav.with_name("again.wav")
    again.write_bytes(wav.read_bytes())
    for audio in (wav.parent, f"{wav.parent}/*.wav"):
        ended = sedtrain("task=transcribe", f"checkpoint={trained}", f"audio={audio}", "decoding.max_new_tokens=4")
        assert [line.partition("\t")[0] for line in ended.out.splitlines()] == [str(again), str(wav)]


def test_clicks_are_transcribed(sedtrain, trained, tmp_path):
    for num_samples in (1, 100, 800):
        soundfile.write(tmp_path / f"{num_samples}.wav", np.full(num_samples, 0.5, dtype="float32"), 16000)
    ended = sedtrain("task=transcribe", f"checkpoint={trained}", f"audio={tmp_path}")
    assert ended.status == 0, ended.err
    assert len(ended.out.splitlines()) == 3


def test_a_wav_without_samples_is_refused(sedtrain, trained, tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype="float32"), 16000)
    ended = sedtrain("task=transcribe", f"checkpoint={trained}", f"audio={tmp_path / 'empty.wav'}")
    assert ended.status == 2
    assert f"audio = '{tmp_path / 'empty.wav'}'\n    the audio has no samples\n" in ended.err


def test_of_several_files_those_that_cannot_be_transcribed_stop_no_other(sedtrain, trained, tmp_path, wav):
    good, bad, cut, empty = (tmp_path / f"{name}.wav" for name in ("z", "bad", "cut", "empty"))
    good.write_bytes(wav.read_bytes())
    cut.write_bytes(wav.read_bytes()[:20])
    bad.write_bytes(b"this is no audio")
    soundfile.write(empty, np.zeros(0, dtype="float32"), 16000)
    ended = sedtrain("task=transcribe", f"checkpoint={trained}", f"audio={tmp_path}", "decoding.max_new_tokens=12")
    assert ended.status == 1
    assert [line.partition("\t")[0] for line in ended.out.splitlines()] == [str(good)]
    told = [line for line in ended.err.splitlines() if not line.startswith(f"audio={good}")]  # its text is doubtful
    assert [line.partition(": ")[0] for line in told[:-1]] == [f"audio={path}" for path in (bad, cut, empty)]
    assert told[-1] == "3 of 4 files could not be transcribed"


# --- evaluation


def test_a_run_is_evaluated_on_its_own_data_with_equal_scores(sedtrain, trained, tmp_path):
    ended = sedtrain("task=evaluate", f"checkpoint={trained}", f"run_dir={tmp_path / 'scores'}")
    assert ended.status == 0, ended.err
    again, first = results(tmp_path / "scores"), results(trained)
    assert again["metrics"] == first["metrics"]
    assert again["decoding"] == first["decoding"]
    assert again["train"] is None
    assert (tmp_path / "scores/report.html").exists()


def test_utterances_without_words_are_scored_and_learnt_where_asked_for(sedtrain, corpus, tmp_path):
    (tmp_path / "data").mkdir()
    for file in corpus.glob("*.parquet"):
        rows = pyarrow.parquet.read_table(file)
        texts = pyarrow.array(["" if number % 3 == 0 else text for number, text in enumerate(rows["text"].to_pylist())])
        rows = rows.set_column(rows.column_names.index("text"), "text", texts)
        pyarrow.parquet.write_table(rows, tmp_path / "data" / file.name)
    ended = sedtrain(
        "data=parquet", f"data.path={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", "data.min_characters=0",
        "trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1", "decoding.max_new_tokens=12",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    folder = tmp_path / "run"
    stored = results(folder)
    assert (stored["num_utterances"], stored["num_empty"], stored["skipped"]) == (6, 2, {})
    assert (stored["train"]["utterances"] > 0) and all(np.isfinite(losses(folder)))
    assert "Utterances: 6 scored (of the scored 2 with an empty reference)" in (folder / "model/README.md").read_text()


def test_texts_that_are_cut_at_the_limit_of_tokens_are_counted_beside_the_scores(sedtrain, trained, tmp_path):
    cut = "test: 6 scored (of the scored 6 cut at the limit of tokens)"
    ended = sedtrain(
        "task=evaluate", f"checkpoint={trained}", f"run_dir={tmp_path}", "decoding.max_new_tokens=1",
        "decoding=beam", "decoding.num_return_sequences=2",
    )  # fmt: skip
    assert ended.out.splitlines()[0] == cut
    assert results(tmp_path)["num_cut"] == 6
    page = (tmp_path / "report.html").read_text()
    assert cut.partition(": ")[2] in page
    assert "2-best texts" in page and "Where the decoder listens" in page
    assert "cross-attention of the decoder" in page and "where CTC hears the token" in page


def test_a_folder_is_evaluated_on_the_data_that_is_named_with_the_scores_of_float32_beside_those_of_8_bits(
    sedtrain, trained, corpus, tmp_path
):
    ended = sedtrain(
        "task=evaluate", f"checkpoint={trained / 'model'}", f"run_dir={tmp_path / 'scores'}", "data=parquet",
        f"data.path={corpus}", "split=validation", "decoding.max_new_tokens=12", "decoding.int8=true",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    stored = results(tmp_path / "scores")
    assert stored["split"] == "validation" and stored["float32"].keys() == stored["metrics"].keys()
    shown = [line.split("│")[1:3] for line in ended.out.splitlines() if line.startswith("│ WER")]
    values = [f"{100 * stored[name]['wer']['value']:.2f} %" for name in ("metrics", "float32")]
    assert [[each.strip() for each in row] for row in shown] == [["WER", values[0]], ["WER in float32", values[1]]]


def test_another_target_is_scored_on_its_own_column(sedtrain, trained, tmp_path):
    ended = sedtrain("task=evaluate", f"checkpoint={trained}", f"run_dir={tmp_path / 'scores'}", "target=translation")
    assert ended.status == 0, ended.err
    assert results(tmp_path / "scores")["task"] == "translation"
    assert re.search("null|eins|zwei|drei|vier|sechs|sieben|acht", ended.out)


def test_a_run_is_found_by_its_home_folder_and_its_data_from_any_other(sedtrain, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(corpus.parent)
    data = ["data=parquet", f"data.path={corpus.name}", "data.max_seconds=1.5"]
    short = ["trainer.max_steps=1", "trainer.log_every_n_steps=1", "decoding.max_new_tokens=5"]
    assert sedtrain(*data, *short, f"run_dir={tmp_path / 'run'}").status == 0
    monkeypatch.chdir(tmp_path)
    ended = sedtrain("task=evaluate", 'checkpoint="~/run"', "run_dir=scores", "seed=3")
    assert ended.status == 0, ended.err
    again = results(tmp_path / "scores")
    assert again["metrics"] == results(tmp_path / "run")["metrics"]
    assert (again["skipped"], again["not_scored"]) == ({}, {})
    stored = OmegaConf.load(tmp_path / "scores/config.yaml").data
    assert (stored.path, stored.seed, stored.folder, stored.max_seconds) == (str(corpus), 3, "scores", 1.5)


def test_a_model_whose_weights_are_another_s_is_refused(sedtrain, trained, tmp_path, wav):
    shutil.copytree(trained / "model", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    save_file({"other.weight": torch.zeros(2)}, weights)
    transcribe = ["task=transcribe", f"checkpoint={tmp_path}", f"audio={wav}"]
    ended = sedtrain(*transcribe)
    assert ended.status == 2
    assert f"  checkpoint = '{tmp_path / 'model'}'\n    its weights belong to another model" in ended.err
    weights.write_bytes(b"x" * 100)
    ended = sedtrain(*transcribe)
    assert ended.status == 2
    assert f"  checkpoint = '{tmp_path / 'model'}'\n    the folder gave: Error while deserializing" in ended.err


@pytest.mark.parametrize("task", ["evaluate", "transcribe"])
def test_a_folder_that_is_no_model_is_refused(sedtrain, tmp_path, wav, task):
    audio = [f"audio={wav}"] if task == "transcribe" else []
    ended = sedtrain(f"task={task}", f"checkpoint={tmp_path}", *audio, f"run_dir={tmp_path / 'scores'}")
    assert ended.status == 2
    assert f"  checkpoint = '{tmp_path}'\n    this folder is no model, it holds no config.json" in ended.err
    small = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.BertModel(small).save_pretrained(tmp_path)
    ended = sedtrain(f"task={task}", f"checkpoint={tmp_path}", *audio, f"run_dir={tmp_path / 'other'}")
    assert ended.status == 2
    assert f"  checkpoint = '{tmp_path}'\n    this is a bert model, not a speech encoder-decoder\n" in ended.err


def test_audio_that_is_not_there_is_refused(sedtrain, trained):
    ended = sedtrain("task=transcribe", f"checkpoint={trained}", "audio=nowhere/*.wav")
    assert ended.status == 2
    assert "audio = 'nowhere/*.wav'\n    there is no such audio file\n" in ended.err


# --- bad data


def test_an_empty_split_is_refused(sedtrain, corpus, tmp_path):
    for split in ("train", "validation", "test"):
        rows = pyarrow.parquet.read_table(corpus / f"{split}.parquet")
        pyarrow.parquet.write_table(rows.slice(0, 0 if split == "train" else 2), tmp_path / f"{split}.parquet")
    ended = sedtrain("data=parquet", f"data.path={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert "the split 'train' is empty" in ended.err


def test_a_column_that_is_not_there_is_refused_and_those_that_are_named(sedtrain, corpus, tmp_path):
    words = "data.columns.transcription=words"
    ended = sedtrain("data=parquet", f"data.path={corpus}", words, f"run_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert "has no column 'words'" in ended.err
    assert "id, audio, text, translation, speaker, seconds" in ended.err


# --- folders that cannot be written


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that no one may write to")
def test_a_read_only_folder_is_refused(sedtrain):
    ended = sedtrain("run_dir=/proc/run")
    assert ended.status == 2
    assert "cannot be written to" in ended.err
    assert "write run_dir=FOLDER that you may write to" in ended.err


FULL = [
    ("torch.save", RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0")),
    ("sedtrain.job.run_task", RuntimeError("[enforce fail] . unexpected pos 576 vs 534")),  # torch.save, another time
    (
        "sedtrain.models.saved.SavedModel.save",
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ),
    ("sedtrain.evaluation.results.Results.write", OSError(errno.ENOSPC, "No space left on device")),
]


@pytest.mark.parametrize(("writer", "error"), FULL)
def test_a_full_disk_ends_the_run_with_a_message(sedtrain, corpus, tmp_path, monkeypatch, writer, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(writer, fail)
    folder = tmp_path / "run"
    ended = sedtrain(
        "data=parquet", f"data.path={corpus}", f"run_dir={folder}", "trainer.max_steps=1",
        "trainer.log_every_n_steps=1", "decoding.max_new_tokens=5",
    )  # fmt: skip
    assert ended.status == 2
    assert f"run_dir = '{folder}'\n    cannot be written to: " in ended.err
    assert "write run_dir=FOLDER on a disk with room" in ended.err


# --- interrupts


def test_ctrl_c_ends_with_a_checkpoint_and_a_model(corpus, tmp_path):
    folder = tmp_path / "run"
    run = Forked(
        tmp_path, "data=parquet", f"data.path={corpus}", f"run_dir={folder}",
        "trainer.max_steps=100000", "trainer.val_check_interval=5", "trainer.log_every_n_steps=1",
        "decoding.max_new_tokens=5",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(60) == 130, run.out + run.err
    assert "Traceback" not in run.err
    assert re.search(rf"stopped at step \d+; saved in {folder}: model, checkpoints/last.ckpt", run.err)
    stopped_at = int(re.search(r"stopped at step (\d+)", run.err)[1])
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == stopped_at > 0
    transformers.SpeechEncoderDecoderModel.from_pretrained(folder / "model")


class CtrlCTwice(lightning.Callback):
    def on_validation_batch_start(self, *_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_twice_ends_at_once_and_says_where_things_stand(corpus, tmp_path):
    run = Forked(
        tmp_path, "data=parquet", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}",
        "trainer.val_check_interval=2", f"+callbacks.press._target_={__name__}.CtrlCTwice",
    )  # fmt: skip
    assert run.wait() == 130, run.out + run.err
    assert run.err.splitlines()[-2:] == [
        "stopping after this step, or the validation under way, and saving a checkpoint; press Ctrl-C again to stop at once",
        "interrupted at step 2; nothing is saved yet",
    ]


def test_ctrl_c_while_the_task_is_imported_ends_with_a_word(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "sedtrain", f"run_dir={tmp_path}"],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "sedtrain.log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (130, "", "interrupted\n")


# --- sweeps


def test_a_job_of_a_sweep_that_fails_stops_no_other(sedtrain, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = sedtrain(
        "-m", "decoder=bert,gpt2", "encoder.checkpoint=null,./nowhere", "data=parquet", f"data.path={corpus}",
        "trainer.max_steps=1", "trainer.log_every_n_steps=1", "decoding.max_new_tokens=5",
    )  # fmt: skip
    assert ended.status == 2
    assert ended.err.count("encoder.checkpoint = './nowhere'\n    there is no such folder") == 2
    assert "jobs of the sweep that failed: 2\n  1 (decoder=bert encoder.checkpoint=./nowhere data=parquet " in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    [sweep] = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "2", "3", "multirun.yaml"]
    for job, decoder in (("0", "bert"), ("2", "gpt2")):
        assert f"model_type: {decoder}" in (sweep / job / "config.yaml").read_text()
        assert results(sweep / job)["num_utterances"] == 6
        assert (sweep / job / "sedtrain.log").read_text().count("what will be trained") == 1


def test_a_job_of_a_sweep_that_breaks_stops_no_other(sedtrain, trained, corpus, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sedtrain.tasks.build_saved.evaluation", fail)
    ended = sedtrain("-m", "task=evaluate", f"checkpoint={trained}", "split=test,train", 'run_dir="${split}"')
    assert ended.status == 1
    assert ended.err.count("RuntimeError: a fault of ours") == 2
    assert "jobs of the sweep that failed: 2\n  0 (task=evaluate" in ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "test", "train"}


def test_processes_started_for_a_job_of_a_sweep_run_this_job_alone(sedtrain, tmp_path, monkeypatch):
    started = []

    def run(cfg):
        started.append(sys.argv[1:])
        os.environ |= {"LOCAL_RANK": "0", "MASTER_PORT": "1", "SEDTRAIN_RUN_DIR": cfg.run_dir}
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if cfg.seed == 1:
            raise RuntimeError("a job that fails")

    monkeypatch.setattr("sedtrain.cli.run", run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more/adapter").mkdir(parents=True)
    overrides = ["-m", "seed=1,2", "strategy=ddp", "hydra.sweep.dir=all", f"hydra.searchpath=[{tmp_path / 'more'}]"]
    before = dict(os.environ)
    ended = sedtrain("--config-dir", "more", *overrides, "hydra/launcher=basic")
    assert "0 (seed=1 strategy=ddp): exit status 1" in ended.err
    assert os.environ == before
    assert not torch.distributed.is_initialized()
    flags = ["--config-dir", "more", f"hydra.searchpath=[{tmp_path / 'more'}]"]
    assert started == [[*flags, f"seed={seed}", "strategy=ddp"] for seed in (1, 2)]
    assert all(check_command_line(arguments) for arguments in started)


# --- ranks


def test_two_ranks_share_one_folder_and_score_the_whole_split(corpus, tmp_path):
    """In a sweep whose other job has one."""
    alone, folder = tmp_path / "0", tmp_path / "1"
    run = Forked(
        tmp_path, "-m", "data=parquet", f"data.path={corpus}", f"hydra.sweep.dir={tmp_path}",
        "strategy=ddp", "trainer.devices=1,2", "trainer.accelerator=cpu", "trainer.max_steps=-1", "++trainer.max_epochs=1",
        "trainer.val_check_interval=2", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1",
        "data.batch_seconds=4", "data.num_buckets=3", "decoding.max_new_tokens=5", "encoder.tiny.num_hidden_layers=1",
    )  # fmt: skip
    assert run.wait() == 0, run.out + run.err
    assert results(folder)["train"]["utterances"] == pq.read_table(corpus / "train.parquet").num_rows
    assert results(folder)["train"]["steps"] == 3
    assert re.search(r"steps +3\b", run.out)
    assert results(folder)["num_utterances"] == pq.read_table(corpus / "test.parquet").num_rows
    assert run.out.count("saved in") == 2
    assert results(alone)["train"]["steps"] > 4

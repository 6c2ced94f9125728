"""What build refuses before training starts, and what the options of the Trainer do."""

import json
import math
import shutil
from collections import Counter
from importlib.metadata import version
from math import ceil

import lightning
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Timer

from sedtrain import build, build_saved, devices, transcribe
from sedtrain.config.schema import conf_dir, register
from sedtrain.data.buckets import Bounds
from sedtrain.errors import UserError
from sedtrain.text.tokenizers import train_tokenizer
from sedtrain.training.checkpoint_files import read_checkpoint
from sedtrain.training.checkpoints import Checkpoints

SMALL = [
    "encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1", "decoding.max_new_tokens=5",
    "trainer.max_steps=2", "trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture
def command(sedtrain, corpus, tmp_path):
    """The command on the small corpus and small parts, with overrides; returns how it ended."""
    return lambda *overrides: sedtrain(
        "data=parquet", f"data.path={corpus}", f"run_dir={tmp_path / 'run'}", *SMALL, *overrides
    )


@pytest.fixture
def composed(corpus, tmp_path):
    """A function of overrides: the configuration of a run on the small corpus."""

    def compose_run(*overrides):
        register()
        choices = ["data=parquet", f"data.path={corpus}", f"run_dir={tmp_path}", "logger=none"]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", [*choices, *SMALL, *overrides])

    return compose_run


@pytest.fixture
def built(composed):
    """A function of overrides: the connected components of a run on the small corpus."""
    return lambda *overrides: build.training_run(composed(*overrides))


def test_transcription_has_the_bounds_of_training_batches(composed):
    batches = "[{seconds:2.0,tokens:9,utterances:3}]"
    assert transcribe.bounds_of(composed("data.batch_seconds=7", f"data.batches={batches}")) == Bounds.of(
        7, batches=[{"seconds": 2.0, "tokens": 9, "utterances": 3}]
    )


# --- precision


def losses(folder):
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    column = lines[0].index("train/loss")
    return torch.tensor([float(line[column]) for line in lines[1:] if line[column]])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains_scores_and_leaves_a_model_in_float32(command, tmp_path, precision):
    ended = command(f"trainer.precision={precision}")
    assert ended.status == 0, ended.err
    assert len(losses(tmp_path / "run")) == 2
    assert losses(tmp_path / "run").isfinite().all()
    model = transformers.AutoConfig.from_pretrained(tmp_path / "run/model")
    assert model.dtype == torch.float32
    assert json.loads((tmp_path / "run/results.json").read_text())["train"]["steps"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in float16")
def test_float16_beside_float32_becomes_bfloat16_on_a_cpu_and_says_so(built):
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        run = built("trainer.precision=16-mixed")
    run.trainer.fit(run.module, datamodule=run.data)
    assert run.trainer.callback_metrics["train/loss"].isfinite()


FLOAT16 = (
    "trainer.plugins={_target_: lightning.pytorch.plugins.precision.MixedPrecision, precision: 16-mixed, device: cpu, "
    "scaler: {_target_: torch.amp.GradScaler, device: cpu, init_scale: 64.0}}"
)


@pytest.mark.parametrize(
    "precision",
    [["trainer.precision=32-true"], ["trainer.precision=bf16-mixed"], ["trainer.precision=null", f"+{FLOAT16}"]],
    ids=["float32", "bfloat16", "float16 scaled by 64"],
)
def test_a_fused_step_goes_as_far_as_clipping_allows_in_mixed_precision_too(built, precision):
    """Plain descent at a rate of 1 moves the weights by the clipped gradient."""
    run = built(
        "optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "optimizer.lr=1",
        "optimizer.weight_decay=0", "scheduler=constant", "scheduler.warmup_fraction=0",
        "trainer.gradient_clip_val=0.01", "trainer.max_steps=1",
        *precision,
    )  # fmt: skip
    before = torch.nn.utils.parameters_to_vector(run.module.parameters()).detach().clone()
    run.trainer.fit(run.module, datamodule=run.data)
    assert run.trainer.optimizers[0].defaults["fused"]
    moved = torch.nn.utils.parameters_to_vector(run.module.parameters()).detach() - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# --- what components refuse


def refused(make, *arguments):
    """Option and value of everything that is refused at once, with what is wrong and what to write."""
    with pytest.raises(UserError) as raised:
        make(*arguments)
    return {(error.option, error.value): (error.wrong, error.write) for error in raised.value.errors}


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("trainer.accelerator=gpuu", "invalid accelerator name: `accelerator='gpuu'`"),
        ("trainer.devices=0", "`Trainer(devices=0)` value is not a valid input"),
        ("trainer.max_time=abc", "Expected a string in the format DD:HH:MM:SS"),
        ("trainer.precision=foo", "Precision 'foo' is invalid. Allowed"),
        ("trainer.val_check_interval=0.5", "should be an integer or a time-based"),
    ],
)
def test_a_value_that_a_component_refuses_is_a_problem_of_the_component(composed, override, wrong):
    cfg = composed(override)
    [(place, told)] = refused(build.make_trainer, cfg, build.create(cfg, "finetune")).items()
    assert place == ("trainer", "lightning.Trainer")
    assert wrong in told[0]
    assert told[1] == "write values that Trainer takes, such as trainer.OPTION=VALUE"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_the_machine_lacks_is_refused_by_all_that_would_use_it(composed, accelerator):
    cfg = composed(f"trainer.accelerator={accelerator}")
    expected = {
        ("trainer.accelerator", accelerator): (
            "PyTorch finds none on this machine",
            "write trainer.accelerator=auto or cpu",
        )
    }
    assert refused(build.make_trainer, cfg, build.create(cfg, "finetune")) == expected
    assert refused(devices.device, cfg.trainer.accelerator) == expected


def test_everything_that_components_refuse_is_reported_at_once(built, tmp_path):
    missing = ("encoder.checkpoint", "decoder.checkpoint")
    overrides = [f"{option}={tmp_path}/nowhere" for option in missing]
    found = refused(
        built, *overrides, "data.path=./nowhere", "trainer.devices=0", "augment=reverb", "augment.reverb.folder=no"
    )
    assert {option for option, _ in found} == {*missing, "data.path", "augment.reverb.folder", "trainer"}


def test_what_depends_on_a_refused_component_is_not_tried_and_all_else_is(built):
    """The optimizer needs the model, which has no width for this adapter; the Trainer needs neither."""
    found = refused(built, "adapter=none", "decoder.tiny.hidden_size=96", "optimizer.lr=-1", "trainer.max_steps=-1")
    assert {option for option, _ in found} == {"adapter", "trainer.max_steps"}
    wrong, write = found["trainer.max_steps", -1]
    assert wrong == "nothing ends this training, so its learning rate cannot be planned"
    assert write == "write trainer.max_steps=NUMBER or trainer.max_epochs=NUMBER"
    found = refused(built, "optimizer.lr=-1", "trainer.max_steps=-1")
    assert found["optimizer", "torch.optim.AdamW"][0] == "Invalid learning rate: -1"
    assert len(found) == 2


def test_a_search_by_ctc_is_refused_before_a_training_without_ctc(built):
    with pytest.raises(UserError, match="it needs the CTC head of the model") as raised:
        built("loss=cross_entropy", "decoding=joint")
    assert [(error.option, error.value) for error in raised.value.errors] == [("decoding.search", "joint")]


def test_a_missing_language_model_is_refused_before_a_training(built):
    with pytest.raises(UserError, match="there is no such folder") as raised:
        built("+decoding.lm=/no/folder")
    assert [error.option for error in raised.value.errors] == ["decoding.lm"]


def test_heads_that_do_not_divide_the_width_are_a_problem(built):
    with pytest.raises(UserError, match="it does not divide the width, 145"):
        built("+encoder.options.hidden_size=145")


def test_every_split_that_the_run_needs_is_checked_before_training(command):
    ended = command("data.validation_split=nein", "data.test_split=nope", "trainer.devices=0")
    assert ended.status == 2
    assert ended.err.startswith("3 problems:\n\n")
    assert "'nein'" in ended.err
    assert "'nope'" in ended.err
    assert "trainer = 'lightning.Trainer'" in ended.err
    assert "what will be trained" not in ended.out


# --- options of the Trainer


def test_a_time_limit_with_units_is_taken(built):
    assert built("trainer.max_time={minutes: 5}").seconds_left() == built("trainer.max_time=00:00:05:00").seconds_left()


FALLING = ["optimizer.lr=0.001", "scheduler.warmup_fraction=0"]


@pytest.mark.parametrize("overrides", [[], ["scheduler=linear"], ["trainer.accumulate_grad_batches=2"]])
def test_a_time_limit_that_ends_training_lets_the_learning_rate_fall_to_its_end(built, monkeypatch, overrides):
    run = built("trainer.max_time=00:00:00:10", "trainer.max_steps=100", *FALLING, *overrides)
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": 2.5 * run.trainer.global_step)
    rates = learning_rates(run)
    assert run.trainer.global_step == 4
    expected = [1 + math.cos(math.pi * done) for done in (0.25, 0.5, 0.75, 1)]
    if overrides == ["scheduler=linear"]:
        expected = [2 - 2 * done for done in (0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0.001 * rate / 2 for rate in expected])
    assert run.ended_early() == "trainer.max_time ended training at step 4 of 100"
    totals = run.totals()
    assert (totals.steps, totals.planned_steps, totals.ended_by) == (4, 100, "trainer.max_time")


def test_a_time_limit_that_steps_keep_ahead_of_changes_no_learning_rate(built, tmp_path, monkeypatch):
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": 0.01)
    limited, free = (
        built(f"trainer.max_time={limit}", "trainer.max_steps=6", f"run_dir={tmp_path / limit}")
        for limit in ("00:00:00:10", "null")
    )
    assert learning_rates(limited) == learning_rates(free)
    assert limited.ended_early() is free.ended_early() is None
    assert (limited.totals().planned_steps, limited.totals().ended_by) == (6, None)


def test_steps_catch_up_with_a_schedule_that_time_has_moved_ahead(built, monkeypatch):
    run = built("trainer.max_time=00:00:01:40", "trainer.max_steps=8", "scheduler=linear", *FALLING)
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": 50.0)  # a slow start
    assert learning_rates(run) == pytest.approx([0.001 * (1 - done / 8) for done in (4, 4, 4, 4, 5, 6, 7, 8)])


def learning_rates(run):
    """Trains, and returns the learning rate that each step leaves to the next."""
    rates = []

    class Note(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.extend([trainer.optimizers[0].param_groups[0]["lr"]] * (trainer.global_step > len(rates)))

    run.trainer.callbacks.append(Note())
    run.fit(None)
    return rates


def test_a_training_that_its_time_limit_ends_says_so_everywhere(command, tmp_path):
    ended = command("trainer.max_steps=100000", "trainer.max_time={seconds: 1}")
    assert ended.status == 0
    stored = json.loads((tmp_path / "run/results.json").read_text())["train"]
    steps = f"{stored['steps']:,}"
    assert (stored["planned_steps"], stored["ended_by"]) == (100_000, "trainer.max_time") and 0 < stored[
        "steps"
    ] < 1_000
    told = f"trainer.max_time ended training at step {steps} of 100,000; write a longer one, or null, to train for all steps"
    assert told in ended.err and told in (tmp_path / "run/sedtrain.log").read_text()
    assert f"{steps} steps of 100,000, ended by trainer.max_time" in (tmp_path / "run/report.html").read_text()


class Watch(lightning.Callback):
    """Counts validations by the number of steps before them."""

    def __init__(self):
        self.validations = Counter()

    def on_validation_end(self, trainer, pl_module):
        self.validations[trainer.global_step] += 1


@pytest.mark.parametrize(
    ("overrides", "validations"),
    [
        (["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accumulate_grad_batches=2"], {2: 1, 4: 1}),
        (["trainer.max_steps=-1", "++trainer.max_epochs=1"], {12: 1}),
        (
            ["trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.accumulate_grad_batches=5"],
            {2: 1, 4: 1, 6: 1},
        ),
        (["trainer.max_steps=1", "trainer.num_sanity_val_steps=1"], {0: 1, 1: 1}),
    ],
)
def test_validation_comes_after_so_many_steps_of_the_optimizer(built, overrides, validations):
    run = built("data.batch_seconds=4", *overrides)
    watch = Watch()
    run.trainer.callbacks.insert(0, watch)
    run.trainer.fit(run.module, datamodule=run.data)
    assert watch.validations == validations
    assert read_checkpoint(run.folder / "checkpoints/best.ckpt")["global_step"] in validations.keys() - {0}


@pytest.mark.parametrize("overrides", [[], ["~callbacks.progress"]], ids=["our bar", "no bar"])
def test_without_a_progress_bar_nothing_is_shown_and_training_is_counted(command, tmp_path, overrides):
    ended = command("trainer.enable_progress_bar=false", "callbacks.interrupt=null", *overrides)
    assert ended.status == 0, ended.err
    assert "step " not in ended.err
    train = json.loads((tmp_path / "run/results.json").read_text())["train"]
    assert train is None if overrides else train["steps"] == 2


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_plan_tells_the_steps_of_a_training_by_epochs(built, accumulated):
    run = built(
        "trainer.max_steps=-1", "++trainer.max_epochs=2", "data.batch_seconds=4",
        f"trainer.accumulate_grad_batches={accumulated}", "trainer.max_time=00:00:08:00",
    )  # fmt: skip
    _, facts = run.plan()
    run.trainer.fit(run.module, datamodule=run.data)
    assert facts["steps"] == f"{run.trainer.estimated_stepping_batches}, at most 0:08:00"


@pytest.mark.parametrize("limit", ["3", "0.4", "100"])
def test_the_plan_tells_the_steps_of_a_limited_epoch(built, limit):
    run = built(
        "trainer.max_steps=-1", "++trainer.max_epochs=2", "data.batch_seconds=6",
        "trainer.accumulate_grad_batches=2", f"++trainer.limit_train_batches={limit}",
    )  # fmt: skip
    steps = run.num_steps()
    run.trainer.fit(run.module, datamodule=run.data)
    assert run.trainer.global_step == run.trainer.estimated_stepping_batches == steps


def test_the_plan_tells_the_steps_of_ranks_that_share_the_batches(built):
    options = ["trainer.max_steps=-1", "++trainer.max_epochs=1", "data.batch_seconds=4", "data.num_buckets=3"]
    run = built(*options, "trainer.devices=2", "trainer.accelerator=cpu", "strategy=ddp")
    plan = run.data.train_dataloader().sampler.plan
    assert run.num_steps() == ceil(len(plan.batch_groups) / 2) == 6
    assert run.num_batches == len(plan.batch_groups)


def test_the_plan_tells_the_smaller_of_steps_and_epochs(built):
    assert built("trainer.max_steps=5000", "++trainer.max_epochs=1").num_steps() == 3
    assert built("trainer.max_steps=2", "++trainer.max_epochs=1").num_steps() == 2


def test_the_plan_tells_that_epochs_of_unknown_length_may_end_before_the_steps(built, caplog):
    epochs = ["trainer.max_steps=1800", "++trainer.max_epochs=2"]
    limited = "trainer.max_time=00:00:08:00"
    assert built(*epochs).plan()[1]["steps"] == "6"
    assert "is planned for" not in caplog.text
    streamed = ["data.streaming=true", "data.batch_seconds=8"]
    assert built(*epochs[:1], *streamed).plan()[1]["steps"] == "1,800"
    assert "is planned for" not in caplog.text
    _, facts = built(*epochs, *streamed, limited).plan()
    assert facts["steps"] == "1,800, or 2 epochs if they end first, at most 0:08:00"
    [warning] = [each.getMessage() for each in caplog.records if "is planned for" in each.getMessage()]
    assert warning == (
        "the learning rate is planned for trainer.max_steps=1800, since an epoch of a stream or of a weighted mix has "
        "an unknown number of steps; trainer.max_epochs=2 may end training long before, even in warm-up"
    )


# --- data


SAME_FILES = "the same files would be training, validation and test data at once"


@pytest.mark.parametrize("path", ["a-{000..127}.tar", "a-*.parquet", "https://host/a.parquet", "hf://datasets/a/*.tar"])
def test_files_that_are_the_same_for_all_splits_are_refused(composed, path):
    mixed = ["data=mix", f'data.mix.german.path="{path}"', "data.mix.english.path=spoken_digits"]
    for option, overrides in (("data.path", [f'data.path="{path}"']), ("data.mix.german.path", mixed)):
        [(place, (wrong, write))] = refused(build.training_data, composed(*overrides)).items()
        assert (place, wrong) == ((option, path), SAME_FILES)
        assert write.startswith(f"write {option}=PATTERN with {{split}}")


@pytest.mark.parametrize("file", ["train.parquet", "tr*n.parquet"])
def test_splits_cut_from_the_same_files_are_no_others_data(built, corpus, file):
    parts = ["train[:50%]", "train[50%:75%]", "train[75%:]"]
    names = [f"data.{split}_split='{part}'" for split, part in zip(("train", "validation", "test"), parts, strict=True)]
    data = built(f"data.path={corpus / file}", *names).data
    assert [len(data.corpus.kept(split)) for split in ("train", "validation", "test")] == [12, 6, 6]


def test_a_pattern_with_the_name_of_the_split_is_not_refused(built, corpus):
    assert len(built(f'data.path="{corpus}/{{split}}*.parquet"').data.corpus.kept("test")) == 6


def test_a_run_leaves_out_texts_that_its_decoder_cannot_hold_and_scores_them(command, corpus, tmp_path):
    for split in ("train", "validation", "test"):
        rows = pyarrow.parquet.read_table(corpus / f"{split}.parquet")
        texts = ["one two three four five six", *(text[:15] for text in rows["text"].to_pylist()[1:])]
        rows = rows.set_column(rows.column_names.index("text"), "text", [texts])
        pyarrow.parquet.write_table(rows, tmp_path / f"{split}.parquet")
    ended = command(
        f"data.path={tmp_path}",
        "decoder.tiny.max_position_embeddings=16",
        "tokenizer=char",
        "decoding.max_new_tokens=40",
    )
    assert ended.status == 0
    assert "text too long for the decoder's 16 positions (first: train-0 28 tokens)\n" in ended.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["skipped"] == {"text too long for the decoder's 16 positions": 1}
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 1
    assert results["num_utterances"] == 6
    assert json.loads((tmp_path / "run/model/generation_config.json").read_text())["max_new_tokens"] == 16


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_stops_a_stream_in_its_first_block_is_told_without_a_traceback(command, corpus, tmp_path, num_workers):
    folder = tmp_path / "dirty"
    shutil.copytree(corpus, folder)
    rows = pyarrow.parquet.read_table(corpus / "train.parquet")
    column = rows.column_names.index("text")
    texts = ["", *rows["text"].to_pylist()[1:]]
    pyarrow.parquet.write_table(rows.set_column(column, "text", [texts]), folder / "train.parquet")
    ended = command(
        f"data.path={folder}", "data.streaming=true", f"data.num_workers={num_workers}", "data.on_bad_utterance=error"
    )
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert ended.err.count("1 problem:\n\n") == 1
    told, instead = ended.err.splitlines()[-2:]
    assert (told.endswith("empty text"), instead) == (
        True, "    write data.on_bad_utterance=skip to continue without it",
    )  # fmt: skip


def test_the_split_that_is_not_scored_may_be_missing(built):
    assert built("data.test_split=nope", "split=validation").data.corpus.sources[0].splits["test"] == "nope"


# --- texts


@pytest.fixture
def loud(corpus, tmp_path):
    """The small corpus in capitals."""
    folder = tmp_path / "loud"
    folder.mkdir()
    for file in corpus.glob("*.parquet"):
        table = pyarrow.parquet.read_table(file)
        number = table.schema.get_field_index("text")
        capitals = pyarrow.array([text.upper() for text in table["text"].to_pylist()])
        pyarrow.parquet.write_table(table.set_column(number, "text", capitals), folder / file.name)
    return folder


def reported(caplog):
    """The vocabulary report of each split: how loud, and its lines."""
    records = [record for record in caplog.records if "the tokenizer" in record.getMessage()]
    return {record.getMessage()[: record.getMessage().index(":")]: record for record in records}


def test_labels_and_tokenizer_follow_the_training_normalizer_and_references_do_not(built, loud):
    run = built(f"data.path={loud}", "training_normalizer=lowercase")
    [*_, batch] = run.data.batches("validation")
    assert all(text.isupper() for text in batch.texts)
    written = [run.saved.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in batch.labels]
    assert written == [text.lower() for text in batch.texts]
    assert "ONE" not in "".join(run.saved.tokenizer.get_vocab())


def test_texts_are_learnt_as_they_are_by_default(built, loud):
    run = built(f"data.path={loud}")
    [*_, batch] = run.data.batches("train")
    assert run.saved.tokenizer.decode(batch.labels[0][batch.labels[0] >= 0], skip_special_tokens=True) == batch.texts[0]


def test_a_model_knows_how_many_tokens_its_training_texts_have_in_a_second(built, corpus, tmp_path):
    run = built(f"data.path={corpus}", "decoding.max_new_tokens=null")
    batches = list(run.data.batches("train"))
    num_tokens = sum(int((batch.labels >= 0).sum()) for batch in batches)
    config = run.saved.model.config
    assert config.tokens_per_second == pytest.approx(num_tokens / sum(batch.seconds for batch in batches), abs=0.01)
    run.saved.save(tmp_path / "saved", run.module.decoding.generation_kwargs())
    generation = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert generation["max_new_tokens"] == 16 + math.ceil(4 * config.tokens_per_second * config.max_training_seconds)


def test_both_normalizers_are_named_by_model_card_and_results_and_need_not_be(command, sedtrain, loud, tmp_path):
    ended = command(f"data.path={loud}", "training_normalizer=whisper_basic", "normalizer=none")
    assert ended.status == 0, ended.err
    label = {"name": "whisper_basic", "version": f"whisper-normalizer {version('whisper-normalizer')}"}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run/model").training_normalizer == label
    card = (tmp_path / "run/model/README.md").read_text()
    assert "\n- `WER, CER: normalizer none 1`\n" in card
    assert f"Text normalizer for training: `{' '.join(label.values())}`" in card
    again = sedtrain("task=evaluate", f"checkpoint={tmp_path / 'run'}", f"run_dir={tmp_path / 'again'}")
    assert again.status == 0, again.err
    for folder in ("run", "again"):
        stored = json.loads((tmp_path / folder / "results.json").read_text())
        assert (stored["normalizer"]["name"], stored["training_normalizer"]) == ("none", label)
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    del config["training_normalizer"]
    (tmp_path / "run/model/config.json").write_text(json.dumps(config))
    unnamed = sedtrain("task=evaluate", f"checkpoint={tmp_path / 'run'}", f"run_dir={tmp_path / 'unnamed'}")
    assert unnamed.status == 0, unnamed.err
    assert json.loads((tmp_path / "unnamed/results.json").read_text())["training_normalizer"] is None


def test_an_unknown_training_normalizer_is_refused_with_the_closest(command):
    ended = command("training_normalizer=lowercas")
    assert ended.status == 2
    assert "training_normalizer has no option 'lowercas'\n    did you mean 'lowercase'?" in ended.err


def test_a_tokenizer_from_the_first_texts_is_told_what_the_others_hold(built, caplog):
    run = built("tokenizer=char", "tokenizer.max_texts=1")
    first, *others = run.data.texts("train")
    missing = Counter("".join(others).replace(" ", ""))
    missing = {each: count for each, count in missing.items() if each not in first}
    said = reported(caplog)
    assert [said[split].levelname for split in ("train", "validation")] == ["WARNING", "WARNING"]
    lines = said["train"].getMessage().splitlines()
    assert lines[0].startswith(f"train: the tokenizer cannot write {len(missing)} of the ")
    assert len(missing) > 0
    assert "encoding and decoding changes" in lines[1 + len(missing)]
    assert len(lines) == 1 + len(missing) + 1 + 3


@pytest.mark.parametrize("limit", [0, 3])
def test_no_more_texts_are_reported_on_than_are_asked_for(built, caplog, limit):
    caplog.set_level("INFO", logger="sedtrain")
    built(f"vocabulary_texts={limit}")
    assert [record.getMessage().endswith("of 3 texts") for record in reported(caplog).values()] == [True] * 2 * (
        limit > 0
    )


def test_everything_that_can_be_written_is_one_line_a_split(built, caplog):
    caplog.set_level("INFO", logger="sedtrain")
    run = built("vocabulary_texts=null")
    num_characters = len(set("".join(run.data.texts("train")).replace(" ", "")))
    record = reported(caplog)["train"]
    assert record.getMessage() == f"train: the tokenizer writes all {num_characters} characters of 24 texts"
    assert record.levelname == "INFO"


def test_characters_that_a_pretrained_tokenizer_cannot_write_are_warned_of(built, tmp_path, caplog):
    decoder = built().module.model.decoder
    tokenizer = train_tokenizer(["one two three four five six nine eight"], "char", 100)
    decoder.resize_token_embeddings(len(tokenizer))
    decoder.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    caplog.clear()
    run = built(f"decoder.checkpoint={tmp_path / 'decoder'}")
    number = "".join(run.data.texts("train")).count("z")
    assert number > 0
    said = reported(caplog)["train"]
    assert said.levelname == "WARNING"
    assert f"\n  'z' (U+007A) {number} times as in " in said.getMessage()
    built(f"decoder.checkpoint={tmp_path / 'decoder'}", "training_normalizer=whisper_english")  # zero becomes 0
    assert "'0' (U+0030)" in (brought := caplog.records[-2].getMessage()) and "added by the normalizer" in brought


@pytest.mark.parametrize(
    ("is_there", "accelerator", "expected"), [(True, "auto", "cuda"), (True, "cpu", "cpu"), (False, "auto", "cpu")]
)
def test_a_model_writes_on_the_accelerator_that_there_is_and_may_be_used(monkeypatch, is_there, accelerator, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert devices.device(accelerator) == torch.device(expected)


class Asked(Exception):
    pass


@pytest.mark.parametrize("task", ["evaluate", "transcribe"])
def test_evaluation_and_transcription_ask_where_the_model_writes(sedtrain, trained, tmp_path, monkeypatch, task):
    def asked(cfg):
        raise Asked

    soundfile.write(tmp_path / "a.wav", [0.0] * 16_000, 16_000)
    monkeypatch.setattr(build_saved, "device", asked)
    monkeypatch.setattr(transcribe, "device", asked)
    with pytest.raises(Asked):
        audio = [f"audio={tmp_path / 'a.wav'}"] if task == "transcribe" else []
        sedtrain(f"task={task}", f"checkpoint={trained}", f"run_dir={tmp_path / 'run'}", *audio)


# --- the metric and the spelling of a language


@pytest.mark.parametrize(
    ("text", "overrides", "metric"),
    [
        ("今天天气很好", [], "val/cer"),
        ("它们 天气", [], "val/cer"),
        ("three one", [], "val/wer"),
        ("今天天气很好", ["target=translation", "data.columns.translation=text", "data.language=zh"], "val/bleu"),
    ],
)
def test_texts_without_spaces_between_words_choose_the_best_weights_by_characters(
    built, corpus, tmp_path, text, overrides, metric
):
    run = built(f"data.path={with_texts(corpus, tmp_path / 'texts', text)}", *overrides)
    assert [callback.monitor for callback in run.callbacks(Checkpoints)] == [metric]
    assert run.plan()[1]["best weights"] == f"by {metric}"


def test_a_pretrained_wordpiece_tokenizer_writes_as_the_training_texts_do(built, corpus, tmp_path, caplog):
    text = "it's a well-known idea"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "'",
        "-",
        "a",
        "s",
        "it",
        "well",
        "known",
        "idea",
        *"weklnotid",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(tokenizer), is_decoder=True, **shape)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with caplog.at_level("INFO", "sedtrain"):
        run = built(
            f"data.path={with_texts(corpus, tmp_path / 'texts', text)}", f"decoder.checkpoint={tmp_path / 'bert'}"
        )
    assert "train: the tokenizer writes all 13 characters of 24 texts" in caplog.messages
    run.saved.save(tmp_path / "model", {})
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    labels = run.data.collator.target(text)
    assert processor.batch_decode([labels], skip_special_tokens=True) == [text]
    assert tokenizer.decode(labels, skip_special_tokens=True) == "it ' s a well - known idea"


def with_texts(corpus, folder, text):
    """A copy of a corpus in which all say the same."""
    folder.mkdir()
    for file in corpus.glob("*.parquet"):
        rows = pyarrow.parquet.read_table(file)
        texts = pyarrow.array([text] * len(rows))
        pyarrow.parquet.write_table(rows.set_column(rows.column_names.index("text"), "text", texts), folder / file.name)
    return folder

"""Rules that no signature tells, checked with the rest of the command line."""

import pytest
from told import Problem, told

from sedtrain.config.overrides import check_command_line
from sedtrain.config.rules import READ_BY
from sedtrain.config.schema import conf_dir
from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import METRICS


def problems(*arguments):
    with pytest.raises(UserError) as caught:
        check_command_line(list(arguments))
    return told(caught.value.errors)


def test_options_of_the_trainer_that_are_decided_elsewhere_are_all_refused_at_once():
    options = {
        "trainer.logger=false": "write logger=csv, logger=[csv,tensorboard] or logger=none",
        "trainer.callbacks=[]": "add yours to the group: +callbacks.NAME._target_=package.module.Name",
        "trainer.default_root_dir=elsewhere": "write run_dir=FOLDER",
        "trainer.use_distributed_sampler=false": "leave it out: batches are shared among the devices when they are made",
        "trainer.enable_checkpointing=false": "leave it out: a run keeps its best and its last weights",
        "trainer.enable_model_summary=false": "leave it out: the components of the model are shown before training starts",
        "trainer.overfit_batches=2": "write trainer.limit_train_batches=NUMBER, or data.path=PATH of data with few utterances",
    }
    found = problems(*options)
    written = {each.option: (each.wrong, each.write) for each in found}
    assert len(found) == len(options) == 7
    for override, write in options.items():
        option = override.partition("=")[0]
        assert written[option] == (f"{option.partition('.')[2]} is decided elsewhere", write)


def test_a_run_keeps_its_checkpoints():
    write = "leave callbacks.checkpoints as it is; other callbacks may go"
    expected = Problem("callbacks.checkpoints", None, "this callback is required: it saves the best weights", write)
    assert problems("~callbacks.checkpoints") == problems("callbacks.checkpoints=null") == [expected]
    assert check_command_line(["~callbacks.checkpoints", "task=inspect"])


@pytest.mark.parametrize("value", [5, 0.5])
def test_a_time_limit_has_a_unit(value):
    write = 'write trainer.max_time="DD:HH:MM:SS", or trainer.max_time={minutes: NUMBER}'
    assert problems(f"trainer.max_time={value}") == [Problem("trainer.max_time", value, "this has no unit", write)]


def test_flash_attention_in_32_bits_is_refused_with_the_precision_to_write():
    wrong = "it computes in 16 bits, and trainer.precision is 32-true"
    expected = Problem("attention", "flash_attention_2", wrong, "write trainer.precision=bf16-mixed")
    assert problems("attention=flash_attention_2", "trainer.precision=32-true") == [expected]
    assert check_command_line(["attention=flash_attention_2", "trainer.precision=bf16-mixed"])
    assert check_command_line(["attention=flash_attention_2"])  # precision=auto: the GPU decides


def test_bleu_has_the_tokenizers_that_need_no_download():
    assert check_command_line(["metrics.bleu.tokenize=zh", "target=translation"])
    write = "did you mean 'zh'? available: auto, 13a, zh, ja-mecab, ko-mecab, intl, char, none"
    wrong = "sacrebleu has no such tokenizer, or would download it"
    assert problems("metrics.bleu.tokenize=zhh") == [Problem("metrics.bleu.tokenize", "zhh", wrong, write)]
    [found] = problems("+metrics.bleu.lowercase=true")
    assert found == Problem("metrics.bleu.lowercase", True, "bleu has no such option", "available: target, tokenize")


def test_metrics_are_chosen_by_name_and_are_those_of_the_package():
    assert check_command_line(["metrics=[ter,wer]", "+metrics.mine._target_=os.path.commonprefix"])
    [found] = problems("metrics=[wer,were]")
    assert found.write == "did you mean 'wer'? available: auto, bleu, cer, chrf, mer, ter, wer, wil"
    [found] = problems("+metrics.mine.speed=3")
    assert found.wrong == "there is no metric 'mine'"
    assert found.write.endswith("; yours is +metrics.NAME._target_=package.module.function")
    assert {file.stem for file in (conf_dir() / "metrics").glob("*.yaml")} == {"auto", *METRICS}


def test_code_of_the_hub_is_run_only_where_the_user_allows_it(tmp_path):
    wrong = "there is no such folder, and code of that name would be downloaded from the Hub and run"
    write = "write a folder, or allow it by +metrics.mine.trust_remote_code=true"
    assert problems("+metrics.mine.evaluate=rouge") == [Problem("metrics.mine.evaluate", "rouge", wrong, write)]
    assert problems("+metrics.mine.evaluate=rouge", "+metrics.mine.trust_remote_code=1")
    assert check_command_line(["+metrics.mine.evaluate=rouge", "+metrics.mine.trust_remote_code=true"])
    assert check_command_line([f"+metrics.mine.evaluate={tmp_path}"])


def test_metrics_without_one_that_has_intervals_and_a_first_one_without_direction_are_refused(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/mine.yaml").write_text("mine:\n  _target_: os.path.commonprefix\n")
    [found] = problems(f"hydra.searchpath=['{tmp_path}']", "metrics=[mine,wer]")
    assert found.option == "metrics.mine.higher_is_better"
    assert found.write == "write +metrics.mine.higher_is_better=true, or false for errors"
    wrong = problems(f"hydra.searchpath=['{tmp_path}']", "metrics=mine")[0].wrong
    assert wrong.startswith("target=transcription needs one of ") and wrong.endswith("other metrics have no intervals")
    own = "+metrics.mine.higher_is_better=false"
    assert check_command_line([f"hydra.searchpath=['{tmp_path}']", "metrics=[mine,wer]", own])


def test_a_comparison_needs_two_runs():
    wrong = "task=compare needs two runs or more"
    assert problems("task=compare", "runs=[a]") == [Problem("runs", ["a"], wrong, "write 'runs=[FOLDER,FOLDER]'")]
    assert check_command_line(["task=compare", "runs=[runs/a,runs/b]"])


@pytest.mark.parametrize("option", ["audio=a.wav", "format=json", "out=texts", "runs=[a,b]", "memory_gb=8", "hub=a/b"])
def test_an_option_that_another_task_alone_reads_is_refused(option):
    name = option.partition("=")[0]
    [found] = problems("task=inspect", option)
    readers = " or ".join(f"task={reader}" for reader in READ_BY[name])
    assert (found.option, found.write) == (name, f"write {readers}, or leave {name} out")
    assert found.wrong == f"only {readers} reads it, and this is task=inspect"


@pytest.mark.parametrize(
    ("option", "value", "write"),
    [
        ("audio", "3", "write it in quotes: 'audio=\"3\"'"),
        ("audio", "true", "write it in quotes: 'audio=\"true\"'"),
        ("audio", "[3,7]", 'write its texts in quotes: \'audio=["3","7"]\''),
        ("audio", "{a: b}", "write audio=VALUE"),
        ("runs", "[3,7]", 'write its texts in quotes: \'runs=["3","7"]\''),
        ("runs", "a", "write a list, e.g. 'runs=[first,second]'"),
    ],
)
def test_names_of_files_are_texts(option, value, write):
    [found] = problems("task=transcribe" if option == "audio" else "task=compare", "checkpoint=a", f"{option}={value}")
    assert (found.option, found.write) == (option, write)
    assert found.wrong.startswith("expected ") and found.wrong.endswith("Sequence[str] | None")


@pytest.mark.parametrize(
    ("override", "option", "wrong"),
    [
        ("encoder._args_=1.5", "encoder._args_", "expected list"),
        ("encoder._partial_=yes", "encoder._partial_", "expected bool"),
        ("encoder._convert_=3", "encoder._convert_", "expected Literal['none', 'partial', 'object', 'all']"),
        ("+trainer.log_every_n_steps={1: x}", "trainer.log_every_n_steps", "expected Optional[int]"),
        ("+encoder={1: x}", "encoder.1", "load_encoder has no option '1'"),
        ("hydra.job=${oc.env:NOPE}", "hydra.job", "KeyError raised while resolving"),
        ("hydra.job=${size}", "hydra.job", "this holds named values"),
        ("hydra.job.chdir=${encoder}", "hydra.job.chdir", "this reference fails: While dereferencing"),
        ("+hydra.sweeper.params={a: {b: null}}", "hydra.sweeper.params", "this cannot be merged"),
        ("optimizer.x=${.}", "optimizer.x", "extraneous input '}'"),
        ("hydra.searchpath=a b", "hydra.searchpath", "this is no list of folders"),
        ("hydra.searchpath=[a b]", "hydra.searchpath", "no such folder"),
        ("~hydra.searchpath", "hydra.searchpath", "this is no list of folders"),
        ("=x", "=x", "no option is named"),
        ("+=x", "+=x", "no option is named"),
        ("~", "~", "no option is named"),
        ("", "''", "no option is named"),
        (" =x", "=x", "no option is named"),
        ("\f", "''", "no option is named"),
        ("hydra.runtime.choices.decoder=r", "hydra.runtime.choices.decoder", "Hydra itself sets this"),
        ("trainer.precision=null", "trainer.precision", "training needs a precision"),
        ("~data", "data", "every run needs this"),
        ("~seed", "seed", "every run needs this"),
        ("~trainer", "trainer", "every run needs this"),
        ("++encoder=null", "encoder", "encoder has no option"),
        ("+callbacks.mine.speed=3", "callbacks.mine", "each entry of this group needs a name, and a _target_ below it"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--cfg", "job", "-m"]])
def test_a_mistake_has_a_place_and_a_remedy(override, option, wrong, flags):
    found = [each for each in problems(*flags, override) if each.option == option]
    assert [each.wrong.startswith(wrong) and len(each.wrong) < 300 and bool(each.write) for each in found] == [True]


def test_a_logger_without_a_name_is_told_how_to_write_it():
    problem, *_ = problems("logger=none", "+logger._target_=lightning.pytorch.loggers.CSVLogger")
    assert problem.write.startswith("write +logger.NAME._target_=package.module.Name")


def test_a_reference_that_hydra_itself_would_read_is_reported_beside_the_partial_that_it_breaks():
    found = problems("tokenizer._partial_=${oc.decode:1}")
    assert [each.option for each in found] == ["tokenizer._partial_"]


def test_formats_of_texts_are_known_and_several_need_a_folder():
    transcribe = ["task=transcribe", "checkpoint=a", "audio=a.wav"]
    available = "available: text, json, srt, vtt"
    for given, unknown in (("vt", "vt"), ("[srt,xml]", "xml"), ("[]", "[]")):
        [found] = problems(*transcribe, f"format={given}", "out=texts")
        assert (found.option, found.wrong) == ("format", f"format has no option {unknown!r}".replace("'[]'", "[]"))
        assert available in found.write
    [found] = problems(*transcribe, "format=[srt,json]")
    assert (found.option, found.write) == ("out", "write out=FOLDER")
    check_command_line([*transcribe, "format=[srt,json]", "out=texts"])


def test_an_encoder_beside_a_whole_checkpoint_is_refused_and_one_that_it_may_have_is_not():
    [found] = problems("checkpoint=X", "encoder=hubert", "decoder=whisper")
    write = "write checkpoint=X without encoder=, or encoder=hubert encoder.checkpoint=FOLDER without checkpoint="
    assert found == Problem("encoder", "hubert", "a whole checkpoint has its own encoder and decoder", write)
    assert check_command_line(["checkpoint=X", "encoder=whisper", "decoder=whisper"])
    assert check_command_line(["task=evaluate", "checkpoint=X", "encoder=hubert"])


@pytest.mark.parametrize(
    "override",
    ["size=base", "tokenizer=char", "tokenizer.vocab_size=90", "encoder.size=large", "decoder.tiny={}",
     "encoder.attention=eager", "decoder.pretrained=false", "encoder.model_type=hubert"],
)  # fmt: skip
def test_every_option_that_a_whole_checkpoint_decides_is_refused_beside_it(override):
    [found] = problems("checkpoint=X", override)
    option = override.partition("=")[0]
    assert found.option == option and found.wrong == f"a whole checkpoint has its own {option}"
    assert found.write == f"write checkpoint=X without {option}="
    assert check_command_line(["task=evaluate", "checkpoint=X", override])
    assert check_command_line(["checkpoint=X", "encoder.options.dropout=0.1", "attention=eager"])


def test_options_in_braces_are_refused_beside_a_whole_checkpoint_as_alone():
    found = problems("checkpoint=X", "encoder={size: base, attention: eager}", "tokenizer={vocab_size: 90}")
    assert [each.option for each in found] == ["encoder.size", "encoder.attention", "tokenizer.vocab_size"]
    assert check_command_line(["checkpoint=X", "encoder={options: {dropout: 0.1}}"])

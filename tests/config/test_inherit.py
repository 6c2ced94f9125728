"""Options that come from the run whose model is used."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sedtrain.config.inherit import INHERITED, directives_of_package, inherit_run, renamed
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError


@pytest.fixture
def inherited(tmp_path):
    """What evaluation takes from a run's config.yaml, of data, target and normalizers."""

    def evaluate(stored, *overrides):
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
        own = {"data": {"path": "own"}, "target": "transcription", "normalizer": "lowercase", "run_dir": "here"}
        config = OmegaConf.create({**own, "task": "evaluate", "checkpoint": str(tmp_path)})
        inherit_run(config, list(overrides))
        return config

    return evaluate


def test_data_and_normalizer_are_those_of_the_run_unless_they_are_chosen(inherited):
    stored = {"data": {"path": "of_run", "folder": "old"}, "normalizer": "whisper_english"}
    config = inherited(stored)
    assert (config.data.path, config.data.folder, config.normalizer) == ("of_run", "here", "whisper_english")
    config = inherited(stored, "normalizer=lowercase", "data.path=other")
    assert (config.data.path, config.normalizer) == ("other", "lowercase")


def test_a_run_from_before_the_option_was_renamed_keeps_its_normalizer(inherited):
    assert inherited({"normaliser": "whisper_basic"}).normalizer == "whisper_basic"


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("normaliser=none", "normalizer=none"),
        ("++training_normaliser=none", "++training_normalizer=none"),
        ("~normaliser", "~normalizer"),
        ("audio=normaliser=1", "audio=normaliser=1"),
        ("seed=3", "seed=3"),
    ],
)
def test_only_the_name_of_an_option_is_renamed(old, now):
    assert renamed(old) == now


# --- a run that somebody else has written

SCORED = {"_target_": "sedtrain.decoding.options.DecodingOptions"}
UNNAMED = ", and what only a folder names is never imported or called"


@pytest.fixture
def refused(tmp_path):
    """What the errors say of a run's config.yaml, beside the defaults of the package."""

    def evaluate(stored, *overrides):
        with pytest.raises(UserError) as caught:
            evaluated(tmp_path, stored, *overrides)
        assert {(each.option, each.value) for each in caught.value.errors} == {("checkpoint", str(tmp_path))}
        return [(each.wrong, each.write) for each in caught.value.errors]

    return evaluate


def evaluated(folder, stored, *overrides):
    text = stored if isinstance(stored, str) else OmegaConf.to_yaml(OmegaConf.create(stored))
    (folder / "config.yaml").write_text(text)
    register()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        config = compose("train", ["task=evaluate", f"checkpoint={folder}", *overrides])
    inherit_run(config, list(overrides))
    return config


@pytest.mark.parametrize(
    ("group", "values", "name", "value"),
    [
        ("data", {"_target_": "pandas.read_pickle", "path": "x"}, "data._target_", "pandas.read_pickle"),
        ("decoding", {"_target_": "pathlib.Path.touch"}, "decoding._target_", "pathlib.Path.touch"),
        ("adapter", {"_target_": "beside.Evil", "_partial_": True}, "adapter._target_", "beside.Evil"),
        ("encoder", {"_target_": "sedtrain.models.decoder.load_decoder"}, "encoder._target_",
         "sedtrain.models.decoder.load_decoder"),
        ("target", {"_target_": "os.getcwd"}, "target._target_", "os.getcwd"),
        ("decoding", {**SCORED, "_args_": [5]}, "decoding._args_", [5]),
        ("decoding", {**SCORED, "_partial_": True}, "decoding._partial_", True),
        ("decoding", {**SCORED, "num_beams": {"_target_": "os.getpid"}}, "decoding.num_beams._target_", "os.getpid"),
        ("data", {"_target_": "sedtrain.data.datamodule.SpeechTextDataModule", "mix": {"a": [{"_target_": "os.x"}]}},
         "data.mix.a[0]._target_", "os.x"),
        ("normalizer", "${oc.env:HOME}", "normalizer", "${oc.env:HOME}"),
        ("metrics", {"wer": {}, "mine": {"_target_": "os.system"}}, "metrics.mine._target_", "os.system"),
        ("metrics", {"wer": {}, "mine": {"evaluate": "folder"}}, "metrics.mine.evaluate", "folder"),
        ("metrics", {"wer": {"trust_remote_code": True}}, "metrics.wer.trust_remote_code", True),
    ],
)  # fmt: skip
def test_what_a_run_s_folder_alone_names_is_refused_and_the_option_to_repeat_is_told(
    refused, group, values, name, value
):
    [(wrong, write)] = refused({group: values})
    assert wrong == f"its config.yaml has {name}={value}{UNNAMED}"
    assert (
        write
        == f"write {group}=OPTION or experiment=NAME, with --config-dir FOLDER if it is your own, as for the training"
    )


def test_every_class_that_a_folder_alone_names_is_reported(refused):
    assert len(refused({"adapter": {"_target_": "a.B"}, "decoding": {"_target_": "c.D", "num_beams": "${seed}"}})) == 3


def test_a_class_of_the_package_s_options_or_of_the_command_line_is_taken(tmp_path):
    pool = {"_target_": "mine.Pool", "_partial_": True}
    conv = {"_target_": "sedtrain.models.adapter.ConvAdapter", "_partial_": True, "stride": 1}
    assert evaluated(tmp_path, {"adapter": conv, "decoding": {**SCORED, "num_beams": 3}}).decoding.num_beams == 3
    assert evaluated(tmp_path, {"adapter": pool}, "adapter=conv").adapter["_target_"].endswith("ConvAdapter")
    config = evaluated(tmp_path, {"adapter": pool}, "adapter._target_=mine.Pool")
    assert config.adapter["_target_"] == "mine.Pool"


def test_a_class_that_an_experiment_of_the_package_names_is_taken(tmp_path, monkeypatch):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    text = "# @package _global_\nseed: 1\nadapter: {_target_: sedtrain.models.adapter.Other}\n"
    (tmp_path / "conf/experiment/one.yaml").write_text(text)
    (tmp_path / "conf/experiment/none.yaml").write_text("# @package _global_\n")
    pool = {"_target_": "sedtrain.models.adapter.Other"}
    with pytest.raises(UserError):
        evaluated(tmp_path, {"adapter": pool})
    monkeypatch.setattr("sedtrain.config.inherit.conf_dir", lambda: tmp_path / "conf")
    assert [*directives_of_package("adapter")] == [("adapter._target_", pool["_target_"])]
    assert evaluated(tmp_path, {"adapter": pool}).adapter["_target_"] == pool["_target_"]


def test_values_of_a_run_fit_their_options(tmp_path):
    with pytest.raises(UserError) as caught:
        evaluated(tmp_path, {"decoding": {**SCORED, "num_beams": "many", "beams": 1}, "target": "song"})
    assert [each.option for each in caught.value.errors] == ["target", "decoding.num_beams", "decoding.beams"]
    with pytest.raises(UserError) as caught:
        evaluated(tmp_path, {"metrics": {"wer": 3, "evil": [1]}})
    assert [each.option for each in caught.value.errors] == ["metrics.wer", "metrics.evil"]


def test_metrics_are_those_of_the_run_and_a_user_s_are_named_again(tmp_path):
    mine = {"wer": {"target": None}, "mine": {"_target_": "os.path.commonprefix", "higher_is_better": True}}
    config = evaluated(tmp_path, {"metrics": mine}, "+metrics.mine._target_=os.path.commonprefix")
    assert list(config.metrics) == ["wer", "mine"] and config.metrics.mine.higher_is_better
    assert list(evaluated(tmp_path, {"metrics": mine}, "metrics=[cer,ter]").metrics) == ["cer", "ter"]
    before = {"metrics": {"bleu": {"tokenize": "zh"}}}  # of a run from before metrics could be chosen
    assert list(evaluated(tmp_path, before).metrics) == ["wer", "cer", "bleu", "chrf"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a: !!python/object/apply:os.getcwd []", "config.yaml is no YAML of plain values: could not determine a constr"),
        ("a: &a [1]\nb: *a", "config.yaml is no YAML of plain values: it has an alias"),
        ("a: " + "[" * 5000, "config.yaml is no YAML of plain values: maximum recursion depth exceeded"),
        ("a: " + "1" * 600_000, "config.yaml is no YAML of plain values: it is larger than 500,000 bytes"),
        ("- a", "its config.yaml holds no options"),
        ("data: text", "its config.yaml has data='text'"),
        ("decoding: {2020-01-01: 3, _target_: sedtrain.decoding.options.DecodingOptions}", "its config.yaml: "),
    ],
)  # fmt: skip
def test_a_configuration_of_more_than_plain_values_is_refused(refused, text, wrong):
    assert refused(text)[0][0].startswith(wrong)


def test_every_option_of_the_package_is_one_that_a_run_may_name():
    for group in (*INHERITED[:3], "data", "decoding"):
        found = [value for name, value in directives_of_package(group) if name == f"{group}._target_"]
        assert found
        assert all(value.startswith("sedtrain.") for value in found)

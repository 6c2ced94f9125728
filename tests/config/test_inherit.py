"""Options that come from the run whose model is used."""

import pytest
from omegaconf import OmegaConf

from sedtrain.config.composition import inherit_run, renamed


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

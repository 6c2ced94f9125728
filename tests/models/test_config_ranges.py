"""Values of families' configurations: impossible ones are refused with their range, others build a model or say why not."""

import os

import pytest
import torch
import yaml
from families import DECODERS, ENCODERS, TOKENIZER, option_file, tiny_decoder, tiny_encoder
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from sedtrain.batch import Utterance
from sedtrain.config.schema import conf_dir
from sedtrain.data.collate import Collator
from sedtrain.errors import UserError
from sedtrain.models.config_ranges import misfit, range_of, refuse_impossible
from sedtrain.models.encoder import frame_mask, load_encoder
from sedtrain.models.family_settings import default_config, feature_extractor_of
from sedtrain.models.positions import max_tokens

EXAMPLES = int(os.environ.get("SEDTRAIN_EXAMPLES", 0))
COUNT, FRACTION = "a whole number of 1 or more", "a fraction from 0 to 1"
VALUES = [0, -1, 1, 3, 7, 64, 10**10, 0.5, 1.5, -0.1, float("inf"), float("nan"), None, True, "x", [], [1], [0], {}]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_attention_heads", 0, COUNT),
        ("num_attention_heads", -1, COUNT),
        ("num_hidden_layers", -1, "a whole number from 1 to 1,000"),
        ("hidden_size", 0, COUNT),
        ("hidden_size", 1.5, COUNT),
        ("intermediate_size", True, COUNT),
        ("conv_dim", [64, 0], f"a list, each {COUNT}"),
        ("conv_kernel", 3, "a list, each a whole number of 1 or more"),
        ("mask_time_prob", 2, FRACTION),
        ("layerdrop", 1, "a fraction from 0 to below 1"),
        ("hidden_dropout", float("nan"), "a fraction from 0 to below 1"),
        ("layerdrop", None, "a fraction from 0 to below 1"),
        ("layer_norm_eps", float("inf"), "a number of 0 or more"),
        ("do_stable_layer_norm", 1, "bool"),
        ("hidden_act", 3, "str"),
    ],
)
@pytest.mark.parametrize("option", ["options", "tiny"])
def test_an_impossible_value_is_refused_with_its_range(option, name, value, words):
    with pytest.raises(UserError) as caught:
        refuse_impossible("encoder", {option: {name: value}}, AutoConfig.for_model("wav2vec2"))
    [error] = caught.value.errors
    assert error.option == f"encoder.{option}.{name}"
    assert error.wrong == f"expected {words}"
    assert error.write == f"write encoder.{option}.{name}=VALUE, {words}"


def test_heads_that_do_not_divide_the_width_are_refused_with_a_number_that_does():
    with pytest.raises(UserError) as caught:
        load_encoder("wav2vec2-conformer", {"hidden_size": 144}, options={"num_attention_heads": 7})
    [error] = caught.value.errors
    assert error.option == "encoder.options.num_attention_heads"
    assert (error.wrong, error.write) == ("it does not divide the width, 144", f"write {error.option}=6")


def tiny_of(file):
    """The values of an option's tiny member, inherited ones included."""
    option = yaml.safe_load(file.read_text(encoding="utf-8"))
    names = [each for each in option.get("defaults", ()) if isinstance(each, str) and each != "_self_"]
    roots = {True: conf_dir(), False: file.parent}
    bases = [roots[each.startswith("/")] / f"{each.lstrip('/').partition('@')[0]}.yaml" for each in names]
    return {name: value for base in bases for name, value in tiny_of(base).items()} | option.get("tiny", {})


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_every_value_of_the_tiny_members_is_possible(part):
    files = sorted((conf_dir() / part).glob("*.yaml"))
    assert len(files) > 15
    for file in files:
        assert len(tiny_of(file)) > 3
        model_type = yaml.safe_load(file.read_text(encoding="utf-8"))["model_type"]
        refuse_impossible(part, {"tiny": tiny_of(file)}, default_config(part, model_type))


def test_defaults_of_every_family_lie_in_their_own_ranges():
    for file in [*(conf_dir() / "encoder").glob("*.yaml"), *(conf_dir() / "decoder").glob("*.yaml")]:
        defaults = default_config(file.parent.name, yaml.safe_load(file.read_text(encoding="utf-8"))["model_type"])
        own = {name: value for name, value in vars(defaults).items() if range_of(name, value)}
        assert own
        refuse_impossible("encoder", {"options": own}, defaults)


def values_near(default):
    """Values of the default's kind, most of which some model has."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default - 1, default + 1, default // 2, 2 * default, 3 * default]
    if isinstance(default, list) and all(isinstance(each, int) for each in default):
        return [default[:-1], default + default[-1:], [2 * each for each in default], default[::-1]]
    return []


@st.composite
def options_of(draw, part, name):
    """One to three options of a family; most of their values lie in the range of each."""
    option = option_file(part, name)
    defaults = default_config(part, option["model_type"])
    names = [*option["tiny"], *(key for key in defaults.to_dict() if not key.startswith("_"))]
    options = {}
    for key in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        near = values_near(option["tiny"].get(key, getattr(defaults, key, None)))
        fitting = [value for value in VALUES + 2 * near if not misfit(key, value, getattr(defaults, key, None))]
        options[key] = draw(st.sampled_from(fitting if fitting and draw(st.integers(0, 9)) else VALUES))
    return options


def train_step(part, model):
    """A forward and a backward in training mode; of a decoder, on as many tokens as it has positions for."""
    model.train()
    if part == "encoder":
        batch = noise(feature_extractor_of(model))
        frames = model(batch.inputs, attention_mask=batch.attention_mask, return_dict=True).last_hidden_state
        assert len(frame_mask(model, frames.shape[1], batch.attention_mask)) == 2
        return frames.sum().backward()
    tokens = torch.tensor([[1, 4, 5], [1, 6, 2]])[:, : max_tokens(model)]
    states = torch.ones(2, 5, model.config.hidden_size)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    logits = model(tokens, encoder_hidden_states=states, encoder_attention_mask=mask, return_dict=True).logits
    return logits.sum().backward()


def noise(feature_extractor):
    generator = torch.Generator().manual_seed(0)
    audio = [0.1 * torch.randn(length, generator=generator) for length in (16000, 9000)]
    utterances = [Utterance(str(each), each, 16000, "one", None, None, len(each) / 16000) for each in audio]
    return Collator(feature_extractor, TOKENIZER, 1)(utterances)


@pytest.mark.timeout(300 + EXAMPLES)
# So many bands can be trained all the same.
@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@settings(max_examples=EXAMPLES or 25, phases=[Phase.generate])
@given(st.data())
def test_options_build_a_model_that_trains_or_are_refused_with_place_and_remedy(data):
    part = data.draw(st.sampled_from(["encoder", "decoder"]))
    name = data.draw(st.sampled_from(ENCODERS if part == "encoder" else DECODERS))
    options = data.draw(options_of(part, name))
    try:
        model = (tiny_encoder if part == "encoder" else tiny_decoder)(name, options=options)
    except UserError as error:
        assert all(each.option and each.wrong and each.write for each in error.errors)
    else:
        train_step(part, model)


@pytest.mark.parametrize(
    ("part", "name", "options"),
    [
        ("encoder", "parakeet", {"subsampling_factor": 64}),
        ("encoder", "seamless_m4t", {"feature_projection_input_dim": 41}),
        ("encoder", "moonshine", {"encoder_num_key_value_heads": 3}),
        ("encoder", "speech_to_text", {"conv_channels": 65}),
        ("decoder", "bert", {"chunk_size_feed_forward": 2}),
    ],
)
def test_options_whose_model_would_fail_in_its_first_step_are_refused(part, name, options):
    with pytest.raises(UserError) as caught:
        (tiny_encoder if part == "encoder" else tiny_decoder)(name, options=options)
    [error] = caught.value.errors
    assert (error.option, error.value, error.write) == (
        f"{part}.options",
        options,
        f"write {part}.options.NAME=VALUE that fits the others",
    )
    assert error.wrong.startswith("these values build a model that fails in its first step: ")


def test_values_that_leave_a_layer_without_weights_are_refused():
    with pytest.raises(UserError) as caught:
        tiny_encoder("parakeet", options={"num_mel_bins": 1})
    [error] = caught.value.errors
    assert error.wrong == "these values build a Linear whose weight has the shape (144, 0)"
    assert error.write == "write encoder.options.NAME=VALUE that fits the others"


def test_values_that_build_layers_without_end_are_refused(monkeypatch):
    monkeypatch.setattr("sedtrain.models.config_ranges.MOST_TENSORS", 500)
    with pytest.raises(UserError) as caught:
        tiny_encoder("data2vec", options={"num_conv_pos_embeddings": 10**10})
    [error] = caught.value.errors
    assert error.wrong == "these values build a model of more than 500 tensors"
    assert error.write == "write encoder.options.NAME=VALUE of a smaller model"


def test_values_of_the_tiny_member_are_told_where_no_option_is_chosen():
    with pytest.raises(UserError) as caught:
        load_encoder("speech_to_text", {**option_file("encoder", "speech_to_text")["tiny"], "conv_channels": 65})
    assert caught.value.option == "encoder.tiny"
    assert caught.value.write == "write encoder.tiny.NAME=VALUE that fits the others"


def test_weights_beyond_the_memory_are_refused_before_they_are_allocated(monkeypatch):
    monkeypatch.setattr("sedtrain.models.config_ranges.memory", lambda: 10**9)
    with pytest.raises(UserError) as caught:
        tiny_encoder("hubert", options={"hidden_size": 1_000_000})
    [error] = caught.value.errors
    assert error.option == "encoder.options"
    assert error.wrong == "weights of 16,001 GB or more, and this machine has 1 GB"
    assert error.write == "write encoder.options.NAME=VALUE of a smaller model"


def test_a_trial_changes_neither_weights_nor_random_numbers(monkeypatch):
    tried = tiny_encoder("hubert", seed=3, options={"hidden_size": 48})
    number = torch.rand(1)
    again = tiny_encoder("hubert", seed=3, options={"hidden_size": 48})  # has passed
    assert torch.equal(number, torch.rand(1))
    assert all(map(torch.equal, tried.parameters(), again.parameters()))
    assert load_encoder(**option_file("encoder", "hubert")).training


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_defaults_of_every_family_fit(part):
    families = {
        yaml.safe_load(path.read_text(encoding="utf-8")).get("model_type")
        for path in (conf_dir() / part).glob("*.yaml")
    }
    for family in filter(None, families):
        config = AutoConfig.for_model(family)
        refuse_impossible(part, {"options": config.to_dict()}, config)


def test_a_decoder_needs_no_encoder_layers_and_a_list_of_several_kinds_is_left_to_the_family():
    refuse_impossible("decoder", {"options": {"encoder_layers": 0}}, AutoConfig.for_model("bart"))
    refuse_impossible("decoder", {"options": {"attention_types": [[["global"], 4]]}}, AutoConfig.for_model("gpt_neo"))

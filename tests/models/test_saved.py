"""Folders that are no saved model, or a damaged one, are refused in words from Python and on the command line."""

import copy
import json
import shutil

import pytest
import torch
from families import TOKENIZER, tiny_decoder, tiny_encoder
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    SpeechEncoderDecoderModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from sedtrain import load
from sedtrain.build import create
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.models.adapter import ConvAdapter
from sedtrain.models.saved import join, to_finetune
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ANY = "write checkpoint=FOLDER saved by save_pretrained, or a Hub id if the Hub can be reached"
TOGETHER = "write checkpoint=FOLDER whose config.json and weights belong together"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of a saved model with an adapter."""
    folder = tmp_path_factory.mktemp("good")
    join(tiny_encoder("wav2vec2"), tiny_decoder("bert"), ConvAdapter, TOKENIZER).save(folder, {})
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(good, tmp_path / "model")


@pytest.mark.parametrize("pairs", [[], [("en", "transcribe")]])
def test_stock_transformers_ends_texts_at_the_last_position_whatever_the_prompt(tmp_path, pairs):
    decoder = tiny_decoder("bert", options={"max_position_embeddings": 12})
    saved = join(tiny_encoder("wav2vec2"), decoder, lambda *widths: None, copy.deepcopy(TOKENIZER))
    if pairs:
        saved.learn_tags(pairs)
    saved.save(tmp_path, {"max_new_tokens": 200})
    stock = SpeechEncoderDecoderModel.from_pretrained(tmp_path)
    prompt = [saved.model.config.decoder_start_token_id, *(saved.tags.of("en", "transcribe") if pairs else [])]
    stock.generation_config.min_new_tokens = stock.generation_config.max_new_tokens
    written = stock.generate(torch.randn(1, 4000), decoder_input_ids=torch.tensor([prompt]))
    assert written.shape == (1, 12 + 1)


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, Exception)
    return caught.value


def problem(folder):
    """What is wrong and what to write for it, where `load` names the folder."""
    error = refusal(folder)
    assert (error.option, error.value) == ("checkpoint", str(folder))
    return error.wrong, error.write


def test_the_folder_loads(good):
    assert load(good).model.adapter.settings == {"stride": 2, "num_layers": 2}


def test_a_joined_model_is_not_trained_further_as_a_whole_one(good):
    with pytest.raises(UserError) as caught:
        to_finetune(str(good), {}, None)
    assert str(caught.value) == (
        f"1 problem:\n\n  checkpoint = '{good}'\n    this is a joined model of encoder and decoder\n"
        "    write resume=RUN with the options of that run to train its model further"
    )


# --- models of another kind

OTHERS = {
    "wav2vec2": Wav2Vec2ForCTC(Wav2Vec2Config(**SMALL, vocab_size=30)),
    "bert": BertModel(BertConfig(**SMALL)),
    "llama": LlamaForCausalLM(LlamaConfig(**SMALL)),
    "encoder-decoder": EncoderDecoderModel(
        encoder=BertModel(BertConfig(**SMALL)),
        decoder=BertLMHeadModel(BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_another_kind_is_named_and_what_can_be_made_of_it(kind, tmp_path):
    OTHERS[kind].save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    wrong, write = problem(tmp_path)
    assert wrong == f"this is a {kind} model, not a speech encoder-decoder"
    part = {"wav2vec2": "encoder", "bert": "decoder", "llama": "decoder"}.get(kind)
    if part is None:
        assert write == "write checkpoint=FOLDER of a run, or of a joined model that save_pretrained wrote"
        return
    overrides = f"{part}.model_type={kind} {part}.checkpoint={tmp_path}"
    arguments = f"'{tmp_path}', DECODER" if part == "encoder" else f"ENCODER, '{tmp_path}'"
    assert write == f"write {overrides}, without task and checkpoint, to train a model with it"
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        made = create(compose("train", overrides.split()), part)
    made = made if part == "encoder" else made(TOKENIZER)
    assert made.config._name_or_path == str(tmp_path)
    with pytest.raises(UserError, match="not a speech encoder-decoder") as caught:
        SpeechEncoderDecoder.from_pretrained(tmp_path)
    joined = f"SpeechEncoderDecoder.from_encoder_decoder_pretrained({arguments})"
    assert caught.value.python == f"write {joined}, and train it"


# --- folders without a model


def test_an_empty_folder_a_run_without_a_model_and_an_adapter_alone_are_told_apart(tmp_path):
    assert problem(tmp_path) == ("this folder is no model, it holds no config.json", ANY)
    (tmp_path / "adapter_config.json").write_text("{}")
    merge = "write checkpoint=FOLDER of the merged model: model.merge_and_unload().save_pretrained(FOLDER)"
    assert problem(tmp_path) == ("this is an adapter of peft without its model", merge)
    (tmp_path / "config.yaml").write_text("seed: 1")
    resume = (
        f"write run_dir={tmp_path} resume=auto and the options of the run: it saves a model when it ends or is stopped"
    )
    assert problem(tmp_path) == ("this run has saved no model yet", resume)
    (tmp_path / "model").mkdir()
    assert (refusal(tmp_path).wrong, refusal(tmp_path).write) == ("this run has saved no model yet", resume)


def test_a_configuration_alone_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert problem(folder)[0].startswith("the folder gave: Error no file named model.safetensors")


# --- damaged files


@pytest.mark.parametrize(
    "text",
    ["{hello", "\0\0", "[1, 2]", '"x"', "{}", '{"model_type": null}', '{"model_type": [1]}', '{"model_type": "later"}'],
)
def test_a_config_json_that_describes_no_model_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert problem(folder)[0].startswith(("config.json is no JSON", "the folder gave: "))


FILES = [
    ("generation_config.json", "{"), ("generation_config.json", "[]"), ("generation_config.json", '{"max_new_tokens": "x"}'),
    ("preprocessor_config.json", "{"), ("tokenizer.json", "{"), ("tokenizer.json", "[]"),
    ("tokenizer_config.json", "[]"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text"), FILES)
def test_damaged_files_beside_it_are_refused(folder, file, text):
    (folder / file).write_text(text)
    assert problem(folder)[0].startswith((f"{file} is no JSON", "the folder gave: "))


def changed(folder, change):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (
            lambda config: config.pop("adapter"),
            "the folder gave: Unrecognized model type for subconfig: wav2vec2 with the",
        ),
        (lambda config: config.pop("encoder"), "the folder gave: no 'encoder' in its files"),
        (
            lambda config: config.update(adapter="x"),
            "the folder gave: Unrecognized model type for subconfig: wav2vec2 with the conv adapter",
        ),
        (
            lambda config: config["decoder"].update(num_attention_heads=0),
            "the folder gave: ZeroDivisionError integer modulo",
        ),
        (
            lambda config: config["decoder"].update(hidden_size="x"),
            "the folder gave: StrictDataclassFieldValidationError",
        ),
        (lambda config: config.update(ctc_vocab_size="x"), "the folder gave: TypeError"),
        (lambda config: config.update(tags="x"), "its config.json has tags='x', which is no object"),
        (
            lambda config: config.update(training_normalizer=1),
            "its config.json has training_normalizer=1, which is no object",
        ),
    ],
)
def test_values_of_config_json_that_fit_no_model_are_refused(folder, change, wrong):
    assert problem(changed(folder, change))[0].startswith(wrong)


def test_settings_of_an_adapter_that_this_version_does_not_have_are_named(folder):
    error = refusal(changed(folder, lambda config: config["adapter"]["settings"].update(later=1)))
    assert (error.option, error.value) == ("adapter", "conv")
    assert error.wrong.startswith("it does not fit the settings {'num_layers': 2, 'stride': 2, 'later': 1}: ")
    assert (
        error.write
        == "write a checkpoint that this version of sedtrain saved, or install the version that saved this one"
    )


def test_a_model_that_does_not_say_how_texts_begin_is_refused(tmp_path):
    SpeechEncoderDecoderModel(encoder=tiny_encoder("wav2vec2"), decoder=tiny_decoder("bert")).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    changed(
        tmp_path,
        lambda config: [config["decoder"].pop(each, None) for each in ("bos_token_id", "decoder_start_token_id")],
    )
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert problem(tmp_path) == (
        "its config.json names no decoder_start_token_id",
        "write checkpoint=FOLDER of a run, or of a model after model.set_special_tokens(start, end, pad)",
    )


# --- weights


def rewritten(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(prefix):
    return lambda weights: {name: weight for name, weight in weights.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (without("adapter.convolutions.0.bias"), "its weights are incomplete: it lacks 1 of 159, such as adapter."),
        (without("adapter."), "its weights are incomplete: it lacks 8 of 159, such as adapter.convolutions.0.bias"),
        (without(("encoder.", "decoder.")), "its weights belong to another model: it lacks 151 of 159, such as decoder."),
        (lambda weights: {**weights, "decoder.bert.embeddings.word_embeddings.weight": torch.zeros(3, 144)}, "decoder.bert."),
    ],
)  # fmt: skip
def test_weights_that_lack_something_or_have_another_shape_are_refused(folder, change, wrong):
    told, write = problem(rewritten(folder, change))
    assert told.startswith(wrong)
    assert write.startswith(TOGETHER)


def test_weights_that_the_model_does_not_use_are_told(folder, caplog):
    load(rewritten(folder, lambda weights: {**weights, "other.weight": torch.zeros(2)}))
    told = [each.getMessage() for each in caplog.records if each.name == "sedtrain.models.loading"]
    assert told == [f"checkpoint={folder} holds 1 weights that its model does not use: other.weight"]

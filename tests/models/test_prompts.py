"""The prompts of whole speech models: those that `transformers` and the tokenizers of the families write."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from corpora import refused
from families import option_file
from transformers import CohereAsrProcessor

from sedtrain.data.collate import Collator
from sedtrain.models.adapter import AdaptedSpeechEncoderDecoderConfig
from sedtrain.models.other_kinds import NOT_WHOLE, refuse_other_kind
from sedtrain.models.prompts import BEGIN, END, whole_prompt
from sedtrain.models.whole import WholeSpeechModel, is_whole
from sedtrain.text.tags import tag
from sedtrain.text.tokenizers import train_tokenizer

FIRST = "▁"


def test_every_speech_model_of_transformers_is_whole_or_refused_with_the_reason():
    for config in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        if (name := config.model_type) in ("speech-encoder-decoder", AdaptedSpeechEncoderDecoderConfig.model_type):
            continue
        made = config(**({"vocab_size": 30} if name == "speecht5" else {}))
        assert is_whole(made) is (name not in NOT_WHOLE)
        if name in NOT_WHOLE:
            message = refused(refuse_other_kind, "FOLDER", made)
            assert (
                f"this is a {name} model: {NOT_WHOLE[name]}\n    write checkpoint=FOLDER of a whole model of canary"
                in message
            )


@pytest.fixture(scope="module")
def tokenizer():
    """One with the tokens of Canary's and Cohere's prompts, for three languages."""
    made = train_tokenizer(["one two"], "char", 100)
    names = [*BEGIN, "en", "de", "fr", *END, "nopnc"]
    made.add_special_tokens({"extra_special_tokens": [tag(name) for name in names]})
    return made


def started_by(tokenizer, token):
    return SimpleNamespace(decoder_start_token_id=tokenizer.convert_tokens_to_ids(token))


def test_the_prompt_of_cohere_is_that_of_its_processor(tokenizer):
    generation = started_by(tokenizer, FIRST)
    prompt = whole_prompt("cohere_asr", tokenizer, generation)
    extractor = transformers.CohereAsrFeatureExtractor()
    processor = SimpleNamespace(tokenizer=tokenizer, feature_extractor=extractor)
    expected = CohereAsrProcessor.get_decoder_prompt_ids(processor, "de")
    assert [generation.decoder_start_token_id, *prompt.of("de", "transcribe")] == expected
    assert prompt.number == len(expected) - 1 and prompt.languages == ["de", "en", "fr"]
    message = refused(prompt.of, "de", "translate")
    assert message.endswith("the checkpoint does not translate\n    write target=transcription")


def test_the_prompt_of_canary_names_the_languages_of_speech_and_text(tokenizer):
    prompt = whole_prompt("canary", tokenizer, started_by(tokenizer, "<|startofcontext|>"))
    written = "<|startoftranscript|><|emo:undefined|>{}<|pnc|><|noitn|><|notimestamp|><|nodiarize|>"
    assert tokenizer.decode(prompt.of("de", "transcribe")) == written.format("<|de|><|de|>")
    assert tokenizer.decode(prompt.of("de", "translate")) == written.format("<|en|><|de|>")
    message = refused(prompt.of, "en", "translate")
    assert "the checkpoint has no language 'en' to translate into\n    write data.language=ONE_OF de, fr" in message
    assert "no language 'it'\n" in refused(prompt.of, "it", "transcribe")
    assert "none is chosen for the text" in refused(prompt.of, None, "transcribe")


def test_a_text_behind_a_prompt_has_no_other_token_in_front(tokenizer):
    prompt = whole_prompt("canary", tokenizer, started_by(tokenizer, "<|startofcontext|>"))
    collator = Collator(transformers.ParakeetFeatureExtractor(), tokenizer, 1, tags=prompt)
    assert tokenizer.decode(collator.target("one")) == "one</s>"


@pytest.mark.parametrize("name", ["whisper", "moonshine", "speech_to_text", "canary"])
def test_a_checkpoint_without_languages_has_no_prompt_of_them(name):
    plain = train_tokenizer(["one two"], "char", 100)
    prompt = whole_prompt(name, plain, SimpleNamespace(decoder_start_token_id=1))
    assert prompt is None or (name == "whisper" and not prompt.number)


def test_multilingual_speech_to_text_begins_with_the_language_that_its_tokenizer_forces():
    codes = SimpleNamespace(lang_code_to_id={"de": 7, "fr": 8})
    prompt = whole_prompt("speech_to_text", codes, SimpleNamespace())
    assert prompt.of("fr", "translate") == prompt.of("fr", "transcribe") == [8]


@pytest.mark.parametrize("name", ["seamless_m4t", "seamless_m4t_v2"])
def test_seamless_writes_what_transformers_writes_in_a_target_language(name, tmp_path):
    encoder, decoder = (option_file(group, name) for group in ("encoder", "decoder"))
    special = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = transformers.CONFIG_MAPPING[name](**{**encoder["tiny"], **decoder["tiny"], **special})
    torch.manual_seed(0)
    stock = transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING[type(config)](config).eval()
    stock.generation_config._from_model_config = False  # else it is made anew from config.json
    stock.generation_config.text_decoder_lang_to_code_id = {"deu": 20, "fra": 21}
    stock.save_pretrained(tmp_path)
    model = WholeSpeechModel.from_pretrained(tmp_path)
    prompt = whole_prompt(name, None, model.generation_config)
    features = torch.randn(1, 64, config.feature_projection_input_dim)
    given = torch.tensor([[3, *prompt.of("fra", "translate")]])
    written = model.generate(features, decoder_input_ids=given, max_new_tokens=6)
    assert torch.equal(written, stock.generate(input_features=features, tgt_lang="fra", max_new_tokens=6))

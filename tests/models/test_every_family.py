"""Every family of transformers that could be a part of a joined model: it works, or it is refused when it is built."""

import inspect
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from families import OPTIONS, option_file
from pairs import END, LABELS, PAD, START, part, two_utterances
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    ASTConfig,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LasrEncoderConfig,
    Qwen2AudioEncoderConfig,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from sedtrain.errors import UserError
from sedtrain.models.decoder import BROKEN, as_decoder, load_decoder, settle_config
from sedtrain.models.encoder import encoder_from_config, load_encoder
from sedtrain.models.encoder_families import ENCODERS, ENCODERS_OF_WHOLE
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

MODELS = Path(transformers.__file__).parent / "models"
SMALL = {
    "hidden_size": 16, "d_model": 16, "n_embd": 16, "embedding_size": 16, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 2, "n_head": 2, "decoder_attention_heads": 2, "encoder_attention_heads": 2,
    "intermediate_size": 32, "ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 30, "max_position_embeddings": 16,
    "pad_token_id": PAD, "dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def source(model_type):
    module = model_type_to_module_name(model_type)
    return "".join(file.read_text(encoding="utf-8") for file in (MODELS / module).glob("modeling_*.py"))


def can_attend():
    """Model types of causal decoders without an option file that attend to an encoder; their sources mention one."""
    known = {option_file("decoder", name)["model_type"] for name in OPTIONS}
    types = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - known
    mention = sorted(model_type for model_type in types if "encoder_hidden_states" in source(model_type))
    kinds = [MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]] for model_type in mention]
    forwards = [inspect.signature(kind.forward).parameters for kind in kinds]
    return [each for each, names in zip(mention, forwards, strict=True) if "encoder_hidden_states" in names]


CAN_ATTEND = can_attend()


def small_decoder(model_type):
    config = AutoConfig.for_model(model_type)
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    settle_config(config)
    return as_decoder(AutoModelForCausalLM.from_config(config))


def test_the_decoders_are_found():
    assert {"big_bird", "mvp", "roformer"} <= set(CAN_ATTEND)
    alone = {"musicgen_decoder", "musicgen_melody_decoder", "gemma3n_text", "gemma4_text", "minimax", "moshi"}
    assert set(BROKEN) - alone <= set(CAN_ATTEND)


@pytest.mark.parametrize("model_type", sorted(BROKEN))
def test_a_decoder_that_does_not_work_in_transformers_is_refused_before_it_is_built(model_type):
    of_bert = option_file("decoder", "bert")["tiny"]
    for build in (
        lambda: settle_config(AutoConfig.for_model(model_type)),
        lambda: load_decoder(None, model_type, of_bert),
    ):
        with pytest.raises(UserError) as caught:
            build()
        assert (caught.value.option, caught.value.value) == ("decoder.model_type", model_type)
        assert caught.value.wrong == BROKEN[model_type]
    assert caught.value.write.startswith("write decoder=bert, roberta, gpt2, bart or mbart, or another decoder")


@pytest.mark.parametrize("model_type", sorted({*CAN_ATTEND} - {*BROKEN}))
def test_a_decoder_without_an_option_file_trains_and_generates_whatever_is_padded(model_type):
    model = SpeechEncoderDecoder(encoder=part("hubert"), decoder=small_decoder(model_type))
    model.set_special_tokens(START, END, PAD)
    inputs = two_utterances()
    loss = model.train()(**inputs, labels=LABELS).loss
    loss.backward()
    assert loss.isfinite()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
    model.eval()
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(output.sequences, model.generate(**inputs, **options, use_cache=False))
    with torch.inference_mode():
        forced = model(**inputs, decoder_input_ids=output.sequences[:, :-1]).logits
        alone = model(inputs["input_values"][1:, :2000], decoder_input_ids=output.sequences[1:, :-1]).logits
    torch.testing.assert_close(torch.stack(output.logits, 1), forced, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, forced[1:], rtol=0, atol=1e-4)
    for number in (model.max_tokens, model.max_tokens + 1):
        with pytest.raises((IndexError, RuntimeError)) if number > model.max_tokens else nullcontext():
            model.decoder(torch.full((1, number), 7), encoder_hidden_states=torch.zeros(1, 3, 16))


# --- encoders


def test_every_encoder_of_transformers_that_says_its_masks_has_a_class_that_masks_everything():
    method = "_get_feature_vector_attention_mask"
    say = {file.parent.name for file in MODELS.glob("*/modeling_*.py") if method in file.read_text(encoding="utf-8")}
    assert say - {"speech_encoder_decoder"} <= {
        model_type_to_module_name(each) for each in {*ENCODERS, *ENCODERS_OF_WHOLE}
    }


SPEECH = [
    LasrEncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
    ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
    Qwen2AudioEncoderConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16),
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
]


@pytest.mark.parametrize("config", SPEECH, ids=lambda config: config.model_type)
def test_an_encoder_that_takes_no_mask_is_refused_as_configuration_and_as_module(config):
    module = AutoModel.from_config(config)
    for build in (
        lambda: encoder_from_config(config),
        lambda: load_encoder(config.model_type, option_file("encoder", "hubert")["tiny"]),
        lambda: SpeechEncoderDecoder(encoder=module, decoder=part("bert")),
    ):
        with pytest.raises(UserError) as caught:
            build()
        assert (caught.value.option, caught.value.value) == ("encoder", type(module).__name__)
        assert (
            caught.value.wrong == "it is not a speech encoder that tells which of its frames are real in a padded batch"
        )
        assert "write encoder=wav2vec2, hubert, whisper or another option; a class of your own" in caught.value.write

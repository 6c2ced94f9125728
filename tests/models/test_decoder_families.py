"""Decoders out of whole sequence-to-sequence models: they have the whole model's logits."""

import copy

import pytest
import torch
from pairs import part
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, WhisperForCausalLM
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoderModelOutput

from sedtrain.models.decoder import as_decoder, decoder_from_pretrained, load_decoder, tokenizer_of
from sedtrain.models.decoder_families import DECODERS_OF_WHOLE
from sedtrain.models.repaired_decoders import NoPositions
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.text.tokenizers import encode_target

SPECIAL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0, **SPECIAL,
}  # fmt: skip
T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
SEAMLESS = {
    "hidden_size": 16, "speech_encoder_layers": 1, "speech_encoder_attention_heads": 2, "speech_encoder_intermediate_size": 16,
    "num_adapter_layers": 1, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 16,
    "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3, "encoder_layers": 1, "dropout": 0.0, **SPECIAL,
}  # fmt: skip
CANARY = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "max_position_embeddings": 20,
}  # fmt: skip
PARAKEET = {
    "model_type": "parakeet_encoder", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "subsampling_conv_channels": 8, "num_mel_bins": 16,
}  # fmt: skip
WHOLE = {
    "whisper": {**BART, "max_source_positions": 20},
    "m2m_100": BART,
    "speech_to_text": {**BART, "conv_channels": 8},
    "moonshine": {
        "hidden_size": 16, "intermediate_size": 16, "encoder_num_hidden_layers": 1, "encoder_num_attention_heads": 2,
        "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, **SPECIAL,
    },
    "t5": {**T5, **SPECIAL},
    "mt5": {**T5, **SPECIAL, "initializer_factor": 0.3},
    "seamless_m4t": SEAMLESS,
    "seamless_m4t_v2": SEAMLESS,
    "canary": {"encoder_config": PARAKEET, "decoder_config": {**CANARY, **SPECIAL}, **SPECIAL},
    "cohere_asr": {"encoder_config": PARAKEET, **CANARY, **SPECIAL},
    "moonshine_streaming": {
        "encoder_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, **SPECIAL,
    },
    "speecht5": {
        "hidden_size": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_layers": 2,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "conv_dim": [16], "conv_kernel": [8], "conv_stride": [4],
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "positional_dropout": 0.0, **SPECIAL,
    },
    "t5gemma": {
        "encoder": {**CANARY, **SPECIAL}, "decoder": {**CANARY, **SPECIAL, "query_pre_attn_scalar": 4}, "vocab_size": 40,
    },
}  # fmt: skip
IDS = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 8, 7, 6]])
AUDIO = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=WHOLE)
def whole(request):
    torch.manual_seed(0)
    model = DECODERS_OF_WHOLE[request.param].whole(AutoConfig.for_model(request.param, **WHOLE[request.param]))
    for name in DECODERS_OF_WHOLE[request.param].frame_modules:  # the joined model has these
        setattr(model.model.decoder, name, {"proj": nn.Identity, "pos_emb": NoPositions}[name]())
    return model.eval()


@torch.inference_mode()
def logits(decoder):
    return decoder(input_ids=IDS, encoder_hidden_states=AUDIO).logits


@torch.inference_mode()
def assert_same_logits(decoder, whole):
    encoded = MoonshineEncoderModelOutput(last_hidden_state=AUDIO.clone())
    expected = whole(encoder_outputs=encoded, decoder_input_ids=IDS).logits
    torch.testing.assert_close(logits(decoder.eval()), expected, rtol=0, atol=1e-5)


def test_every_family_is_compared_with_its_whole_model():
    assert WHOLE.keys() == DECODERS_OF_WHOLE.keys()


def test_the_folder_of_a_whole_model_gives_a_decoder_that_is_saved_alone(whole, tmp_path, caplog):
    whole.save_pretrained(tmp_path / "whole")
    model_type = whole.config.model_type
    decoder = load_decoder(None, model_type, {}, checkpoint=str(tmp_path / "whole"))
    assert_same_logits(decoder, whole)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("sedtrain")] == []
    assert_same_logits(decoder_from_pretrained(str(tmp_path / "whole")), whole)
    decoder.save_pretrained(tmp_path / "alone")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "alone"), whole)
    assert_same_logits(load_decoder(None, model_type, {}, checkpoint=str(tmp_path / "alone")), whole)


def test_an_output_layer_that_is_not_tied_stays_so_in_every_folder(whole, tmp_path):
    whole = copy.deepcopy(whole)
    output_layer = whole.get_output_embeddings()
    output_layer.weight = nn.Parameter(output_layer.weight.detach().flip(0))
    whole.save_pretrained(tmp_path / "whole")
    decoder = load_decoder(None, whole.config.model_type, {}, checkpoint=str(tmp_path / "whole"))
    SpeechEncoderDecoder(encoder=part("hubert"), decoder=decoder).save_pretrained(tmp_path / "joined")
    assert_same_logits(SpeechEncoderDecoder.from_pretrained(tmp_path / "joined").decoder, whole)
    assert_same_logits(as_decoder(whole), whole)


def test_a_whole_module_gives_its_decoder(whole):
    decoder = as_decoder(whole)
    assert_same_logits(decoder, whole)
    is_tied = decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight
    assert is_tied is (whole.config.model_type not in ("cohere_asr", "moonshine_streaming"))


@pytest.mark.parametrize("option", ["num_layers", "num_decoder_layers"])
def test_t5_s_number_of_layers_is_that_of_its_decoder_by_either_name(tmp_path, option):
    AutoConfig.for_model("t5", **WHOLE["t5"]).save_pretrained(tmp_path)
    for options, expected in (({}, 2), ({option: 3}, 3)):
        decoder = load_decoder(None, "t5", {}, checkpoint=str(tmp_path), pretrained=False, options=options)
        assert len(decoder.decoder.block) == decoder.config.num_hidden_layers == expected


def test_whisper_s_causal_model_hears_by_its_whole_model_s_decoder():
    config = AutoConfig.for_model("whisper", **WHOLE["whisper"])
    module = WhisperForCausalLM(config).eval()
    expected = module(IDS, encoder_outputs=(AUDIO,)).logits
    torch.testing.assert_close(logits(as_decoder(module).eval()), expected, rtol=0, atol=1e-5)


def test_a_whisper_decoder_suppresses_no_token():
    decoder = as_decoder(DECODERS_OF_WHOLE["whisper"].whole(AutoConfig.for_model("whisper", **WHOLE["whisper"])))
    generation = SpeechEncoderDecoder(encoder=part("hubert"), decoder=decoder).generation_config
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == (None, None)


def test_whisper_s_published_decoder_has_the_logits_of_the_whole_model(shared):
    folder = str(shared / "models/whisper-tiny.en")
    whole = DECODERS_OF_WHOLE["whisper"].whole.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = load_decoder(None, "whisper", {}, checkpoint=folder).eval()
    audio = torch.randn(1, 9, whole.config.d_model, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = decoder(input_ids=IDS[:1], encoder_hidden_states=audio).logits
        expected = whole(encoder_outputs=(audio,), decoder_input_ids=IDS[:1]).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    tokenizer = tokenizer_of("tiny", folder, {})
    ids = encode_target(tokenizer, " one two", whole.config.decoder_start_token_id)
    assert tokenizer.decode(ids) == "<|notimestamps|> one two<|endoftext|>"

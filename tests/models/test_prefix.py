"""Language models behind a prefix of audio, against the plain class of transformers on embeddings put together by hand."""

import copy

import pytest
import torch
from pairs import END, IDS, LABELS, PAD, START, VOCABULARY, part, two_utterances
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    SpeechEncoderDecoderModel,
)

from sedtrain.errors import UserError
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

LLM = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**LLM),
    "mistral": MistralConfig(**LLM, sliding_window=3),
    "gemma3_text": Gemma3TextConfig(**LLM, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, listens="prefix"),
    "gemma2": Gemma2Config(**LLM, head_dim=8, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**LLM, logits_scaling=3.0),
    "cohere": CohereConfig(**LLM, logit_scale=0.5),
}  # fmt: skip
PROMPT = ([7, 8], [9, 6])


def language_model(name):
    """A plain one with weights that are large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, 0, 0.2)
    return model


def joined(name, prompt=PROMPT):
    model = SpeechEncoderDecoder(encoder=part("hubert"), decoder=language_model(name)).eval()
    model.set_special_tokens(START, END, PAD)
    model.config.decoder.audio_prompt = prompt
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A model behind a prefix and the plain language model with its weights."""
    return joined(request.param), language_model(request.param)


def expected_logits(model, plain, row, tokens):
    """The plain language model's, of one utterance without padding."""
    inputs = two_utterances()
    audio = inputs["input_values"][row : row + 1, : int(inputs["attention_mask"][row].sum())]
    embed = plain.get_input_embeddings()
    before, behind = (embed(torch.tensor([ids])) for ids in PROMPT)
    prefix = torch.cat([before, model.encode(audio).last_hidden_state, behind, embed(tokens)], 1)
    return plain(inputs_embeds=prefix).logits[0, -tokens.shape[1] :]


@torch.no_grad()
def test_logits_and_loss_are_those_of_the_plain_model_on_the_embeddings_of_each_utterance(pair):
    model, plain = pair
    expected = torch.stack([expected_logits(model, plain, row, IDS[row : row + 1]) for row in (0, 1)])
    output = model(**two_utterances(), decoder_input_ids=IDS, labels=LABELS)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    loss = cross_entropy(expected.flatten(0, 1), LABELS.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-4)
    without_logits = model(**two_utterances(), decoder_input_ids=IDS, labels=LABELS, output_logits=False)
    torch.testing.assert_close(without_logits.loss, loss, rtol=1e-4, atol=1e-4)


def test_a_text_padded_in_front_or_behind_goes_on_as_it_does_alone(pair):
    model, _ = pair
    options, audio = {"max_new_tokens": 4, "min_new_tokens": 4}, two_utterances()
    second = {name: each[1:] for name, each in audio.items()}
    alone = model.generate(**second, decoder_input_ids=torch.tensor([[START, 7]]), **options)[0, 2:]
    for text, mask in (([PAD, START, 7], [0, 1, 1]), ([START, 7, PAD], [1, 1, 0])):
        given = {"decoder_input_ids": torch.tensor([[START, 9, 8], text])}
        given["decoder_attention_mask"] = torch.tensor([[1, 1, 1], mask])
        for use_cache in (True, False):
            written = model.generate(**audio, **given, use_cache=use_cache, **options)
            assert written[1, 3:].tolist() == alone.tolist()


def test_a_saved_model_keeps_its_prompt_and_stock_transformers_refuses_it(tmp_path):
    model = joined("llama")
    model.save_pretrained(tmp_path)
    loaded = SpeechEncoderDecoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours, theirs = (each(**two_utterances(), decoder_input_ids=IDS).logits for each in (model, loaded))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="llama behind a prefix of sedtrain"):
        SpeechEncoderDecoderModel.from_pretrained(tmp_path)


def test_a_cache_of_a_fixed_size_is_refused():
    with pytest.raises(UserError, match="has no room for the audio in front of the text"):
        joined("llama").generate(**two_utterances(), max_new_tokens=2, cache_implementation="static")

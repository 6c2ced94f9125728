"""Every family of text decoder, as its option file builds it."""

import pytest
import torch
from families import OPTIONS, tiny_decoder
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    XmodConfig,
)

from sedtrain.errors import UserError
from sedtrain.models.decoder import CROSS_ATTENTION, tokenizer_of
from sedtrain.models.decoder_families import whole_type
from sedtrain.text.tokenizers import train_tokenizer

TEXTS = ["one two three", "four five six", "seven eight nine"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, "char", 50)


@pytest.fixture(scope="module", params=OPTIONS)
def decoder(request, tokenizer):
    return tiny_decoder(request.param, tokenizer=tokenizer)


@torch.inference_mode()
def logits(decoder, ids, audio, **options):
    return decoder(input_ids=ids, encoder_hidden_states=audio, **options).logits


@pytest.fixture
def ids():
    return torch.tensor([[1, 5, 6, 7, 8, 9], [1, 9, 8, 7, 6, 5]])


@pytest.fixture
def audio():
    """(B, T, D) encoder states."""
    return torch.randn(2, 11, 144, generator=torch.Generator().manual_seed(0))


def test_a_random_decoder_has_the_vocabulary_and_the_special_tokens_of_the_tokenizer(decoder, tokenizer, ids, audio):
    config = decoder.config
    assert logits(decoder, ids, audio).shape == (2, 6, len(tokenizer))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.is_decoder
    assert config.add_cross_attention


def test_random_weights_keep_no_token_of_the_family_s_own_vocabulary(decoder):
    values = vars(decoder.config)
    expected = {"decoder_vocab_size": decoder.config.vocab_size, "decoder_start_token_id": 1, "forced_eos_token_id": 2}
    assert {name: values[name] for name in expected.keys() & values.keys()}.items() <= expected.items()
    assert values.get("encoder_no_repeat_ngram_size", 0) == 0


def learn(decoder, ids, audio):
    """Gives every weight the gradient of one step; the names of those that get none."""
    output = decoder.train()(input_ids=ids, encoder_hidden_states=audio)
    decoder.zero_grad()
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), ids.flatten()).backward()
    decoder.eval()
    return [name for name, weight in decoder.named_parameters() if weight.grad is None]


def test_every_weight_learns_and_cross_attention_does(decoder, ids, audio):
    assert learn(decoder, ids, audio) == []
    cross = [weight.grad for name, weight in decoder.named_parameters() if CROSS_ATTENTION.search(name)]
    assert len(cross) >= 2 * 4  # two layers of weights, of most families with biases, some of them joined
    assert all(gradient.isfinite().all() for gradient in cross)
    assert sum(gradient.abs().max() == 0 for gradient in cross) <= 2  # softmax has no gradient for the keys' bias


def test_a_saved_decoder_loads_and_every_weight_learns(decoder, tokenizer, tmp_path, ids, audio):
    decoder.save_pretrained(tmp_path)
    kind = whole_type(decoder.config).replace("_", "-")
    name = next(name for name in OPTIONS if name.replace("_", "-") == kind)
    loaded = tiny_decoder(name, tokenizer=tokenizer, checkpoint=str(tmp_path))
    torch.testing.assert_close(logits(loaded, ids, audio), logits(decoder, ids, audio))
    assert learn(loaded, ids, audio) == []


def test_a_later_token_changes_no_earlier_logit(decoder, ids, audio):
    changed = ids.clone()
    changed[:, 4] = 4
    before, after = logits(decoder, ids, audio), logits(decoder, changed, audio)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4] - after[:, 4]).abs().max() > 1e-4


def test_the_audio_is_heard(decoder, ids, audio):
    audio.requires_grad_()
    output = decoder(input_ids=ids, encoder_hidden_states=audio).logits
    output.log_softmax(-1)[..., 5].sum().backward()
    assert audio.grad.abs().amax(dim=(0, 2)).min() > 0
    other = logits(decoder, ids, audio.detach().flip(0))
    assert (output.detach() - other).abs().max() > 1e-3


def test_masked_frames_are_not_heard(decoder, ids, audio):
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[:, 7:] = 0
    changed = audio.clone()
    changed[:, 7:] = 100.0
    before, after = (logits(decoder, ids, each, encoder_attention_mask=mask) for each in (audio, changed))
    torch.testing.assert_close(before, after)


@torch.inference_mode()
def test_a_cache_gives_the_logits_of_teacher_forcing(decoder, ids, audio):
    expected = logits(decoder, ids, audio)
    cache, steps = None, []
    for step in range(ids.shape[1]):
        output = decoder(
            input_ids=ids[:, step : step + 1], encoder_hidden_states=audio, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)


# --- checkpoints


def problem(name, tokenizer, **options):
    with pytest.raises(UserError) as caught:
        tiny_decoder(name, tokenizer=tokenizer, **options)
    return caught.value


TINY_LLM = {"vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "initializer_range": 0.2}


@pytest.mark.parametrize(
    "llm",
    [
        LlamaForCausalLM(LlamaConfig(intermediate_size=8, num_hidden_layers=1, num_key_value_heads=2, **TINY_LLM)),
        BloomForCausalLM(BloomConfig(n_layer=1, **TINY_LLM)),
    ],
    ids=["llama", "bloom"],
)
def test_a_language_model_s_checkpoint_hears_without_cross_attention(llm, tokenizer, tmp_path, ids):
    llm.save_pretrained(tmp_path)
    options = {"checkpoint": str(tmp_path), "attention": "eager", "model_type": llm.config.model_type}
    decoder, audio = tiny_decoder("bert", tokenizer=tokenizer, **options), torch.randn(2, 5, 8)
    assert (logits(decoder, ids, audio) - logits(decoder, ids, audio.flip(0))).abs().max() > 1e-5


def test_an_encoder_s_checkpoint_becomes_causal_and_keeps_its_weights(tokenizer, tmp_path, ids, audio):
    config = BertConfig(
        vocab_size=40, hidden_size=144, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    encoder = BertModel(config)
    encoder.half().save_pretrained(tmp_path)
    decoder = tiny_decoder("bert", tokenizer=tokenizer, checkpoint=str(tmp_path))
    kept, saved = (each.encoder.layer[0].attention.self.query.weight for each in (decoder.bert, encoder))
    torch.testing.assert_close(kept, saved.float())
    assert {weight.dtype for weight in decoder.parameters()} == {torch.float32}
    assert decoder.config.vocab_size == 40
    test_a_later_token_changes_no_earlier_logit(decoder, ids, audio)
    test_the_audio_is_heard(decoder, ids, audio)


def test_an_unknown_option_is_met_with_the_close_one(tokenizer):
    error = problem("gpt2", tokenizer, options={"n_layers": 3})
    assert error.option == "decoder.options.n_layers"
    assert error.wrong == "GPT2Config has no such option; did you mean 'n_layer'?"


def test_a_language_has_to_be_chosen_among_several(tokenizer, tmp_path):
    XmodConfig(languages=["en_XX", "de_DE"]).save_pretrained(tmp_path)
    error = problem("xmod", tokenizer, checkpoint=str(tmp_path), pretrained=False, options={})
    assert (error.option, error.value) == ("decoder.options.default_language", None)
    assert error.wrong == "xmod has adapters of 2 languages, and none is chosen"
    assert error.write == "write decoder.options.default_language=ONE_OF en_XX, de_DE"


def test_the_vocabulary_of_a_translation_model_is_that_of_its_target(tokenizer, tmp_path):
    tiny = {"d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    MarianConfig(vocab_size=50, decoder_vocab_size=30, pad_token_id=29, **tiny).save_pretrained(tmp_path)
    decoder = tiny_decoder("marian", tokenizer=tokenizer, checkpoint=str(tmp_path), pretrained=False)
    ids, audio = torch.tensor([[29, 1]]), torch.zeros(1, 3, 8)
    assert logits(decoder, ids, audio).shape[-1] == decoder.config.vocab_size == 30


def test_a_folder_that_is_no_model_is_refused(tokenizer, tmp_path):
    error = problem("bert", tokenizer, checkpoint=str(tmp_path))
    assert (error.option, error.value) == ("decoder.checkpoint", str(tmp_path))
    assert error.wrong == "this folder is no model, it holds no config.json"


def test_an_attention_that_does_not_exist_is_refused(tokenizer):
    error = problem("bert", tokenizer, attention="sdap")
    assert (error.option, error.value) == ("decoder.attention", "sdap")
    assert error.wrong.startswith("bert cannot use it here: ")


# --- tokenizers


def test_a_decoder_with_random_weights_has_no_tokenizer_of_its_own():
    assert tokenizer_of("tiny", None, {"base": "openai-community/gpt2"}) is None


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tokenizer, tmp_path):
    like_gpt2 = train_tokenizer(TEXTS, "char", 50)
    like_gpt2.pad_token = None
    like_gpt2.save_pretrained(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    own = tokenizer_of("tiny", str(tmp_path), {})
    assert own.pad_token == own.eos_token == "</s>"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"decoder.checkpoint = .*\n    this folder has no tokenizer"):
        tokenizer_of("tiny", str(tmp_path), {})

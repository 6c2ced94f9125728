"""Language models behind a prefix of audio, against the plain class of transformers on embeddings put together by hand."""

import copy
import json
import shlex
import subprocess
import sys

import pytest
import torch
from families import tiny_decoder
from pairs import END, IDS, LABELS, PAD, START, VOCABULARY, part, two_utterances
from pairs import LLAMA as LLM
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    SmolLM3Config,
    SpeechEncoderDecoderModel,
)
from transformers.models.speech_encoder_decoder import modeling_speech_encoder_decoder

from sedtrain.errors import UserError
from sedtrain.models import chat_template
from sedtrain.models.adapter import ADAPTERS
from sedtrain.models.saved import refuse_misdescribed
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.text.tokenizers import encode_target, train_tokenizer

FAMILIES = {
    "llama": LlamaConfig(**LLM),
    "mistral": MistralConfig(**LLM, sliding_window=3),
    "gemma3_text": Gemma3TextConfig(**LLM, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, listens="prefix"),
    "gpt_neo": GPTNeoConfig(
        hidden_size=16, num_layers=2, num_heads=2, window_size=4, vocab_size=VOCABULARY,
        attention_types=[[["global", "local"], 1]],
    ),
    "opt": OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, vocab_size=VOCABULARY),
    "qwen3": Qwen3Config(**LLM, head_dim=8),
    "smollm3": SmolLM3Config(**LLM),
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


def joined(name, prompt=PROMPT, adapter=None):
    model = SpeechEncoderDecoder(encoder=part("hubert"), decoder=language_model(name), adapter=adapter).eval()
    model.set_special_tokens(START, END, PAD)
    model.config.decoder.audio_prompt = prompt
    return model


def test_joining_says_nothing_of_a_configuration_that_is_overwritten(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_speech_encoder_decoder.logger, "warning", said.append)
    joined("llama")
    assert said == []


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


@pytest.mark.parametrize("adapter", [None, "stack_mlp"])
def test_a_saved_model_keeps_prompt_and_adapter_and_stock_transformers_refuses_it(adapter, tmp_path):
    widths = part("hubert").config.hidden_size, LLM["hidden_size"]
    model = joined("llama", adapter=adapter and ADAPTERS[adapter](*widths, stride=2))
    model.save_pretrained(tmp_path)
    loaded = SpeechEncoderDecoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours, theirs = (each(**two_utterances(), decoder_input_ids=IDS).logits for each in (model, loaded))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="of sedtrain"):
        SpeechEncoderDecoderModel.from_pretrained(tmp_path)


def test_a_saved_prompt_that_is_none_is_refused():
    model = joined("llama")
    refuse_misdescribed("FOLDER", model)
    for prompt in ("text", [[1]], [[1], [VOCABULARY]], [[1], ["a"]], [[True], []], [[1] * 10_000, []]):
        model.config.decoder.audio_prompt = prompt
        with pytest.raises(UserError, match="where two lists of its token ids belong"):
            refuse_misdescribed("FOLDER", model)


def test_a_language_model_whose_embeddings_have_another_width_than_its_layers_is_refused():
    with pytest.raises(UserError, match="its embeddings are 8 wide and its layers 16"):
        tiny_decoder("opt", options={"hidden_size": 16, "word_embed_proj_dim": 8})


def test_a_cache_of_a_fixed_size_is_refused():
    with pytest.raises(UserError, match="has no room for the audio before the text"):
        joined("llama").generate(**two_utterances(), max_new_tokens=2, cache_implementation="static")


# --- options


def problem(name, **options):
    with pytest.raises(UserError) as caught:
        tiny_decoder(name, **options)
    error = caught.value
    return f"{error.option} = {error.value!r}: {error.wrong}; {error.write}"


def test_a_family_listens_as_it_can_and_as_it_is_asked_to():
    assert [tiny_decoder(name).config.add_cross_attention for name in ("gpt2", "llama")] == [True, False]
    assert not tiny_decoder("gpt2", listens="prefix").config.add_cross_attention
    assert problem("opt", listens="cross_attention") == (
        "decoder.listens = 'cross_attention': opt has no cross-attention; write decoder.listens=prefix, or none"
    )
    assert problem("bert", listens="prefix") == (
        "decoder.listens = 'prefix': bert is not a language model that can read a prefix; "
        "write decoder.listens=cross_attention, or decoder=llama or another decoder-only language model"
    )


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer():
    tokenizer = train_tokenizer(["<s> user assistant Write: </> <>"], "char", 60)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts_of(prompt, tokenizer):
    config = tiny_decoder("llama", tokenizer=tokenizer, prompt=prompt).config
    before, behind = config.audio_prompt
    return tokenizer.decode(before), tokenizer.decode(behind), config.decoder_start_token_id


def test_the_prompt_stands_around_the_audio_and_its_last_token_starts_the_text():
    plain, chat = train_tokenizer(["Write down this:"], "char", 60), chat_tokenizer()
    assert texts_of(None, plain) == ("", "", None)
    [write, colon] = (plain.convert_tokens_to_ids(token) for token in "e:")
    assert texts_of("Write down {audio} this:", plain) == ("Write down", "this", colon)
    assert texts_of("{audio} Write", plain) == ("", "Writ", write)
    last = chat.convert_tokens_to_ids(">")
    assert texts_of(None, chat) == ("<s><user>", "</><assistant", last)
    assert texts_of("Write: {audio}", chat) == ("<s><user>Write:", "</><assistant", last)


def test_a_prompt_without_one_place_for_the_audio_is_refused_and_so_is_one_that_is_not_read():
    assert problem("llama", prompt="Transcribe:") == (
        "decoder.prompt = 'Transcribe:': it has 0 places for the audio, and needs one; "
        "write 'decoder.prompt=\"TEXT {audio} TEXT\"'"
    )
    assert problem("bert", prompt="{audio}") == (
        "decoder.prompt = '{audio}': this decoder listens by cross-attention, and reads no prompt; "
        "write decoder.prompt=null, or decoder=llama or another decoder that reads a prefix"
    )


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("{% if", "fails: TemplateSyntaxError unexpected 'end of template'"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError division by zero"),
        ("{{ raise_exception('no') }}", "fails: TemplateError no"),
        (
            "{{ ''.__class__.__mro__ }}",
            "fails: SecurityError access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ lipsum.__globals__ }}", "writes the user's message 0 times"),
        ("{{ messages[0].content * 2 }}", "writes the user's message 2 times"),
        ("{{ messages[0].content * 10**5 }}", "writes 700000 characters"),
        ("{{ 'x' * 10**10 }}", "takes more than 2 GiB of memory"),
        ("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "takes more than 2 s"),
    ],
)
def test_a_chat_template_that_fails_takes_too_much_or_loses_the_audio_is_refused(monkeypatch, template, wrong):
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "folder"
    assert problem("llama", tokenizer=tokenizer) == (
        f"decoder.checkpoint = 'folder': the chat template of its tokenizer {wrong}; "
        "write decoder.checkpoint=FOLDER whose tokenizer has another chat template, or none"
    )


@pytest.mark.parametrize(
    ("python", "wrong"), [(None, "is no Python: "), ("/nowhere", "is no Python: "), ("/bin/true", "writes ''")]
)
def test_a_chat_template_without_a_python_that_renders_it_is_refused(monkeypatch, python, wrong):
    monkeypatch.setattr(chat_template.sys, "executable", python)
    assert f"cannot be rendered: sys.executable={python!r} {wrong}" in chat_template.rendered("", {})[1]


def test_a_chat_template_takes_no_more_than_the_process_itself_may():
    limited = f'ulimit -t 10 -v {2**20}; exec {shlex.quote(sys.executable)} "$@"'
    shell = ["bash", "-c", limited, "python", "-P", chat_template.__file__, str(chat_template.SECONDS)]
    given = json.dumps({"chat_template": "{{ messages[0].content }}", "conversations": [[{"content": "a"}]]})
    ended = subprocess.run(shell, input=given, capture_output=True, text=True)
    assert json.loads(ended.stdout) == ["a", ""], ended.stderr


def test_a_text_behind_a_prompt_has_no_token_in_front():
    tokenizer = train_tokenizer(["Write: one"], "char", 60)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    colon = tokenizer.convert_tokens_to_ids(":")
    texts = [encode_target(tokenizer, text, None) for text in ("one", ": one")]
    assert [tokenizer.decode(ids) for ids in texts] == ["one</s>", ": one</s>"]
    assert encode_target(tokenizer, "one", colon)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["opt", "gpt_neo", "gpt2"])
def test_utterances_that_fit_the_positions_alone_fit_them_together(name):
    model, audio = joined(name, prompt=([], [])), two_utterances()
    lengths = model.encode(audio["input_values"], audio["attention_mask"]).attention_mask.sum(1).tolist()
    short, long = [9, 8, END], [9, 8, *[7] * (lengths[0] - lengths[1]), END]
    labels = torch.tensor([short + [-100] * (len(long) - 3), long])
    most = max(lengths[0] + 3, lengths[1] + len(long))
    limited = limited_to(model, name, most)
    assert lengths[0] + len(long) > most
    together = limited(**audio, labels=labels).loss
    alone = [
        limited(audio["input_values"][row : row + 1, : int(mask.sum())], labels=labels[row : row + 1, :length]).loss
        * length
        for row, (mask, length) in enumerate(zip(audio["attention_mask"], (3, len(long)), strict=True))
    ]
    torch.testing.assert_close(together * (3 + len(long)), sum(alone))
    with pytest.raises(UserError, match=f"too long for the decoder's {most - 1} positions"):
        limited_to(model, name, most - 1)(**audio, labels=labels)


def limited_to(model, name, most):
    """The model with tables of so many positions."""
    config = copy.deepcopy(FAMILIES[name])
    config.max_position_embeddings = most
    torch.manual_seed(0)
    decoder = type(language_model(name))(config).eval()
    limited = SpeechEncoderDecoder(encoder=model.encoder, decoder=decoder).eval()
    limited.set_special_tokens(START, END, PAD)
    limited.config.decoder.audio_prompt = ([], [])
    assert limited.max_tokens == most
    return limited


def test_audio_and_text_that_exceed_the_positions_are_refused_and_generation_ends_at_the_last():
    model = joined("opt")
    model.max_tokens = 60
    num_frames = model.encode(**{"inputs": two_utterances()["input_values"]}).last_hidden_state.shape[1]
    room = 60 - num_frames - 4
    with pytest.raises(
        UserError, match=f"too long for the decoder's 60 positions after {num_frames + 4} of audio and prompt"
    ):
        model(**two_utterances(), decoder_input_ids=torch.full((2, room + 1), 7))
    written = model.generate(**two_utterances(), max_new_tokens=100, suppress_tokens=[END])
    assert written.shape[1] == room + 1

"""Speech2Text2: a folder in the layout of facebook/s2t-wav2vec2-large-en-de, read, computed, trained and damaged."""

import json
import math

import pytest
import soundfile
import torch
from corpora import syllables
from families import tiny_decoder, tiny_encoder
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Wav2Vec2Config,
    Wav2Vec2Model,
    pipeline,
)

from sedtrain import load
from sedtrain.errors import UserError
from sedtrain.models import SpeechEncoderDecoder
from sedtrain.models.positions import max_tokens
from sedtrain.models.speech_to_text_2 import Speech2Text2ForCausalLM, Speech2Text2Processor, register
from sedtrain.text.fast_bpe import Speech2Text2Tokenizer

ENCODER = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 4], "conv_stride": [8, 8, 4], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
NAME = "facebook/s2t-wav2vec2-large-en-de"
TOKENS = [*SPECIAL.values(), "f@@", "ür", "zür@@", "i@@", "ch", "wir"]
WIDTH, HEADS = 18, 2  # of odd half: 9 sines, 9 cosines
DECODER = {
    "model_type": "speech_to_text_2", "vocab_size": len(TOKENS), "d_model": WIDTH, "decoder_layers": 2, "decoder_ffn_dim": 32,
    "decoder_attention_heads": HEADS, "decoder_layerdrop": 0.0, "activation_function": "relu", "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "init_std": 0.02, "decoder_start_token_id": 2, "scale_embedding": True,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_target_positions": 16, "is_decoder": True,
    "add_cross_attention": True, "num_hidden_layers": 12, "encoder_layers": 12, "max_length": 11, "num_beams": 5,
    "early_stopping": True, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
JOINED = {
    "architectures": ["SpeechEncoderDecoderModel"], "model_type": "speech-encoder-decoder", "is_encoder_decoder": True,
    "tie_word_embeddings": False, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    "tokenizer_class": "speech_to_text_2", "feature_extractor_type": "wav2vec2",
    "processor_class": "Speech2Text2Processor", "transformers_version": "4.11.0.dev0",
}  # fmt: skip
FEATURES = {
    "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "padding_side": "right",
    "padding_value": 0, "return_attention_mask": True, "sampling_rate": 16000, "processor_class": "Speech2Text2Processor",
}  # fmt: skip


def weights_of(encoder):
    """Random weights by their published names; the table of positions, which is not read, is not the right one."""
    shapes = {"lm_head.weight": (len(TOKENS), WIDTH), "model.decoder.embed_tokens.weight": (len(TOKENS), WIDTH)}
    shapes["model.decoder.embed_positions.weights"] = (18, WIDTH)
    for layer in (f"model.decoder.layers.{i}." for i in range(2)):
        for part in ("self_attn", "encoder_attn"):
            for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= {f"{layer}{part}.{linear}.weight": (WIDTH, WIDTH), f"{layer}{part}.{linear}.bias": (WIDTH,)}
        shapes |= {f"{layer}fc1.weight": (32, WIDTH), f"{layer}fc1.bias": (32,)}
        shapes |= {f"{layer}fc2.weight": (WIDTH, 32), f"{layer}fc2.bias": (WIDTH,)}
        for norm in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}{norm}.weight": (WIDTH,), f"{layer}{norm}.bias": (WIDTH,)}
    decoder = {f"decoder.{name}": ("norm.weight" in name) + 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    projection = {"enc_to_dec_proj.weight": 0.2 * torch.randn(WIDTH, 24), "enc_to_dec_proj.bias": torch.randn(WIDTH)}
    return {**{f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}, **decoder, **projection}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the files and names of the published ones; and its weights."""
    folder = tmp_path_factory.mktemp("hub") / NAME
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    encoder = Wav2Vec2Config(**ENCODER)
    files = {
        "config.json": {**JOINED, "encoder": encoder.to_dict(), "decoder": DECODER},
        "vocab.json": {token: id for id, token in enumerate(TOKENS)},
        "tokenizer_config.json": {**SPECIAL, "do_lower_case": True, "tokenizer_class": "Speech2Text2Tokenizer"},
        "special_tokens_map.json": SPECIAL,
        "preprocessor_config.json": FEATURES,
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "ü r</w> 12\nü r 11\nz ür 7\nc h</w> 5\ni r</w> 4\nw ir</w> 2\n", encoding="utf-8"
    )
    weights = weights_of(Wav2Vec2Model(encoder))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder, weights


@pytest.fixture(scope="module")
def saved(published):
    return load(published[0])


# --- its forward, written anew


def sinusoid(position):
    """sin(p / 10000^(i/(half-1))) for each i of half, then the cosines."""
    half = WIDTH // 2
    angles = [position / 10000 ** (i / (half - 1)) for i in range(half)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])


def decoded(weights, ids, frames):
    """(V,) logits behind each of the ids, one position at a time, heads one by one."""
    weights = {name.removeprefix("decoder."): weight for name, weight in weights.items() if name.startswith("decoder.")}
    linear = lambda name, x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    norm = lambda name, x: F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])  # noqa: E731

    def attention(name, x, sources):
        query, key, value = (
            linear(f"{name}.{each}_proj", of) for each, of in (("q", x), ("k", sources), ("v", sources))
        )
        heads = []
        for columns in torch.arange(WIDTH).chunk(HEADS):
            scores = key[:, columns] @ query[columns] / math.sqrt(WIDTH // HEADS)
            heads.append(scores.softmax(0) @ value[:, columns])
        return linear(f"{name}.out_proj", torch.cat(heads))

    embedded = weights["model.decoder.embed_tokens.weight"][ids] * math.sqrt(WIDTH)
    states = [each + sinusoid(2 + number) for number, each in enumerate(embedded)]  # behind position 1, that of padding
    for layer in (f"model.decoder.layers.{i}." for i in range(2)):
        seen, states = torch.stack(states), []
        for number, x in enumerate(seen):
            x = norm(f"{layer}self_attn_layer_norm", x + attention(f"{layer}self_attn", x, seen[: number + 1]))
            x = norm(f"{layer}encoder_attn_layer_norm", x + attention(f"{layer}encoder_attn", x, frames))
            states.append(norm(f"{layer}final_layer_norm", x + linear(f"{layer}fc2", linear(f"{layer}fc1", x).relu())))
    return torch.stack(states) @ weights["lm_head.weight"].T


@torch.inference_mode()
def test_logits_are_those_of_an_independent_forward_beyond_the_published_table_of_positions_too(saved, published):
    ids, frames = torch.randint(len(TOKENS), (2, 20)), torch.randn(2, 5, 24)
    given = {"encoder_outputs": (frames,), "decoder_input_ids": ids}
    projected = frames @ published[1]["enc_to_dec_proj.weight"].T + published[1]["enc_to_dec_proj.bias"]
    expected = torch.stack([decoded(published[1], *row) for row in zip(ids, projected, strict=True)])
    torch.testing.assert_close(saved.model(**given).logits, expected, rtol=1e-4, atol=1e-4)


# --- the folder


def test_every_weight_and_setting_of_the_folder_is_taken_without_a_warning(published, caplog):
    (folder, weights) = published
    saved = load(folder)
    assert caplog.text == ""
    state = saved.model.state_dict()
    assert state.keys() == weights.keys() - {"decoder.model.decoder.embed_positions.weights"}
    assert all(torch.equal(state[name], weights[name]) for name in state)
    assert saved.model.config.decoder.decoder_layers == 2
    assert saved.model.config.decoder_start_token_id == 2
    assert max_tokens(saved.model.decoder) is None
    generation = saved.model.generation_config
    assert (generation.decoder_start_token_id, generation.max_length, generation.num_beams) == (2, 11, 5)
    written = saved.model.generate(torch.randn(1, 8000))
    assert written[0, 0] == 2
    assert written.shape[1] <= 11


def test_the_auto_classes_know_tokenizer_processor_and_decoder(published):
    folder = published[0]
    for processor in (AutoProcessor.from_pretrained(folder), Speech2Text2Processor.from_pretrained(folder)):
        assert isinstance(processor, Speech2Text2Processor)
        assert isinstance(processor.tokenizer, Speech2Text2Tokenizer)
        assert processor(text="Für Zürich").input_ids == [4, 5, 6, 7, 8]
        assert processor.batch_decode([[2, 4, 5, 9, 2]]) == ["</s> für wir </s>"]
        assert processor([0.0] * 800, sampling_rate=16000, return_tensors="pt").attention_mask.shape == (1, 800)
    config = CONFIG_MAPPING["speech_to_text_2"](d_model=8, decoder_ffn_dim=8, vocab_size=9)
    assert type(AutoModelForCausalLM.from_config(config)) is Speech2Text2ForCausalLM


def test_a_folder_whose_tokenizer_is_named_in_config_json_alone_loads(published, tmp_path):
    for name in ("config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((published[0] / name).read_bytes())
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is Speech2Text2Tokenizer


def test_names_that_transformers_knows_already_stay_as_they_are(monkeypatch):
    known = CONFIG_MAPPING["speech_to_text_2"]
    register()
    assert CONFIG_MAPPING["speech_to_text_2"] is known


def test_it_learns_a_text_and_is_saved_with_it(published, tmp_path):
    saved = load(published[0])
    audio, labels = torch.randn(1, 2000), torch.tensor([[4, 5, 6, 7, 8, 2]])
    optimizer = torch.optim.AdamW(saved.model.parameters(), 1e-2)
    saved.model.train()
    for _ in range(20):
        loss = saved.model(audio, labels=labels).loss
        loss.backward()
        assert all(weight.grad is not None for weight in saved.model.parameters() if weight.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    saved.model.eval()
    saved.save(tmp_path, {})
    loaded = load(tmp_path)
    written = loaded.model.generate(audio, num_beams=1)
    assert loaded.tokenizer.batch_decode(written, skip_special_tokens=True) == ["für zürich"]
    for name, weight in saved.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


def test_the_folder_translates_a_recording(saved, tmp_path):
    soundfile.write(tmp_path / "a.wav", syllables(0.5), 16_000)
    text = saved.transcribe(tmp_path / "a.wav", max_new_tokens=3)
    assert text == saved.transcribe(syllables(0.5), sampling_rate=16_000, max_new_tokens=3)
    assert set(text) <= set("fürzichw <unk>")


def test_the_example_of_its_page_runs_step_by_step_and_in_a_pipeline(published, monkeypatch):
    monkeypatch.chdir(published[0].parents[1])
    model = SpeechEncoderDecoder.from_pretrained(NAME)
    processor = Speech2Text2Processor.from_pretrained(NAME)
    inputs = processor(syllables(0.5), sampling_rate=16_000, return_tensors="pt")
    ids = model.generate(inputs=inputs["input_values"], attention_mask=inputs["attention_mask"])
    [written] = processor.batch_decode(ids)
    assert written.startswith("</s>")
    asr = pipeline("automatic-speech-recognition", model=NAME, feature_extractor=NAME)
    assert asr(syllables(0.5))["text"] == processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_embeddings_of_two_values_stay_two_where_config_json_ties_them(published, tmp_path):
    folder, weights = published
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    values["decoder"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = SpeechEncoderDecoder.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(TOKENS) + 1)
    for name in ("decoder.lm_head.weight", "decoder.model.decoder.embed_tokens.weight"):
        assert torch.equal(model.state_dict()[name][:-1], weights[name])


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("vocab.json", '{"<s>": 0, "<pad', "the folder gave: "),
        ("vocab.json", '{"a": []}', "the folder gave: vocab.json gives 'a' the id '[]'"),
        ("vocab.json", None, "the folder gave: there is no vocab.json"),
        ("merges.txt", "a b\n\udcff", "the folder gave: "),
        ("merges.txt", "a\n", "the folder gave: merges.txt has a line with one symbol, 'a', instead of a pair"),
    ],
)
def test_damaged_files_of_the_tokenizer_are_one_problem(name, text, wrong, published, tmp_path):
    for file in published[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    [error] = raised.value.errors
    assert (error.option, error.value) == ("checkpoint", str(tmp_path))
    assert error.wrong.startswith(wrong)


# --- the family


@torch.inference_mode()
def test_a_prompt_padded_in_front_gives_the_logits_that_it_gives_alone():
    model = SpeechEncoderDecoder(encoder=tiny_encoder("hubert"), decoder=tiny_decoder("speech_to_text_2")).eval()
    audio, prompt = torch.randn(1, 8000), torch.tensor([[0, 0, 1, 7]])
    padded = model(audio, decoder_input_ids=prompt, decoder_attention_mask=torch.tensor([[0, 0, 1, 1]])).logits
    alone = model(audio, decoder_input_ids=prompt[:, 2:]).logits
    assert (padded[:, 2:] - alone).abs().max() < 1e-5


def test_a_value_that_is_computed_from_another_is_no_option():
    with pytest.raises(UserError, match="Speech2Text2Config has no such option"):
        tiny_decoder("speech_to_text_2", options={"num_hidden_layers": 3})

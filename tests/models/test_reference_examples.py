"""The examples of the base class's documents as they stand: `SpeechEncoderDecoderModel` is ours, a Hub name a folder."""

import ast
import doctest
import re
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from io import BytesIO
from itertools import chain
from types import ModuleType

import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers
from conftest import EMBEDDED, SHARED
from families import tiny_encoder
from transformers import (
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertModel,
    SpeechEncoderDecoderConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder as SpeechEncoderDecoderModel

ENCODER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 4], "conv_stride": [8, 8, 4], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
]
TRANSLATION = "facebook/wav2vec2-xls-r-300m-en-to-15"


def load_dataset(name, configuration, split):
    """The embedded corpus in the place of any other."""
    rows = pyarrow.parquet.read_table(EMBEDDED / f"{split}.parquet").slice(0, 2).to_pylist()
    for row in rows:
        row["audio"]["array"], row["audio"]["sampling_rate"] = soundfile.read(BytesIO(row["audio"]["bytes"]))
    return rows


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders with the names that the documents load: tiny models of the same classes."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    vocabulary = root / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY))
    tokenizer = BertTokenizerFast(str(vocabulary))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    bert = BertForMaskedLM(BertConfig(**DECODER, vocab_size=len(tokenizer)))
    for name in ("google-bert/bert-base-uncased", "bert-base-uncased"):
        bert.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    HubertModel(HubertConfig(**ENCODER)).save_pretrained(root / "facebook/hubert-large-ll60k")
    Wav2Vec2ForCTC(Wav2Vec2Config(**ENCODER)).save_pretrained(root / "facebook/wav2vec2-base-960h")
    extractor.save_pretrained(root / "facebook/wav2vec2-base-960h")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, eos_token_id=1)).save_pretrained(
        root / "gpt2"
    )
    bart = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=30,
    )  # fmt: skip
    BartForConditionalGeneration(bart).save_pretrained(root / "facebook/bart-base")
    translation = SpeechEncoderDecoderModel.from_encoder_decoder_pretrained(
        root / "facebook/wav2vec2-base-960h", root / "bert-base-uncased"
    )
    translation.set_special_tokens(tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    translation.generation_config.max_length = 12
    translation.save_pretrained(root / TRANSLATION)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(root / TRANSLATION)
    return root


@pytest.fixture(autouse=True)
def in_hub(hub, monkeypatch, tmp_path):
    """The working directory, in which each name is a folder; what an example saves lies in a folder of its own."""
    for folder in hub.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)


# --- the documents


def blocks():
    """The code of the pages' blocks, and the places of each; without the output that is shown."""
    places = {}
    for page in sorted((SHARED / "reference").glob("*")):
        for number, text in enumerate(re.findall(r"```\w*\s(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            # a page lost its line ends
            lines = text if "\n" in text.strip() else re.sub(r" (?=>>> |\.\.\. )", "\n", text)
            lines = re.sub(r"^(>>> print\(\w+\)) .*", r"\1", lines, flags=re.MULTILINE)
            examples = doctest.DocTestParser().get_examples(lines)
            code = ast.unparse(ast.parse("".join(each.source for each in examples) if examples else text))
            places.setdefault(code, []).append(f"{page.stem.removeprefix('speech_encoder_decoder_')}-{number}")
    return places


BLOCKS = blocks()


@pytest.fixture
def as_documented(monkeypatch):
    """What the documents import: our model by its name, the corpus, and small configurations as the default ones."""
    datasets = ModuleType("datasets")
    datasets.__spec__, datasets.load_dataset = ModuleSpec("datasets", None), load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    small = {
        "SpeechEncoderDecoderModel": SpeechEncoderDecoderModel,
        "Wav2Vec2Config": partial(Wav2Vec2Config, **ENCODER),
        "BertConfig": partial(BertConfig, **DECODER),
    }
    for name, value in small.items():
        monkeypatch.setattr(f"transformers.{name}", value)


@pytest.mark.usefixtures("as_documented")
@pytest.mark.parametrize("code", BLOCKS, ids=map("+".join, BLOCKS.values()))
def test_every_code_block_of_the_documents_runs_as_it_stands(code, shared):
    names = {}
    exec(code, names)
    model = names["model"]
    assert type(model) is SpeechEncoderDecoderModel
    assert not model.training or "from_pretrained" not in code
    assert any("crossattention" in name for name in model.state_dict())
    if "loss" in names:
        assert learns(model, names["loss"])
    if (written := names.get("generated_ids", names.get("generated"))) is not None:
        assert written[0, 0] == names["processor"].tokenizer.cls_token_id
        assert isinstance(names.get("generated_text", names.get("decoded")), str)


def test_the_documents_are_found(shared):
    expected = ["short-0", *(f"v4.56-{number}" for number in range(7))]
    expected += [f"{page}-{number}" for page in ("with_flax", "zh") for number in range(4)]
    assert sorted(chain(*BLOCKS.values())) == expected


@pytest.mark.parametrize("page", ["2021.rst", "short.md", "with_flax.md", "zh.md"])
def test_what_a_page_lists_of_a_class_is_there(page, shared):
    text = (shared / f"reference/speech_encoder_decoder_{page}").read_text(encoding="utf-8")
    listed = re.findall(r"\[\[autodoc\]\] (\w+)((?:\s+- \w+)*)", text)
    listed += re.findall(r"autoclass:: transformers\.(\w+)\s+:members:([\w, ]*)", text)
    assert {"SpeechEncoderDecoderConfig", "SpeechEncoderDecoderModel"} <= {name for name, _ in listed}
    for name, members in listed:
        kind = {"SpeechEncoderDecoderModel": SpeechEncoderDecoderModel}.get(name) or getattr(transformers, name, None)
        if name.startswith("Flax"):
            continue  # in jax_cases.py
        assert all(callable(getattr(kind, member)) for member in re.findall(r"\w+", members))


def learns(model, loss):
    grads = [model.encoder.get_parameter("feature_projection.projection.weight").grad]
    grads.append(model.decoder.get_parameter("bert.encoder.layer.0.crossattention.self.key.weight").grad)
    return loss.isfinite() and loss > 1 and all(grad is not None and grad.any() for grad in grads)


# --- more of what they describe


def test_two_default_configurations():
    config_encoder = Wav2Vec2Config()
    config_decoder = BertConfig()

    config = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(config_encoder, config_decoder)
    with torch.device("meta"):
        model = SpeechEncoderDecoderModel(config=config)

    assert model.num_parameters() > 200_000_000
    assert model.config.decoder.is_decoder and model.config.decoder.add_cross_attention


@pytest.mark.parametrize("of_objects", [False, True])
def test_a_configuration_saved_and_loaded(of_objects):
    # Initializing a Wav2Vec2 & BERT style configuration
    config_encoder = Wav2Vec2Config(**ENCODER)
    config_decoder = BertConfig(**DECODER)

    if of_objects:
        config = SpeechEncoderDecoderConfig(encoder=config_encoder, decoder=config_decoder)
    else:
        config = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(config_encoder, config_decoder)

    # Initializing a Wav2Vec2Bert model from a Wav2Vec2 & google-bert/bert-base-uncased style configurations
    model = SpeechEncoderDecoderModel(config=config)

    # Accessing the model configuration
    config_encoder = model.config.encoder
    config_decoder = model.config.decoder
    # set decoder config to causal lm
    config_decoder.is_decoder = True
    config_decoder.add_cross_attention = True

    # Saving the model, including its configuration
    model.save_pretrained("my-model")

    # loading model and config from pretrained folder
    encoder_decoder_config = SpeechEncoderDecoderConfig.from_pretrained("my-model")
    loaded = SpeechEncoderDecoderModel.from_pretrained("my-model", config=encoder_decoder_config)

    assert loaded.config.to_dict().keys() >= model.config.to_dict().keys() - {"dtype"}
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert any("crossattention" in name for name in loaded.state_dict())


@pytest.mark.parametrize(
    "decoder", ["google-bert/bert-base-uncased", "bert-base-uncased", "gpt2", "facebook/bart-base"]
)
def test_two_checkpoints(decoder):
    model = SpeechEncoderDecoderModel.from_encoder_decoder_pretrained("facebook/hubert-large-ll60k", decoder)

    saved = HubertModel.from_pretrained("facebook/hubert-large-ll60k").state_dict()
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(saved[name], weight)
    assert not model.training


def test_keywords_with_a_prefix_change_the_parts():
    model = SpeechEncoderDecoderModel.from_encoder_decoder_pretrained(
        "facebook/wav2vec2-base-960h",
        "google-bert/bert-base-uncased",
        encoder_layerdrop=0.0,
        decoder_num_hidden_layers=1,
    )
    assert model.config.encoder.layerdrop == model.encoder.config.layerdrop == 0.0
    assert len(model.decoder.bert.encoder.layer) == 1


@pytest.mark.parametrize("dtype", [{}, {"dtype": "auto"}])
@pytest.mark.parametrize("kind", [SpeechEncoderDecoderModel, AutoModelForSpeechSeq2Seq])
def test_inference(dtype, kind):
    # load a fine-tuned speech translation model and corresponding processor
    model = kind.from_pretrained("facebook/wav2vec2-xls-r-300m-en-to-15", **dtype)
    processor = Wav2Vec2Processor.from_pretrained("facebook/wav2vec2-xls-r-300m-en-to-15")

    # let's perform inference on a piece of English speech (which we'll translate to German)
    ds = load_dataset("hf-internal-testing/librispeech_asr_dummy", "clean", split="validation")
    input_values = processor(ds[0]["audio"]["array"], return_tensors="pt").input_values

    # autoregressively generate transcription (uses greedy decoding by default)
    generated_ids = model.generate(input_values)
    generated_text = processor.batch_decode(generated_ids, skip_special_tokens=True)[0]

    assert generated_ids.shape[0] == 1
    assert generated_ids[0, 0] == processor.tokenizer.cls_token_id
    assert isinstance(generated_text, str)


def test_features_in_the_place_of_audio():
    encoder = tiny_encoder("speech_to_text")
    extractor = feature_extractor_of(encoder)
    model = SpeechEncoderDecoderModel.from_encoder_decoder_pretrained(
        decoder_pretrained_model_name_or_path="google-bert/bert-base-uncased", encoder_model=encoder
    )
    model.set_special_tokens(2, 3, 0)
    ds = load_dataset("hf-internal-testing/librispeech_asr_dummy", "clean", split="validation")
    arrays = [row["audio"]["array"].astype("float32") for row in ds]
    features = extractor(arrays, sampling_rate=extractor.sampling_rate, padding=True, return_tensors="pt")
    assert model.generate(**features, max_new_tokens=3).shape[0] == 2
    alone = model.generate(input_features=features.input_features[:1], max_new_tokens=3)
    assert torch.equal(model.generate(features.input_features[:1], max_new_tokens=3), alone)

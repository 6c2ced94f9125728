"""Errors that Python's callers see: they name arguments, and nothing that only the command line understands."""

import re

import numpy as np
import pytest
import torch
import transformers
from families import TOKENIZER, option_file, tiny_decoder, tiny_encoder
from hydra.utils import get_object
from transformers import BertConfig, BertModel

import sedtrain
from sedtrain.annotations import fits
from sedtrain.config.schema import conf_dir
from sedtrain.config.signatures import read_signature
from sedtrain.data.augmentations import ColouredNoise, Gain, RecordedNoise, Reverb, Speed, TimeMask
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.transcriber import Model, decoding_options
from sedtrain.errors import UserError
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.models.adapter import ConvAdapter, QFormerAdapter, TransformerAdapter, saved_adapter, stock_projection
from sedtrain.models.decoder import load_decoder, new_decoder
from sedtrain.models.encoder import encoder_from_config, load_encoder
from sedtrain.models.losses import LossWeights
from sedtrain.models.parts import Execution
from sedtrain.models.saved import join
from sedtrain.text.normalizers import normalizer
from sedtrain.text.tags import Tags
from sedtrain.text.tokenizers import train_tokenizer
from sedtrain.training.finetune import FineTuning, LoRA
from sedtrain.training.optim import tri_stage

HYDRA = re.compile(
    r"\b(encoder|decoder)\.(options|checkpoint|model_type|attention)\b"
    r"|\b(adapter|data|decoding|finetune|loss|metrics|optimizer|scheduler|tokenizer|trainer)\.[a-z]\w*\b(?!\.\w)"
    r"|\b(adapter|augment|callbacks|data|decoding|finetune|loss|optimizer|scheduler|strategy|task)=[a-z]"
    r"|(^|\s)\+{1,2}\w[\w.]*=|=(true|false|null)\b|=[\[{][a-z]"
)
UNQUOTED = re.compile(r"\w=[a-z]")  # a value in a remedy
COLUMNS = {"audio": "audio", "transcription": "text"}
TEXTS = ["one two", "three"]


@pytest.fixture(scope="module")
def model():
    encoder, decoder = tiny_encoder("hubert"), tiny_decoder("bert")
    saved = join(encoder, decoder, lambda *widths: None, TOKENIZER)
    return Model(saved.model, saved.tokenizer, saved.feature_extractor)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Folders of an encoder, a joined model, an unfinished run, none of these, and of an encoder that asks for code."""
    root = tmp_path_factory.mktemp("folders")
    model.model.encoder.save_pretrained(root / "encoder")
    model.model.decoder.save_pretrained(root / "decoder")
    model.save(root / "joined", {})
    (root / "run").mkdir()
    (root / "run/config.yaml").write_text("seed: 1")
    (root / "empty").mkdir()
    (root / "peft").mkdir()
    (root / "peft/adapter_config.json").write_text("{}")
    (root / "code").mkdir()
    (root / "code/config.json").write_text('{"auto_map": {"AutoModel": "a.B"}, "model_type": "hubert"}')
    return root


def hubert(**options):
    return load_encoder(**{**option_file("encoder", "hubert"), **options})


def bert(**options):
    return load_decoder(TOKENIZER, **{**option_file("decoder", "bert"), **options})


PRETRAINED = sedtrain.SpeechEncoderDecoder.from_encoder_decoder_pretrained
OF_FOLDERS = {
    "load_nothing": lambda at: sedtrain.load("/no/such/folder"),
    "load_empty": lambda at: sedtrain.load(at / "empty"),
    "load_encoder": lambda at: sedtrain.load(at / "encoder"),
    "load_decoder": lambda at: sedtrain.load(at / "decoder"),
    "load_run": lambda at: sedtrain.load(at / "run"),
    "load_peft": lambda at: sedtrain.load(at / "peft"),
    "load_code": lambda at: sedtrain.load(at / "code"),
    "encoder_code": lambda at: PRETRAINED(str(at / "code"), str(at / "decoder")),
    "encoder_attention": lambda at: PRETRAINED(
        str(at / "encoder"), str(at / "decoder"), encoder_attn_implementation="x"
    ),
    "flex": lambda at: PRETRAINED(
        str(at / "encoder"), str(at / "decoder"), decoder_attn_implementation="flex_attention"
    ),
    "of_no_folder": lambda at: hubert(checkpoint="/no/such/folder"),
    "of_joined": lambda at: hubert(checkpoint=str(at / "joined")),
    "of_other_family": lambda at: hubert(checkpoint=str(at / "decoder")),
    "of_empty": lambda at: bert(checkpoint=str(at / "empty")),
    "path": lambda at: SpeechTextDataModule(str(at / "empty"), COLUMNS).corpus.refuse_unusable(["train"]),
}
OF_MODELS = {
    "no_audio": lambda model: model.transcribe("/no/such/file.wav"),
    "rate": lambda model: model.transcribe(np.zeros(99)),
    "channels": lambda model: model.transcribe(np.zeros((99, 2)), sampling_rate=16000),
    "unknown": lambda model: model.transcribe("a.wav", num_beam=2),
    "sample": lambda model: model.transcribe("a.wav", do_sample="no"),
    "untagged": lambda model: model.transcribe("a.wav", language="de"),
    "target": lambda model: model.transcribe("a.wav", target="translate"),
    "without_ctc": lambda model: model.transcribe("a.wav", search="joint"),
    "tags": lambda model: Tags({"transcribe": {"de": [7, 8]}}).of("fr", "transcribe"),
    "frozen": lambda model: FineTuning(frozen=["encoder", "decoder", "cross_attention"]).prepare(model.model),
    "no_part": lambda model: FineTuning(frozen=["tail"]).prepare(model.model),
    "thaw": lambda model: FineTuning(thaw={"encoder": 5, "decoder": 5, "cross_attention": 5}).prepare(model.model),
    "lora": lambda model: LoRA(targets=["layer_norms"]).prepare(model.model),
    "compile": lambda model: Execution(backend="eager").prepare(Plain()),
    "recompute": lambda model: Execution(True).prepare(Plain()),
    "labels": lambda model: model.model(torch.zeros(1, 8000), labels=torch.ones(1, 999, dtype=torch.long)),
}
ALONE = {
    "search": lambda: DecodingOptions(search="viterbi"),
    "sampled_joint": lambda: DecodingOptions(search="joint", do_sample=True),
    "speculative_beams": lambda: DecodingOptions(search="speculative", num_beams=2),
    "returned": lambda: DecodingOptions(num_return_sequences=3),
    "temperature": lambda: decoding_options({"temperature": 0}),
    "conv_stride": lambda: ConvAdapter(8, 8, stride=3),
    "conv_type": lambda: ConvAdapter(8, 8, stride="2"),
    "heads": lambda: TransformerAdapter(8, 8, num_heads=3),
    "window": lambda: QFormerAdapter(8, 8, window=0),
    "stock": lambda: stock_projection(8, 9, False),
    "adapter_kind": lambda: saved_adapter("unheard", 8, 8, {}),
    "adapter_settings": lambda: saved_adapter("conv", 8, 8, {"width": 3}),
    "speed": lambda: Speed(factors=[3.0]),
    "speed_type": lambda: Speed(factors="fast"),
    "gain": lambda: Gain(gain_db=[6, -6]),
    "colours": lambda: ColouredNoise(colours=[]),
    "colour": lambda: ColouredNoise(colours=["grey"]),
    "recordings": lambda: RecordedNoise(path="/no/such/folder"),
    "rooms": lambda: Reverb(folder="/no/such/folder"),
    "masks": lambda: TimeMask(num_masks=0),
    "hidden_size": lambda: hubert(options={"hidden_size": 0}),
    "no_option": lambda: hubert(options={"hiden_size": 8}),
    "uneven": lambda: bert(options={"num_attention_heads": 5}),
    "trial": lambda: bert(options={"chunk_size_feed_forward": 7}),
    "memory": lambda: bert(options={"hidden_size": 10**10}),
    "size": lambda: hubert(size="huge"),
    "pretrained": lambda: hubert(pretrained="no"),
    "own_adapter": lambda: load_encoder(**{**option_file("encoder", "whisper"), "options": {"add_adapter": True}}),
    "spec_augment": lambda: load_encoder(**{**option_file("encoder", "whisper"), "options": {"mask_time_prob": 0.1}}),
    "no_encoder": lambda: encoder_from_config(BertConfig()),
    "broken_decoder": lambda: new_decoder(transformers.ProphetNetConfig()),
    "languages": lambda: new_decoder(transformers.XmodConfig(languages=["a", "b"])),
    "no_decoder": lambda: sedtrain.SpeechEncoderDecoder(
        encoder=tiny_encoder("hubert"), decoder=BertModel(BertConfig(**SMALL))
    ),
    "not_attending": lambda: sedtrain.SpeechEncoderDecoder(
        encoder=tiny_encoder("hubert"), decoder=transformers.BertLMHeadModel(BertConfig(**SMALL))
    ),
    "no_dataset": lambda: SpeechTextDataModule(None, COLUMNS),
    "role": lambda: SpeechTextDataModule("a", {**COLUMNS, "sound": "x"}),
    "needed_column": lambda: SpeechTextDataModule("a", {"audio": "audio"}),
    "temperature_of_stream": lambda: SpeechTextDataModule("a", COLUMNS, streaming=True, temperature=2.0),
    "buckets": lambda: SpeechTextDataModule("a", COLUMNS, batches=[{"seconds": 1}]),
    "limits": lambda: SpeechTextDataModule("a", COLUMNS, min_seconds=3.0, max_seconds=2.0),
    "characters": lambda: SpeechTextDataModule("a", COLUMNS, min_characters=3, max_characters=2),
    "mix": lambda: SpeechTextDataModule(None, COLUMNS, mix={"a": {"weight": 0}}),
    "data_types": lambda: SpeechTextDataModule("a", COLUMNS, streaming="no", target="text"),
    "no_file": lambda: SpeechTextDataModule("/no/such/folder", COLUMNS).corpus.refuse_unusable(["train"]),
    "no_texts": lambda: train_tokenizer([], "char", 50),
    "many_characters": lambda: train_tokenizer(["abcdef"], "char", 4),
    "kind": lambda: train_tokenizer(TEXTS, "word", 50),
    "normalizer": lambda: normalizer("lower"),
    "metric": lambda: MetricSet(["wre"]),
    "rates": lambda: FineTuning(learning_rates={"tail": 1.0}),
    "frozen_type": lambda: FineTuning(frozen="encoder"),
    "decay": lambda: FineTuning(layer_decay=2),
    "loss": lambda: LossWeights(label_smoothing=7),
    "scheduler": lambda: tri_stage(None, 10, 0.9, 0.9),
}
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}


class Plain(torch.nn.Module):
    """A joined model of parts without layers."""

    config = BertConfig()

    def get_submodule(self, name):
        return self


TARGETS = {
    name
    for file in conf_dir().rglob("*.yaml")
    for name in re.findall(r"_target_: (sedtrain\.\S+)", file.read_text("utf-8"))
}
FOR_RUNS_ALONE = {
    "Checkpoints",
    "FullySharded",
    "MetricsFile",
    "ProgressBar",
    "StopOnInterrupt",
    "TensorBoard",
    "Wandb",
}


def speaks_python(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert HYDRA.search(text) is None, text
    for error in caught.value.errors:
        remedy = error.entry().partition(f"{error.wrong.splitlines()[-1]}\n")[2]
        assert remedy and ("python -m sedtrain" in remedy or UNQUOTED.search(remedy) is None), remedy


@pytest.fixture(autouse=True)
def called_from_python(monkeypatch):
    monkeypatch.setattr(UserError, "on_command_line", False)


@pytest.mark.parametrize("name", ALONE)
def test_errors_of_constructors_and_functions_name_arguments(name):
    speaks_python(ALONE[name])


@pytest.mark.parametrize("name", OF_MODELS)
def test_errors_of_models_name_arguments(name, model):
    speaks_python(OF_MODELS[name], model)


@pytest.mark.parametrize("name", OF_FOLDERS)
def test_errors_of_folders_name_arguments(name, folders):
    speaks_python(OF_FOLDERS[name], folders)


def test_every_class_and_function_that_takes_options_checks_their_types():
    """The value fits no plain type; arguments without a default are None."""
    number = 0
    for target in sorted(name for name in TARGETS if name.rpartition(".")[2] not in FOR_RUNS_ALONE):
        parameters = [each for each in read_signature(target).parameters.values() if each.annotation is not each.empty]
        needed = {each.name: None for each in parameters if each.default is each.empty}
        for each in parameters:
            if not fits([{}], each.annotation):
                with pytest.raises(UserError) as caught:
                    get_object(target)(**{**needed, each.name: [{}]})
                assert any(f".{each.name}" in f".{error.option}" for error in caught.value.errors), (target, each)
                number += 1
    assert number > 100

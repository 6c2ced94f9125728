"""Every option file of conf/, found by walking the folder."""

import re
from itertools import cycle, zip_longest
from typing import NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from corpora import wav
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sedtrain.config.check import find_problems
from sedtrain.config.hydra_calls import create
from sedtrain.config.schema import conf_dir, register

FILES = sorted(path for path in conf_dir().glob("*/*.yaml"))
CHOICES = [(path.parent.name, path.stem) for path in FILES]
PARTS = [(group, name) for group, name in CHOICES if group in ("encoder", "decoder")]
LOCAL = ("folder", "gigaspeech", "manifest", "parquet", "webdataset")
UNSET = "no value is given"
INCOMPLETE = {
    **{("data", name): ("data.path", UNSET) for name in LOCAL},
    **{
        ("experiment", name): ("data.path", UNSET)
        for name in ("artikulate", "connected_digits", "whisper_finetune", "your_own_folder")
    },
    ("augment", "recorded_noise"): ("augment.recorded_noise.path", UNSET),
    ("augment", "reverb"): ("augment.reverb.folder", UNSET),
    **{
        ("callbacks", name): ("callbacks.checkpoints", "this callback is required: it saves the best weights")
        for name in ("average", "ema")
    },
}
FAMILIES = {
    "encoder": [
        "data2vec", "hubert", "moonshine", "parakeet", "seamless_m4t", "seamless_m4t_v2", "sew", "sew_d", "speech_to_text",
        "speecht5", "unispeech", "unispeech_sat", "w2v_bert", "wav2vec2", "wav2vec2_conformer", "wavlm", "whisper",
        "xls_r",
    ],
    "decoder": [
        "bart", "bert", "bert_generation", "blenderbot", "blenderbot_small", "byt5", "camembert", "canary",
        "cohere_asr", "data2vec_text", "electra", "ernie", "gemma3", "gpt2", "gpt_neo", "llama", "m2m_100", "marian",
        "mbart", "mistral", "moonshine", "mt5", "nllb", "opt", "pegasus", "plbart", "qwen3", "rembert", "roberta",
        "seamless_m4t", "seamless_m4t_v2", "smollm3", "speech_to_text", "speech_to_text_2", "t5", "t5gemma", "trocr",
        "whisper", "xglm",
        "xlm_roberta", "xmod",
    ],
}  # fmt: skip
ONLY_INSIDE_OTHERS = {"speech_to_text_2", "trocr"}  # published as halves of joined models
PUBLISHED = {
    "hubert": "facebook/hubert-base-ls960",
    "wav2vec2": "facebook/wav2vec2-base",
    "xls_r": "facebook/wav2vec2-xls-r-300m",
    "wavlm": "microsoft/wavlm-base-plus",
    "w2v_bert": "facebook/w2v-bert-2.0",
    "whisper": "openai/whisper-base",
    "bert": "google-bert/bert-base-uncased",
    "gpt2": "openai-community/gpt2",
    "bart": "facebook/bart-base",
    "mbart": "facebook/mbart-large-50",
}
PAIRS = list(zip(cycle(FAMILIES["encoder"]), FAMILIES["decoder"], strict=False))  # there are more decoders
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def composed(*overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [*overrides, "run_dir=run"])


def defaults():
    """The defaults list as (group, option), options that are no choice of a group as (name, None)."""
    entries = yaml.safe_load((conf_dir() / "train.yaml").read_text())["defaults"]
    return [next(iter(entry.items())) if isinstance(entry, dict) else (entry, None) for entry in entries]


def test_the_walk_finds_the_options():
    assert len(CHOICES) >= 40
    shared = {"data_settings", "decoder_settings", "encoder_settings", "encoder_waveform_settings"}
    assert {each.stem for each in conf_dir().glob("*.yaml")} == {"train"} | shared
    assert len(list(conf_dir().glob("*/*.yaml"))) == len(CHOICES)
    assert {group for group, _ in CHOICES} == {each.name for each in conf_dir().iterdir() if each.is_dir()} - {"hydra"}


def together():
    """Every option but those of encoders and decoders, one of each group at a time; an experiment alone."""
    groups = {}
    for each in CHOICES:
        if each not in PARTS:
            groups.setdefault(each[0], []).append(each)
    alone = [[each] for each in groups.pop("experiment")]
    return alone + [[each for each in row if each] for row in zip_longest(*groups.values())]


@pytest.mark.parametrize("options", together(), ids=lambda options: " ".join(sorted(map("/".join, options))))
def test_every_option_composes_without_a_problem(options):
    problems = find_problems(composed(*map("=".join, options)))
    expected = [INCOMPLETE[each] for each in options if each in INCOMPLETE]
    assert sorted((each.option, each.wrong) for each in problems) == sorted(expected)


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
@pytest.mark.parametrize(("encoder", "decoder"), PAIRS, ids=map("-".join, PAIRS))
def test_every_family_composes_at_every_size(encoder, decoder, size):
    config = composed(f"encoder={encoder}", f"decoder={decoder}")
    config.size = size
    assert find_problems(config) == []
    assert config.encoder.size == config.decoder.size == size


def test_every_group_has_its_line_in_the_table_of_contents():
    groups = [
        group for group, _ in defaults() if not group.startswith("override") and group not in ("schema", "_self_")
    ]
    assert sorted(groups) == sorted({group for group, _ in CHOICES})
    assert all(option is None or (group, option) in CHOICES for group, option in defaults() if group in groups)


def test_the_schema_is_first_and_an_experiment_has_the_last_word():
    names = [name for name, _ in defaults() if not name.startswith("override")]
    assert names[:2] == ["schema", "_self_"]
    assert names[-1] == "experiment"
    config = composed("experiment=translate_digits")
    assert (config.target, config.data.target) == ("translation", "translation")
    assert composed("experiment=connected_digits", "data.path=x").data.columns.id == "utt_id"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_option_says_what_it_is_on_top(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(next(line for line in lines if not line.startswith("# @package")).removeprefix("# ")) > 8
    assert all(line.startswith("# ") for line in lines[:1])


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "experiment"])
def test_every_experiment_opens_with_its_command(name):
    text = (conf_dir() / f"experiment/{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n# ")
    assert f"#   python -m sedtrain experiment={name}" in text


def test_every_family_is_there():
    for group, names in FAMILIES.items():
        assert [name for each, name in PARTS if each == group] == names


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS, ids=map("-".join, PAIRS))
def test_every_family_has_a_tiny_member_and_names_published_ones(encoder, decoder):
    config = composed(f"encoder={encoder}", f"decoder={decoder}")
    for group, name in {"encoder": encoder, "decoder": decoder}.items():
        family = OmegaConf.to_container(config[group])
        assert family["tiny"]
        published = [family[size] for size in ("base", "large") if family[size] is not None]
        assert bool(published) is (name not in ONLY_INSIDE_OTHERS)
        assert all(HUB_ID.fullmatch(each) for each in published)
        assert family["base"] == PUBLISHED.get(name, family["base"])


def test_tiny_is_the_default_and_a_part_follows_the_root():
    config = composed()
    assert [config.size, config.encoder.size, config.decoder.size] == ["tiny"] * 3
    assert composed("attention=eager").decoder.attention == "eager"
    assert composed("pretrained=false").encoder.pretrained is False
    assert composed("seed=7").data.seed == 7


# --- datasets of the Hub


class Card(NamedTuple):
    """The columns of a published dataset beside its audio, with their types, and two rows of them.

    name: of its configuration
    splits: those that the option reads
    expected: text, id, speaker and language of the first row; None: the id is made from split and number
    rate: of the audio
    """

    name: str
    features: dict[str, str]
    rows: list[tuple]
    splits: tuple[str, str, str]
    expected: tuple[str, str | None, object, str | None]
    target: str = "transcription"
    rate: int = 16_000


LIBRISPEECH = {"file": "string", "text": "string", "speaker_id": "int64", "chapter_id": "int64", "id": "string"}
SPOKEN = [("374-0000.flac", "CHAPTER ONE", 374, 180298, "374-180298-0000"), ("2.flac", "TWO", 26, 495, "26-495-0001")]
READ = ("CHAPTER ONE", "374-180298-0000", "374", None)
ALL_TRAIN = "train.clean.100+train.clean.360+train.other.500"
COVOST = {"client_id": "string", "file": "string", "sentence": "string", "translation": "string", "id": "string"}
TRANSLATED = [("c1", "a.mp3", "Good day.", "Guten Tag.", "common_voice_en_1"), ("c2", "b.mp3", "Two.", "Zwei.", "cv_2")]
USUAL = ("train", "validation", "test")
CARDS = {
    "librispeech_100h": Card("clean", LIBRISPEECH, SPOKEN, ("train.100", "validation", "test"), READ),
    "librispeech_960h": Card("all", LIBRISPEECH, SPOKEN, (ALL_TRAIN, "validation.clean", "test.clean"), READ),
    "common_voice": Card(
        "en",
        {"client_id": "string", "path": "string", "sentence": "string", "up_votes": "int64", "down_votes": "int64",
         "age": "string", "gender": "string", "accent": "string", "locale": "string", "segment": "string",
         "variant": "string"},
        [("c1", "a.mp3", "Good day.", 2, 0, "", "", "", "en", "", ""), ("c1", "b.mp3", "Two.", 3, 1, "", "", "", "en", "", "")],
        USUAL, ("Good day.", None, "c1", "en"), rate=48_000,
    ),
    "fleurs": Card(
        "en_us",
        {"id": "int32", "num_samples": "int32", "path": "string", "transcription": "string", "raw_transcription": "string",
         "gender": "int64", "lang_id": "int64", "language": "string", "lang_group_id": "int64"},
        [(7, 8000, "a.wav", "good day", "Good day.", 0, 19, "English", 0),
         (7, 8000, "b.wav", "good day", "Good day.", 1, 19, "English", 0)],
        USUAL, ("good day", None, None, None),
    ),
    "covost2": Card("en_de", COVOST, TRANSLATED, USUAL, ("Good day.", "common_voice_en_1", "c1", None), rate=48_000),
    "covost2, translated": Card(
        "en_de", COVOST, TRANSLATED, USUAL, ("Guten Tag.", "common_voice_en_1", "c1", None), "translation", 48_000
    ),
    "mls": Card(
        "german",
        {"original_path": "string", "begin_time": "float64", "end_time": "float64", "transcript": "string",
         "audio_duration": "float64", "speaker_id": "string", "chapter_id": "string", "file": "string", "id": "string"},
        [("u", 331.8, 332.3, "guten tag", 0.5, "4800", "10003", "a.opus", "4800_10003_000000"),
         ("u", 340.0, 340.5, "zwei", 0.5, "4800", "10003", "b.opus", "4800_10003_000001")],
        ("train", "dev", "test"), ("guten tag", "4800_10003_000000", "4800", None),
    ),
    "voxpopuli": Card(
        "en",
        {"audio_id": "string", "language": "int64", "raw_text": "string", "normalized_text": "string",
         "gender": "string", "speaker_id": "string", "is_gold_transcript": "bool", "accent": "string"},
        [("20180206-en_1", 0, "", "good day", "female", "96718", True, "None"),
         ("20180206-en_2", 0, "Two.", "two", "male", "1", True, "None")],
        USUAL, ("good day", "20180206-en_1", "96718", None),
    ),
}  # fmt: skip


def publish(folder, card):
    """Writes a dataset as the Hub stores it: Parquet with the types of `datasets`, and a card that names splits."""
    types = {column: datasets.Value(each) for column, each in card.features.items()}
    schema = datasets.Features({**types, "audio": datasets.Audio(sampling_rate=card.rate)}).arrow_schema
    files = []
    (folder / "data").mkdir(parents=True)
    for place, split in [each for own in card.splits for each in enumerate(own.split("+"))]:
        rows = [
            dict(zip(card.features, row, strict=True), audio={"bytes": wav(0.5, rate=card.rate), "path": "x.wav"})
            for row in card.rows
        ]
        if place:  # of splits that are joined
            rows = [{**row, "id": f"{row['id']}-{place}"} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / f"data/{split}.parquet")
        files.append({"split": split, "path": f"data/{split}.parquet"})
    config = yaml.safe_dump({"configs": [{"config_name": card.name, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{config}---\n")


def spread(folder, name):
    """Moves the files to where the Hub's conversion to Parquet has them: CONFIGURATION/SPLIT/0000.parquet."""
    for file in (folder / "data").iterdir():
        (folder / name / file.stem).mkdir(parents=True)
        file.rename(folder / name / file.stem / "0000.parquet")


def test_every_dataset_of_the_hub_has_its_card():
    paths = {
        path.stem: yaml.safe_load(path.read_text()).get("path") or "" for path in FILES if path.parent.name == "data"
    }
    of_hub = {name for name, path in paths.items() if HUB_ID.fullmatch(path) or path.startswith("hf://")}
    assert of_hub == {each.partition(",")[0] for each in CARDS}


@pytest.mark.parametrize("name", CARDS)
def test_a_dataset_of_the_hub_is_read_by_its_option(name, tmp_path, monkeypatch):
    """Our options against the columns of the cards above and of code that reads the copies, looked up in November 2026."""
    monkeypatch.chdir(tmp_path)
    card, option = CARDS[name], name.partition(",")[0]
    path = tmp_path / name.replace(", ", "_")
    hub_path = composed(f"data={option}").data.path
    is_pattern = hub_path.startswith("hf://")
    local = f"file://{path}/{hub_path.partition('parquet/')[2]}" if is_pattern else path
    config = composed(f"data={option}", f'data.path="{local}"', f"data.target={card.target}")
    publish(path, card)
    if is_pattern:
        spread(path, card.name)
    corpus = create(config, "data").corpus
    text, id, speaker, language = card.expected
    for split, own in zip(USUAL, card.splits, strict=True):
        num_files = own.count("+") + 1
        [rows] = corpus.parts(split)
        assert corpus.kept(split).seconds.tolist() == [0.5] * 2 * num_files
        read = rows.utterance(0, 16_000)
        first = "0000-0" if is_pattern else f"{own}-0"
        assert (read.text, read.id, read.speaker, read.language) == (text, id or first, speaker, language)
        assert (read.sampling_rate, read.seconds) == (16_000, 0.5)


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        ([], "00:00:08:00"), (["data=mix"], "00:00:08:00"), (["trainer.max_time=00:01:00:00", "size=base"], "00:01:00:00"),
        (["data=parquet", "data.path=/mine"], None), (["data=folder"], None), (["data.path=/mine"], None),
        (["data=mix", "data.mix.german.path=/mine"], None), (["size=base"], None), (["encoder.checkpoint=/mine"], None),
    ],
)  # fmt: skip
def test_the_time_limit_of_the_demo_is_that_of_nothing_else(overrides, limit):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("train", overrides).trainer.max_time == limit

"""Several datasets as one: each as it is stored, in the share of an epoch that it was given, through training."""

from collections import Counter
from math import ceil, floor

import pytest
from corpora import COLUMNS, NUMBERS, STREAMED, fit, mix_module, refused

from sedtrain.data.corpus import temperature_weights
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.data.paths import absolute_path, public_name
from sedtrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

SIZES = {"parquet": 6, "manifest": 9, "hub": 4}


def weighted(mix, *weights):
    return {name: {**mix[name], "weight": weight} for name, weight in zip(mix, weights, strict=True)}


def epochs(data, number):
    """The ids of each epoch."""
    loader = data.train_dataloader()
    for epoch in range(number):
        data.train_batches.set_epoch(epoch)
        yield [id for batch in loader for id in batch.ids]


def names(ids):
    return Counter(id.partition("/")[0] for id in ids)


both = pytest.mark.parametrize("options", [{}, STREAMED], ids=["whole", "streamed"])


@both
def test_without_weights_every_utterance_of_each_is_seen_once_an_epoch(datasets_of, tmp_path, options):
    data = mix_module(tmp_path, datasets_of, **options)
    first, second = epochs(data, 2)
    assert names(first) == SIZES
    assert len(set(first)) == sum(SIZES.values())
    assert sorted(first) == sorted(second)
    assert first != second
    assert data.corpus.has_length() is not bool(options)


@both
def test_each_has_its_own_columns_splits_target_language_and_folder(datasets_of, tmp_path, options):
    data = mix_module(tmp_path, datasets_of, **options)
    texts = {id: text for batch in data.train_dataloader() for id, text in zip(batch.ids, batch.texts, strict=True)}
    assert sorted(text for id, text in texts.items() if id.startswith("parquet/")) == sorted(
        ["eins", "zwei", "drei", "vier", "eins", "zwei"]
    )
    assert {id: text for id, text in texts.items() if id.startswith("manifest/")} == {
        f"manifest/n{i}": NUMBERS[i] for i in range(9)
    }
    assert {text for id, text in texts.items() if id.startswith("hub/")} == {"one", "two", "three", "four"}
    whole = mix_module(tmp_path, datasets_of).split("train")
    read = [whole.read(reference) for reference in whole.kept[["part", "row"]].tolist()]
    kinds = Counter((each.id.partition("/")[0], each.language, each.task) for each in read)
    assert kinds == {
        ("parquet", "de", "translate"): 6,
        ("manifest", "en", "transcribe"): 9,
        ("hub", "fr", "transcribe"): 1,
        ("hub", "it", "transcribe"): 1,
        ("hub", "es", "transcribe"): 2,
    }


@both
def test_weights_are_how_often_an_utterance_is_seen_in_an_epoch(datasets_of, tmp_path, options):
    weights = dict(zip(SIZES, (2, 0.5, 1 / 3), strict=True))
    seen = Counter()
    for number, ids in enumerate(
        epochs(mix_module(tmp_path, weighted(datasets_of, *weights.values()), **options), 6), 1
    ):
        seen.update(ids)
        for name, weight in weights.items():
            times = [count for id, count in seen.items() if id.startswith(f"{name}/")]
            assert set(times) <= {floor(number * weight), ceil(number * weight)}
            assert abs(sum(times) - number * weight * SIZES[name]) <= 1
    assert len(seen) == sum(SIZES.values())


@pytest.mark.parametrize("temperature", [2.0, 5.0, 0.5, 1e9])
def test_a_temperature_makes_shares_of_powers_of_the_sizes(datasets_of, tmp_path, temperature):
    num_epochs = 4
    seen = Counter()
    for ids in epochs(mix_module(tmp_path, datasets_of, temperature=temperature), num_epochs):
        seen.update(names(ids))
        assert abs(len(ids) - sum(SIZES.values())) <= len(SIZES)
    powers = {name: size ** (1 / temperature) for name, size in SIZES.items()}
    for name, power in powers.items():
        assert abs(seen[name] - num_epochs * sum(SIZES.values()) * power / sum(powers.values())) <= 1


def test_temperature_one_is_the_concatenation_and_a_weight_comes_on_top(datasets_of, tmp_path):
    assert temperature_weights([6, 9, 4], 1.0) == pytest.approx([1, 1, 1])
    [ids] = epochs(mix_module(tmp_path, weighted(datasets_of, 2, 1, 1), temperature=1e9), 1)
    share = sum(SIZES.values()) / 3
    for name, wanted in {"parquet": 2 * share, "manifest": share, "hub": share}.items():
        assert abs(names(ids)[name] - wanted) <= 1


@both
def test_validation_and_test_are_the_concatenation_whatever_the_weights(datasets_of, tmp_path, options):
    data = mix_module(tmp_path, weighted(datasets_of, 3, 0.1, 1), **options)
    for split, sizes in {"validation": (2, 3, 2), "test": (1, 2, 2)}.items():
        ids = [id for batch in data.batches(split) for id in batch.ids]
        assert names(ids) == dict(zip(SIZES, sizes, strict=True))
        assert len(set(ids)) == len(ids)


@both
def test_a_dataset_may_lack_a_split(datasets_of, tmp_path, options):
    datasets_of["hub"] |= {"validation_split": None, "test_split": None}
    datasets_of["parquet"] |= {"train_split": None}
    data = mix_module(tmp_path, datasets_of, **options)
    assert names(*epochs(data, 1)) == {"manifest": 9, "hub": 4}
    assert names(id for batch in data.batches("validation") for id in batch.ids) == {"parquet": 2, "manifest": 3}


@both
def test_texts_are_of_all_of_them(datasets_of, tmp_path, options):
    texts = Counter(mix_module(tmp_path, datasets_of, **options).texts("train"))
    assert texts == Counter(["eins", "zwei", "drei", "vier", "eins", "zwei", *NUMBERS, "one", "two", "three", "four"])


# --- what is refused


@pytest.mark.parametrize(
    ("options", "name", "value", "wrong", "write"),
    [
        (
            {"wieght": 2}, "wieght", 2, "there is no such option",
            "NAME, NAME one of path, name, format, audio_folder, columns, target, language, weight, train_split, "
            "validation_split, test_split",
        ),
        ({"path": None}, "path", None, "no dataset is named", "path=FOLDER_OR_FILE_OR_HUB_ID"),
        *[
            ({"weight": weight}, "weight", weight, "this has to be a number above 0", "weight=NUMBER, a number above 0")
            for weight in (0, -1.0, "half", True, float("nan"), float("inf"))
        ],
        ({"target": "summary"}, "target", "summary", "there is no such target", "target=ONE_OF transcription, translation"),
        ({"language": False}, "language", False, "this is no text", "language in quotes, as YAML reads no and on as values"),
        (
            {"columns": {"speeker": "s"}}, "columns.speeker", "s", "there is no such role",
            "columns.NAME, NAME one of audio, transcription, translation, id, speaker, language, seconds, start, end",
        ),
        (
            {"target": "translation", "columns": {"translation": None}}, "columns.translation", None,
            "target=translation needs this column", "columns.translation=COLUMN",
        ),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_by_its_name(options, name, value, wrong, write):
    with pytest.raises(UserError) as raised:
        SpeechTextDataModule(None, COLUMNS, mix={"a": {"path": "x", **options}})
    assert raised.value.args == (f"data.mix.a.{name}", value, wrong, f"write data.mix.a.{write}")


def test_a_temperature_of_streams_is_refused():
    assert refused(SpeechTextDataModule, None, COLUMNS, mix={"a": {"path": "x"}}, temperature=2.0, streaming=True) == (
        "1 problem:\n\n  data.temperature = 2.0\n    the sizes of streamed datasets, which it needs, are not known\n"
        "    write data.mix.NAME.weight of each dataset, or data.streaming=false"
    )


def test_neither_path_nor_mix_is_refused():
    assert refused(SpeechTextDataModule, None, COLUMNS) == (
        "1 problem:\n\n  data.path = null\n    no dataset is named\n"
        "    write data.path=FOLDER_OR_FILE_OR_HUB_ID, or data.mix"
    )


@both
def test_one_without_the_split_is_named(datasets_of, tmp_path, options):
    datasets_of["parquet"]["validation_split"] = "held_out"
    message = refused(mix_module(tmp_path, datasets_of, **options).corpus.refuse_unusable, ["train", "validation"])
    assert f"{tmp_path}/parquet" in message
    assert "held_out" in message


@both
def test_a_split_that_no_dataset_has_is_refused(datasets_of, tmp_path, options):
    for source in datasets_of.values():
        source["train_split"] = None
    message = refused(mix_module(tmp_path, datasets_of, **options).corpus.refuse_unusable, ["train"])
    assert message == (
        "1 problem:\n\n  data.mix = ???\n    no dataset of it has a train split\n"
        "    write data.mix.NAME.train_split=SPLIT of one"
    )


def test_one_without_a_column_is_named(datasets_of, tmp_path):
    datasets_of["manifest"]["columns"]["transcription"] = "spoken"
    message = refused(mix_module(tmp_path, datasets_of).corpus.refuse_unusable, ["train"])
    assert (
        f"data.columns = 'spoken'\n    {tmp_path}/manifest (train) has no column 'spoken' for the text, it has file, said, name"
        in message
    )


def test_nothing_usable_in_any_names_them_all(datasets_of, tmp_path):
    message = refused(mix_module(tmp_path, datasets_of, min_seconds=20).corpus.refuse_unusable, ["train"])
    everywhere = " + ".join(source["path"] for source in datasets_of.values())
    assert everywhere[:50] in message
    assert "none of the 19 utterances of 'learn' can be used (19 too short)" in message


# --- trained


@both
@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 0.5, 1)])
def test_a_trainer_sees_what_the_weights_say_and_validates_on_all(datasets_of, tmp_path, weights, options):
    seen = fit(mix_module(tmp_path, weighted(datasets_of, *weights), **options), 2)
    ids = Counter(names(id for _, *batch in seen.trained for id, _ in batch))
    assert ids == {name: 2 * weight * size for (name, size), weight in zip(SIZES.items(), weights, strict=True)}
    assert names(id for _, *batch in seen.validated for id, _ in batch) == {"parquet": 4, "manifest": 6, "hub": 4}


# --- named from elsewhere


@pytest.mark.parametrize("path", ["https://host/a/{split}-{000..001}.tar", "hf://datasets/who/what/*.parquet"])
def test_a_url_is_the_same_from_any_folder_and_for_any_reader(path, tmp_path):
    assert absolute_path(path) == public_name(path) == path
    assert mix_module(tmp_path, {"a": {"path": path}}).corpus.public_name == path


def test_a_mix_is_named_after_its_datasets(datasets_of, tmp_path):
    datasets_of["again"] = datasets_of["hub"]
    assert mix_module(tmp_path, datasets_of).corpus.public_name == "parquet + manifest + hub"

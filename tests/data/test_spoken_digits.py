import importlib.util
import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "sedtrain/data/spoken_digits"
sys.path.insert(0, str(ROOT / "tools"))
import spoken_digits as spoken  # noqa: E402

TRANSLATION = {
    "zero": "null", "one": "eins", "two": "zwei", "three": "drei", "four": "vier",
    "five": "fünf", "six": "sechs", "seven": "sieben", "eight": "acht", "nine": "neun",
}  # fmt: skip
SPLITS = ["train", "validation", "test"]

needs_espeak = pytest.mark.skipif(not importlib.util.find_spec("espeakng_loader"), reason="needs espeakng-loader")


@pytest.fixture(scope="module")
def corpus():
    return {split: pq.read_table(CORPUS / f"{split}.parquet").to_pylist() for split in SPLITS}


def decode(row):
    return soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")


def part_of_voices(rows, part):
    return {row["speaker"].split("+")[part] for row in rows}


def test_the_corpus_takes_at_most_8_megabytes():
    assert sum(file.stat().st_size for file in CORPUS.iterdir()) <= 8_000_000


@pytest.mark.parametrize(("split", "num_utterances"), [("train", 3000), ("validation", 200), ("test", 250)])
def test_each_split_has_its_columns_and_count(split, num_utterances):
    file = pq.ParquetFile(CORPUS / f"{split}.parquet")
    assert file.schema_arrow.names == ["id", "audio", "text", "translation", "speaker", "seconds"]
    assert file.metadata.num_rows == num_utterances


def test_ids_are_unique(corpus):
    ids = [row["id"] for rows in corpus.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_no_variant_is_heard_in_two_splits(corpus):
    variants = [part_of_voices(corpus[split], 1) for split in SPLITS]
    assert sum(map(len, variants)) == len(set.union(*variants))


def test_there_are_at_least_60_voices_and_every_split_has_at_least_5_accents(corpus):
    assert len({row["speaker"] for rows in corpus.values() for row in rows}) >= 60
    assert all(len(part_of_voices(rows, 0)) >= 5 for rows in corpus.values())


def test_the_translation_follows_the_text_word_by_word(corpus):
    for row in (row for rows in corpus.values() for row in rows):
        assert [TRANSLATION[word] for word in row["text"].split()] == row["translation"].split()


def test_every_length_from_1_to_6_and_every_digit_is_as_frequent(corpus):
    texts = [row["text"].split() for row in corpus["train"]]
    lengths = np.bincount([len(text) for text in texts])[1:]
    digits = np.unique([word for text in texts for word in text], return_counts=True)[1]
    assert lengths / 3000 == pytest.approx([1 / 6] * 6, abs=0.03)
    assert digits / digits.sum() == pytest.approx([0.1] * 10, abs=0.01)


@pytest.mark.parametrize("split", SPLITS)
def test_audio_is_16_khz_mono_as_long_as_it_says_neither_silent_nor_clipped(corpus, split):
    for row in corpus[split][:60]:
        samples, sampling_rate = decode(row)
        assert (sampling_rate, samples.ndim) == (16_000, 1)
        assert abs(len(samples) / sampling_rate - row["seconds"]) < 0.01
        assert 0.03 < np.abs(samples).max() < 1


def test_datasets_sees_an_audio_feature(tmp_path):
    file = str(CORPUS / "test.parquet")
    rows = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path))
    assert rows.features["audio"] == datasets.Audio(sampling_rate=16_000)
    assert rows.features["seconds"] == datasets.Value("float32")


def test_a_row_does_not_depend_on_the_others_and_changes_with_the_seed():
    assert spoken.draw("test", 3) == spoken.draw("test", 3)
    assert len({spoken.draw(split, 3, seed).digits for split in SPLITS for seed in range(5)}) > 10


@needs_espeak
def test_speaking_a_line_again_gives_the_same_samples_whatever_was_spoken_before():
    lines = [spoken.draw("train", index) for index in range(5)]
    first = [spoken.speak(line) for line in lines]
    again = [spoken.speak(line) for line in reversed(lines)][::-1]
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))


@needs_espeak
def test_a_line_has_the_peak_and_the_silence_it_asks_for():
    line = spoken.draw("train", 0)
    samples = spoken.speak(line)
    lead, tail = round(16_000 * line.lead_seconds), round(16_000 * line.tail_seconds)
    assert 20 * np.log10(np.abs(samples).max()) == pytest.approx(line.peak_dbfs, abs=0.01)
    sounding = np.flatnonzero(samples)
    assert (sounding[0], sounding[-1]) == (lead, len(samples) - tail - 1)


@needs_espeak
def test_every_variant_exists():
    import espeakng_loader

    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    wanted = {name for women_and_men in spoken.VARIANTS.values() for names in women_and_men for name in names}
    assert wanted <= {file.name for file in folder.iterdir()}  # espeak-ng passes over a variant it lacks


@needs_espeak
@pytest.mark.parametrize("accent", spoken.ACCENTS)
def test_every_accent_changes_the_voice_in_its_own_way(accent):
    def with_accent(name):
        line = spoken.draw("train", 0)
        return spoken.speak(spoken.Line(**{**vars(line), "digits": tuple(range(10)), "speaker": f"{name}+m1"}))

    others = [with_accent(name) for name in spoken.ACCENTS if name != accent]
    assert not any(np.array_equal(with_accent(accent), other) for other in others)


@needs_espeak
def test_the_script_repeats_the_shipped_rows(tmp_path, corpus):
    spoken.write_corpus(tmp_path / "new", dict.fromkeys(SPLITS, 2))
    for split in SPLITS:
        rows = pq.read_table(tmp_path / "new" / f"{split}.parquet").to_pylist()
        for row, shipped in zip(rows, corpus[split][:2], strict=True):
            assert row.keys() == shipped.keys()
            assert all(row[name] == shipped[name] for name in row if name != "audio")
            assert np.allclose(decode(row)[0], decode(shipped)[0], atol=0.01)


def test_without_the_extra_the_message_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SystemExit, match=r"needs espeak-ng\. Install it: pip install espeakng-loader"):
        spoken.main([str(tmp_path / "new")])


def test_a_folder_that_cannot_be_written_gives_a_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"Cannot write to .*file: File exists. Name a folder"):
        spoken.main([str(tmp_path / "file")])

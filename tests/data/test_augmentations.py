"""Every kind of augmentation, against computations of the tests' own."""

import io
import json
import pickle
import tarfile

import datasets
import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_conf import FAMILIES, composed

from sedtrain.config.check import find_problems
from sedtrain.config.hydra_calls import create
from sedtrain.data.augment import Augmentation
from sedtrain.data.augmentations import ColouredNoise, Gain, RecordedNoise, Reverb, Speed, TimeMask
from sedtrain.errors import UserError

RATE = 16_000
SPEC_AUGMENT = ["data2vec", "hubert", "sew", "sew_d", "speecht5", "unispeech", "unispeech_sat", "w2v_bert", "wav2vec2",
                "wav2vec2_conformer", "wavlm", "xls_r"]  # fmt: skip
OWN_KINDS = [Speed(), Gain(), ColouredNoise(), TimeMask(num_masks=5, max_fraction=1.0)]

samples = arrays.arrays(np.float32, st.integers(1, 3000), elements=st.floats(-1, 1, width=32))
seeds = st.integers(0, 1000)


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(num_samples=RATE, seed=0):
    return 0.1 * rng(seed).standard_normal(num_samples, dtype=np.float32)


def written(folder, **recordings):
    """A folder of wav files, each from (samples, sampling rate)."""
    folder.mkdir(exist_ok=True)
    for name, (audio, rate) in recordings.items():
        soundfile.write(folder / f"{name}.wav", audio, rate, subtype="FLOAT")
    return str(folder)


def snr_db(clean, noisy):
    """From sums of squares in double precision."""
    clean, added = clean.astype(np.float64), noisy.astype(np.float64) - clean.astype(np.float64)
    return 10 * np.log10(np.sum(clean**2) / np.sum(added**2))


@pytest.fixture
def rooms(tmp_path):
    """Two responses, the second of another rate and with two channels."""
    decay = np.exp(-np.arange(4000) / 600) * rng(1).standard_normal(4000) * 0.3
    decay[37] = -1.5
    return written(tmp_path / "rooms", a=(decay, RATE), b=(np.stack([decay, -decay], 1), 44_100))


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "noises"
    return written(
        folder,
        long=(noise(5 * RATE, 1), RATE),
        short=(noise(700, 2), 8000),
        stereo=(noise(9000)[:, None].repeat(2, 1), 22_050),
    )


def kinds(rooms, recordings):
    return [*OWN_KINDS, RecordedNoise(recordings), Reverb(rooms)]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 100, RATE])
def test_silence_stays_silence_and_short_audio_survives(rooms, recordings, num_samples):
    for augmentation in kinds(rooms, recordings):
        for seed in range(10):
            silence = augmentation(np.zeros(num_samples, np.float32), RATE, rng(seed))
            assert len(silence) and not silence.any()
            loud = augmentation(np.full(num_samples, 0.5, np.float32), RATE, rng(seed))
            assert len(loud) and np.isfinite(loud).all() and loud.dtype == silence.dtype == np.float32


def test_no_kind_writes_into_what_it_is_given(rooms, recordings):
    audio = noise()
    audio.flags.writeable = False
    for augmentation in kinds(rooms, recordings):
        augmentation(audio, RATE, rng())


def test_every_kind_but_speed_keeps_the_length(rooms, recordings):
    for augmentation in kinds(rooms, recordings)[1:]:
        assert augmentation.longest == 1.0
        for num_samples in (1, 999, 40_000):
            assert len(augmentation(noise(num_samples), RATE, rng())) == num_samples


# --- speed


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_speed_changes_length_and_pitch_by_its_factor(factor):
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    fast = Speed([factor])(tone, RATE, rng())
    assert len(fast) == int(RATE / factor)
    assert np.abs(np.fft.rfft(fast)).argmax() * RATE / len(fast) == pytest.approx(1000 * factor, abs=RATE / len(fast))


def test_speed_is_what_soxr_makes_of_audio_that_claims_another_rate():
    audio = noise()
    expected = soxr.resample(audio, RATE * 0.9, RATE)
    np.testing.assert_allclose(Speed([0.9])(audio, RATE, rng()), expected[: int(RATE / 0.9)], atol=1e-6)


def test_every_factor_is_drawn_as_often():
    lengths = [len(Speed([0.8, 1.0, 1.25])(noise(1000), RATE, rng(seed))) for seed in range(600)]
    assert {length: lengths.count(length) > 150 for length in lengths} == {1250: True, 1000: True, 800: True}


@given(st.integers(1, 5000), st.floats(0.5, 2))
def test_speed_never_lengthens_more_than_it_says(num_samples, factor):
    speed = Speed([factor])
    assert 1 <= len(speed(noise(num_samples), RATE, rng())) <= max(1, num_samples * speed.longest)


# --- gain


def test_gain_is_in_decibels_of_amplitude():
    np.testing.assert_allclose(Gain((20.0, 20.0))(noise(), RATE, rng()), 10 * noise(), rtol=1e-6)
    np.testing.assert_allclose(Gain((-6.0, -6.0))(noise(), RATE, rng()), 0.5011872 * noise(), rtol=1e-6)


def test_gain_is_spread_over_its_range():
    one = np.ones(1, np.float32)
    gains = [20 * np.log10(Gain((-10.0, 6.0))(one, RATE, rng(seed))[0]) for seed in range(500)]
    assert -10 <= min(gains) < -9.5 and 5.5 < max(gains) <= 6.001
    assert np.mean(gains) == pytest.approx(-2, abs=0.7)


# --- noise


@given(samples, st.floats(-30, 40), st.sampled_from(["white", "pink", "brown"]), seeds)
def test_coloured_noise_has_its_ratio_over_the_whole_utterance(audio, wanted, colour, seed):
    assume(np.abs(audio).max() > 0.01)
    noisy = ColouredNoise([colour], (wanted, wanted))(audio, RATE, rng(seed))
    assert snr_db(audio, noisy) == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize("wanted", [-5.0, 0.0, 20.0])
def test_recorded_noise_has_its_ratio_whatever_the_recording(recordings, wanted):
    for num_samples in (50, RATE, 90_000):
        for seed in range(12):
            audio = noise(num_samples, seed + 50)
            noisy = RecordedNoise(recordings, (wanted, wanted))(audio, RATE, rng(seed))
            assert snr_db(audio, noisy) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(("colour", "per_octave"), [("white", 0.0), ("pink", -3.01), ("brown", -6.02)])
def test_the_power_of_a_colour_falls_by_its_decibels_an_octave(colour, per_octave):
    spectrum = np.mean(
        [np.abs(np.fft.rfft(ColouredNoise([colour]).noise(RATE, RATE, rng(seed)))) ** 2 for seed in range(20)], axis=0
    )
    octaves = [10 * np.log10(spectrum[low : 2 * low].mean()) for low in (125, 250, 500, 1000, 2000, 4000)]
    np.testing.assert_allclose(np.diff(octaves), per_octave, atol=0.6)


def test_coloured_noise_has_no_power_below_what_is_heard():
    for colour in ("pink", "brown"):
        made = ColouredNoise([colour]).noise(2**16, RATE, rng())
        spectrum = np.abs(np.fft.rfft(made.astype(np.float64))) ** 2
        assert spectrum[np.fft.rfftfreq(2**16, 1 / RATE) < 20].sum() < 1e-6 * spectrum.sum()


def test_noise_from_a_recording_is_a_stretch_of_it_and_a_short_one_repeats(tmp_path):
    ramp = np.linspace(0.1, 0.9, 5000, dtype=np.float32)
    long = RecordedNoise(written(tmp_path / "long", a=(ramp, RATE)))
    starts = set()
    for seed in range(20):
        stretch = long.noise(1000, RATE, rng(seed))
        start = int(np.abs(ramp - stretch[0]).argmin())
        np.testing.assert_array_equal(stretch, ramp[start : start + 1000])
        starts.add(start)
    assert len(starts) > 15
    short = RecordedNoise(written(tmp_path / "short", a=(ramp[:300], RATE)))
    np.testing.assert_array_equal(short.noise(1000, RATE, rng()), np.tile(ramp[:300], 4)[:1000])


def test_a_recording_of_another_rate_keeps_its_pitch(tmp_path):
    tone = np.sin(2 * np.pi * 1000 * np.arange(44_100) / 44_100)
    made = RecordedNoise(written(tmp_path / "a", a=(tone, 44_100))).noise(8000, RATE, rng())
    assert np.abs(np.fft.rfft(made)).argmax() * RATE / 8000 == pytest.approx(1000, abs=2)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_recording_or_room_of_silence_or_of_no_numbers_changes_nothing(tmp_path, value):
    folder = written(tmp_path / "bad", a=(np.full(500, value, np.float32), RATE))
    for augmentation in (RecordedNoise(folder), Reverb(folder)):
        np.testing.assert_array_equal(augmentation(noise(), RATE, rng()), noise())


def sounds():
    """Three recordings that no two stretches of a thousand samples have in common."""
    return [np.linspace(low, low + 0.2, 3000, dtype=np.float32) for low in (0.1, 0.4, 0.7)]


def wav(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, "FLOAT", format="WAV")
    return file.getvalue()


def parquet(folder):
    rows = datasets.Dataset.from_dict({"audio": [{"bytes": wav(each), "path": None} for each in sounds()]})
    rows.cast_column("audio", datasets.Audio()).to_parquet(folder / "noise.parquet")
    return folder / "noise.parquet"


def saved(folder):
    datasets.Dataset.from_dict({"audio": [wav(each) for each in sounds()]}).save_to_disk(folder / "noise")
    return folder / "noise"


def tars(folder):
    with tarfile.open(folder / "noise-0.tar", "w") as file:
        for number, each in enumerate(sounds()):
            member = tarfile.TarInfo(f"{number}.wav")
            member.size = len(wav(each))
            file.addfile(member, io.BytesIO(wav(each)))
    return folder / "noise-*.tar"


def manifest(folder):
    written(folder, **{f"n{number}": (each, RATE) for number, each in enumerate(sounds())})
    (folder / "noise.jsonl").write_text("".join(json.dumps({"audio": f"n{i}.wav"}) + "\n" for i in range(3)))
    return folder / "noise.jsonl"


@pytest.mark.parametrize("source", [parquet, saved, tars, manifest])
def test_noise_from_a_dataset_is_a_stretch_of_one_of_its_recordings(source, tmp_path):
    recorded = RecordedNoise(str(source(tmp_path)), split="train")
    places = []
    for seed in range(30):
        stretch = recorded.noise(1000, RATE, rng(seed))
        found = [np.flatnonzero(each == stretch[0]) for each in sounds()]
        [number] = [number for number, starts in enumerate(found) if len(starts)]
        start = found[number][0]
        np.testing.assert_array_equal(stretch, sounds()[number][start : start + 1000])
        places.append((number, start))
    assert {number for number, _ in places} == {0, 1, 2} and len(set(places)) > 20
    elsewhere = pickle.loads(pickle.dumps(recorded))
    np.testing.assert_array_equal(elsewhere.noise(1000, RATE, rng(7)), recorded.noise(1000, RATE, rng(7)))


def test_a_recording_that_cannot_be_read_gives_way_to_another_and_is_told_of_once(tmp_path, caplog):
    folder = manifest(tmp_path).parent
    (folder / "n0.wav").write_bytes(b"no audio")
    (folder / "n2.wav").unlink()
    recorded = RecordedNoise(str(folder / "noise.jsonl"), split="train")
    for seed in range(20):
        assert recorded.noise(10, RATE, rng(seed))[0] in sounds()[1]
    messages = sorted(record.getMessage() for record in caplog.records)
    assert [message.partition("(")[0] for message in messages] == [
        f"noise: recording {i} cannot be read " for i in (0, 2)
    ]
    (folder / "n1.wav").unlink()
    np.testing.assert_array_equal(recorded(noise(100), RATE, rng()), noise(100))


def test_a_dataset_of_noise_that_cannot_be_read_is_refused(tmp_path):
    table = str(parquet(tmp_path))
    cases = [
        ("path", {"path": f"{tmp_path}/none.parquet"}, "there is no such file or folder"),
        (
            "column",
            {"path": table, "column": "sound"},
            f"{table} (train) has no column 'sound' for the audio, it has audio",
        ),
    ]
    for option, options, wrong in cases:
        with pytest.raises(UserError) as refused:
            RecordedNoise(**options, split="train")
        error = refused.value
        assert (error.option, error.value, error.wrong.removeprefix("data.columns: ")) == (
            option,
            options[option],
            wrong,
        )
        assert error.write == "write path=DATASET split=SPLIT column=COLUMN that holds audio"
    with pytest.raises(UserError, match=r"or path=DATASET with split=SPLIT"):
        RecordedNoise(table)


# --- reverb


def test_reverb_is_the_direct_convolution_from_the_direct_sound_on(tmp_path, rooms):
    for seed in range(4):
        response = [soundfile.read(f"{rooms}/{name}.wav", always_2d=True) for name in "ab"]
        candidates = [
            soxr.resample(audio[:, 0], rate, RATE) if rate != RATE else audio[:, 0] for audio, rate in response
        ]
        wet = Reverb(rooms)(noise(3000), RATE, rng(seed))
        matches = []
        for candidate in candidates:
            direct = np.abs(candidate).argmax()
            full = np.convolve(noise(3000).astype(np.float64), candidate / candidate[direct])
            expected = full[direct : direct + 3000]
            expected *= np.sqrt(np.mean(noise(3000).astype(np.float64) ** 2) / np.mean(expected**2))
            matches.append(bool(np.allclose(wet, expected, atol=1e-5)))
        assert sum(matches) == 1


@given(samples, st.integers(0, 500), st.sampled_from([1.0, -0.3, 7.0]))
def test_a_room_without_echo_changes_nothing_however_far_the_speaker_is(tmp_path_factory, audio, delay, level):
    assume(np.abs(audio).max() > 0.01)
    response = np.zeros(600)
    response[delay] = level
    folder = written(tmp_path_factory.mktemp("room"), a=(response, RATE))
    np.testing.assert_allclose(Reverb(folder)(audio, RATE, rng()), audio, atol=1e-5)


def test_a_click_stays_where_it_was_and_reverb_keeps_the_power(rooms):
    click = np.zeros(RATE, np.float32)
    click[5000] = 1.0
    for seed in range(4):
        wet = Reverb(rooms)(click, RATE, rng(seed))
        assert np.abs(wet).argmax() == 5000
        assert np.mean(wet.astype(np.float64) ** 2) == pytest.approx(np.mean(click**2), rel=1e-4)


# --- time mask


@given(st.integers(1, 5000), st.integers(1, 4), st.floats(0.001, 0.2), st.floats(0.01, 1), seeds)
def test_time_masks_are_zeros_no_longer_than_they_may_be(num_samples, num_masks, max_seconds, max_fraction, seed):
    ones = np.ones(num_samples, np.float32)
    masked = TimeMask(num_masks, max_seconds, max_fraction)(ones, RATE, rng(seed))
    gone = masked == 0
    assert (masked[~gone] == 1).all()
    assert gone.sum() <= num_masks * min(max_seconds * RATE, max_fraction * num_samples)
    assert np.diff(np.pad(gone, 1).astype(int)).clip(0).sum() <= num_masks


def test_time_masks_reach_both_ends():
    masked = [TimeMask(1, 1.0, 1.0)(np.ones(10, np.float32), RATE, rng(seed)) for seed in range(200)]
    assert all(any(each[position] == 0 for each in masked) for position in range(10))
    assert any(each.all() for each in masked) and any(not each.any() for each in masked)


# --- settings

DECIBELS = "this has to be two numbers of decibels from -100 to 100, the lower one first"
COLOURS = "write [white,pink,brown]"
REFUSED = [
    (Speed, "factors", [], "these have to be numbers from 0.5 to 2, at least one", "write [0.9,1.0,1.1]"),
    (Speed, "factors", [0.9, 0.4], "these have to be numbers from 0.5 to 2, at least one", "write [0.9,1.0,1.1]"),
    (Gain, "gain_db", [3.0, -3.0], DECIBELS, "write [LOW,HIGH]"),
    (Gain, "gain_db", [0.0, 200.0], DECIBELS, "write [LOW,HIGH]"),
    (ColouredNoise, "snr_db", [20.0, 10.0], DECIBELS, "write [LOW,HIGH]"),
    (ColouredNoise, "snr_db", [-101.0, 10.0], DECIBELS, "write [LOW,HIGH]"),
    (ColouredNoise, "colours", [], "these have to be some of white, pink, brown, at least one", COLOURS),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "option", "value", "wrong", "write"), REFUSED)
def test_settings_that_cannot_work_are_refused(kind, option, value, wrong, write):
    with pytest.raises(UserError) as refused:
        kind(**{option: value})
    error = refused.value
    assert (error.option, error.value, error.wrong, error.write) == (option, value, wrong, write)


def test_noise_may_be_louder_than_speech():
    assert ColouredNoise(snr_db=(-20.0, -10.0)).snr_db == (-20.0, -10.0)


@pytest.mark.parametrize(("kind", "option"), [(RecordedNoise, "path"), (Reverb, "folder")])
def test_a_folder_without_audio_or_with_a_broken_file_is_refused(kind, option, tmp_path):
    (tmp_path / "readme.txt").write_text("no audio")
    broken = tmp_path / "broken"
    written(broken, good=(noise(10), RATE), none=(np.zeros(0), RATE))
    cases = [
        (tmp_path / "missing", "there is no such folder", f"write {option}=FOLDER with audio files"),
        (tmp_path / "readme.txt", "there is no such folder", f"write {option}=FOLDER with audio files"),
        (broken, f"{broken}/none.wav cannot be read (it has no samples)", "write a folder whose audio files"),
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    cases.append((empty, "there is no audio in it", f"write {option}=FOLDER with audio files"))
    for folder, wrong, write in cases:
        with pytest.raises(UserError) as refused:
            kind(str(folder))
        assert (refused.value.option, refused.value.value, refused.value.wrong) == (option, str(folder), wrong)
        assert refused.value.write.startswith(write)
    (broken / "none.wav").write_bytes(b"this is text")
    with pytest.raises(UserError, match=r"none\.wav cannot be read \(Format not recognised"):
        kind(str(broken))


# --- configuration


@pytest.mark.parametrize(
    "choice", ["speed", "gain", "noise", "time_mask", "recorded_noise", "reverb", "standard", "[speed,reverb]"]
)
def test_every_option_makes_a_chain_with_its_signatures_defaults(choice, rooms, recordings):
    config = composed(f"augment={choice}")
    if "recorded_noise" in config.augment:
        config.augment.recorded_noise.path = recordings
    if "reverb" in config.augment:
        config.augment.reverb.folder = rooms
    assert find_problems(config) == []
    made = create(config, "augment")
    assert list(made) == {"standard": ["speed", "gain", "noise"], "[speed,reverb]": ["speed", "reverb"]}.get(
        choice, [choice]
    )
    assert all(isinstance(each, Augmentation) for each in made.values())


@pytest.mark.parametrize("family", FAMILIES["encoder"])
def test_spec_augment_masks_in_training_alone_and_a_family_without_it_refuses(family):
    config = composed(f"encoder={family}", "augment=spec_augment", "encoder.options.mask_time_prob=0.5")
    if family not in SPEC_AUGMENT:
        with pytest.raises(UserError, match="has no SpecAugment in its encoder"):
            create(config, "encoder")
        return
    encoder = create(config, "encoder")
    inputs = torch.randn(2, 40, 160) if family == "w2v_bert" else torch.randn(2, 40_000)
    mask = torch.ones(inputs.shape[:2], dtype=torch.long)
    outputs = []
    for train in (True, True, False, False):
        torch.manual_seed(0)
        np.random.seed(len(outputs))
        outputs.append(encoder.train(train)(inputs, attention_mask=mask).last_hidden_state.detach())
    assert not torch.allclose(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[3])

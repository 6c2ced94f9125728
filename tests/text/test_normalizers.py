import json
import pickle
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from sedtrain.errors import UserError
from sedtrain.text.normalizers import NORMALIZERS, normalizer

TEXTS = [
    "Mr. Smith's colour TV cost $20.50, didn't it?",
    "Three one four, twenty-five per cent [laughs] (inaudible) um",
    "Grüße aus Köln -- c'est déjà fini!",
    "",
]


def test_none_leaves_the_text_as_it_is():
    assert normalizer("none")(" Two  Words\n") == " Two  Words\n"


@pytest.mark.parametrize(
    ("text", "lowered"),
    [
        (" Two \t Words\n", "two words"),
        ("\ufb01ve \uff21\uff22\uff23", "five abc"),  # a ligature, full-width letters
        ("U\u0308ber", "über"),  # a combining diaeresis
        ("ΣΊΣΥΦΟΣ", "σίσυφος"),
        ("It's 3,5!", "it's 3,5!"),
    ],
)
def test_lowercase_folds_case_width_and_white_space_and_keeps_punctuation(text, lowered):
    assert normalizer("lowercase")(text) == lowered


@pytest.mark.parametrize("name", ["none", "lowercase"])
@given(text=st.text())
def test_twice_is_once_where_a_normalizer_promises_it(name, text):
    rewrite = normalizer(name)
    assert rewrite(rewrite(text)) == rewrite(text)


@pytest.mark.parametrize("text", TEXTS)
def test_whisper_english_equals_the_implementation_of_transformers(text):
    spellings = json.loads(files("whisper_normalizer").joinpath("normalizers/english.json").read_text())
    assert normalizer("whisper_english")(text) == EnglishTextNormalizer(spellings)(text)


@pytest.mark.parametrize("text", TEXTS)
def test_whisper_basic_equals_the_implementation_of_transformers(text):
    assert normalizer("whisper_basic")(text) == BasicTextNormalizer()(text)


def test_whisper_basic_drops_the_vowel_signs_of_devanagari():
    assert normalizer("whisper_basic")("नमस्ते") == "नमस त "


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_worker_gets_the_same_normalizer(name, text):
    sent = pickle.loads(pickle.dumps(normalizer(name)))
    assert sent.label() == normalizer(name).label()
    assert sent(text) == normalizer(name)(text)


def test_whisper_english_writes_digits_and_american_spelling():
    assert normalizer("whisper_english")("three one four colours") == "314 colors"


@pytest.mark.parametrize("name", NORMALIZERS)
def test_every_normalizer_says_its_name_and_version(name):
    label = normalizer(name).label()
    assert label["name"] == name and label["version"]


def test_the_version_of_the_whisper_normalizers_is_that_of_their_package():
    assert normalizer("whisper_english").version.startswith("whisper-normalizer 0.")


@pytest.mark.parametrize(("wrong", "close"), [("whisper_englsh", "whisper_english"), ("lower_case", "lowercase")])
def test_an_unknown_normalizer_is_named_with_the_closest_one(wrong, close):
    with pytest.raises(UserError, match=f"no normalizer called '{wrong}': did you mean '{close}'") as error:
        normalizer(wrong)
    assert error.value.write == "write one of none, lowercase, whisper_english, whisper_basic"


def test_the_option_that_names_a_normalizer_is_named():
    with pytest.raises(UserError) as error:
        normalizer("lower", "training_normalizer")
    assert str(error.value).startswith(
        "1 problem:\n\n  training_normalizer = 'lower'\n    there is no normalizer called "
    )


def test_a_name_like_no_other_gets_no_guess():
    with pytest.raises(UserError, match="no normalizer called 'xyz'") as error:
        normalizer("xyz")
    assert "did you mean" not in str(error.value)

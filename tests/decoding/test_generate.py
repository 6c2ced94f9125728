"""Options of decoding that cannot be."""

import pytest

from sedtrain.decoding.generate import DecodingOptions
from sedtrain.errors import UserError


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("num_beams", 0, "1 or more"),
        ("max_new_tokens", 0, "1 or more"),
        ("top_k", -1, "0, which is off, or more"),
        ("no_repeat_ngram_size", -1, "0, which is off, or more"),
        ("temperature", 0, "a number above 0"),
        ("temperature", float("nan"), "a number above 0"),
        ("top_p", 1.5, "a fraction above 0 and up to 1, which is off"),
        ("top_p", 0, "a fraction above 0 and up to 1, which is off"),
    ],
)
def test_a_value_out_of_range_is_refused(option, value, wanted):
    with pytest.raises(UserError) as raised:
        DecodingOptions(**{option: value})
    assert str(raised.value) == (
        f"decoding.{option}={value}: this has to be {wanted}\n  write instead: decoding.{option}=NUMBER, {wanted}"
    )


def test_the_ends_of_the_ranges_are_in_them():
    DecodingOptions(num_beams=1, max_new_tokens=1, top_k=0, top_p=1, no_repeat_ngram_size=0, temperature=1e-3)

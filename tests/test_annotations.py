"""Values against annotations; the reference checks real types, not their text."""

import types
import typing
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.annotations import checked, fits, literals
from sedtrain.errors import UserError
from sedtrain.ranges import Positive

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)
UNKNOWN = ["Any", "Array", "torch.dtype", "Callable[[int], str]", "Foo[int]", "a b"]
UNKNOWN += ["Final", "Literal[Color.RED]", "conint(gt=0)", "{'a': 3}", "3"]
TYPES = st.recursive(
    st.sampled_from([int, float, str, bool, type(None)]),
    lambda inner: st.one_of(
        inner.map(lambda each: list[each]),
        inner.map(lambda each: dict[str, each]),
        inner.map(lambda each: typing.Optional[each]),  # noqa: UP045 - a spelling to be read
        st.tuples(inner, inner).map(lambda pair: typing.Union[pair]),  # noqa: UP007
        st.tuples(inner, inner).map(lambda pair: tuple[pair]),
    ),
    max_leaves=4,
)


def is_instance(value: object, kind: object) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(is_instance(value, each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(is_instance(each, arguments[0]) for each in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == 2 and all(map(is_instance, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(is_instance(each, arguments[1]) for each in value.values())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def text_of(kind: object) -> str:
    return "None" if kind is type(None) else kind.__name__ if kind in (int, float, str, bool) else repr(kind)


@given(value=VALUES, kind=TYPES)
def test_fits_agrees_with_the_types_themselves(value, kind):
    assert fits(value, text_of(kind)) == is_instance(value, kind)


@given(value=VALUES, annotation=st.sampled_from(UNKNOWN))
def test_unknown_names_take_every_value(value, annotation):
    assert fits(value, annotation)


@pytest.mark.parametrize("annotation", ["int", "str", "list[int]", "Literal['a']"])
def test_a_node_with_a_target_fits_every_annotation(annotation):
    assert fits({"_target_": "package.Thing"}, annotation)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, "int", False),
        (True, "float", False),
        (1, "bool", False),
        (1, "float", True),
        (1.0, "int", False),
        ("a", "Literal['a', 'b']", True),
        (True, "Literal[1]", False),
        (None, "Literal['a'] | None", True),
        ("a", "'str | None'", True),
        ([1, 2, 3], "tuple[int, ...]", True),
        ([1], "tuple[int, int]", False),
        ([1], "tuple[()]", False),
        (3, "Optional['str']", False),
        ("a", "Annotated[int, Field(gt=0)]", False),
        ("abc", "Sequence[str]", False),
        ("runs/x", "pathlib.Path", True),
        (3, "os.PathLike[str] | str", False),
        ({"a": 1}, "collections.abc.Mapping[str, int]", True),
        ([1], "typing.Optional[List[int]]", True),
        (3, "Annotated[str, 'a name']", False),
    ],
)
def test_fits_reads_the_spellings_of_an_annotation(value, annotation, expected):
    assert fits(value, annotation) is expected


def test_literals_are_listed_in_order():
    assert literals("Optional[Literal['max', 'min', 3]]") == ["max", "min", 3]
    assert literals("int | None") == []


def test_no_plain_value_is_a_tensor():
    assert fits(0.1, "float | torch.Tensor")
    assert not fits("fast", "float | torch.Tensor")
    assert fits({"_target_": "torch.tensor"}, "float | torch.Tensor")


def test_arguments_are_checked_as_options_are_and_unknown_types_pass():
    @checked("mine.")
    def function(rate: Positive, names: Sequence[Literal["a", "b"]] = (), *, model: object = None, on: bool = False):
        return rate

    assert function(1, ("a",), model=object(), on=True) == 1
    assert function(np.float32(0.5)) == 0.5
    with pytest.raises(UserError) as caught:
        function(0, ["c"], on=1)
    assert [(error.option, error.wrong) for error in caught.value.errors] == [
        ("mine.rate", "expected a number above 0"),
        ("mine.names", "expected Sequence[Literal['a', 'b']]"),
        ("mine.on", "expected bool"),
    ]


def test_annotations_that_only_type_checkers_can_read_are_not_checked():
    @checked("mine.")
    def function(rate: "Elsewhere"):  # noqa: F821
        return rate

    assert function("x") == "x"

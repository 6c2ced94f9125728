"""Classes that are made while a model is set up: pickle and copy know them, and they keep the names of transformers."""

import copy
import pickle

import pytest
from families import ENCODERS, OPTIONS, PREFIXED, tiny_decoder, tiny_encoder
from torch.nn.utils import parametrize
from transformers.models.whisper.modeling_whisper import WhisperAttention

from sedtrain.models.mixins import mixed


def without_weight_norm(module):
    """torch refuses to pickle parametrized modules, and the hooks that weight norm leaves."""
    for each in list(module.modules()):
        for name in list(getattr(each, "parametrizations", ())):
            parametrize.remove_parametrizations(each, name)
            each._load_state_dict_pre_hooks.clear()
    return module


@pytest.mark.parametrize("name", [*ENCODERS, *OPTIONS, *PREFIXED])
def test_a_part_of_any_family_is_pickled_with_the_classes_of_its_modules(name):
    part = without_weight_norm(tiny_encoder(name) if name in ENCODERS else tiny_decoder(name))
    for twin in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part)):
        pairs = list(zip(part.modules(), twin.modules(), strict=True))
        assert [type(each) for each, _ in pairs] == [type(each) for _, each in pairs]
        assert not any(each is other for each, other in pairs)


def test_a_mixed_class_is_made_once_and_keeps_its_name():
    class Mixin:
        pass

    kind = mixed(Mixin, WhisperAttention)
    assert kind is mixed(Mixin, WhisperAttention)
    assert issubclass(kind, Mixin) and kind.__name__ == "WhisperAttention"

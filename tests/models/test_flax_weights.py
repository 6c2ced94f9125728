"""Weights of Flax: the layout of `flax_model.msgpack`, and files that are none."""

import json
import re
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from pairs import BART, IDS, joined, two_utterances
from transformers import BartConfig, BartForConditionalGeneration

import sedtrain
from sedtrain import SpeechEncoderDecoder
from sedtrain.errors import UserError
from sedtrain.models.encoder import load_encoder

ROOT = Path(__file__).parents[2]
FILE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
# Ends of PyTorch's names, what Flax calls them and how it lays them out, from the definitions of both.
LAYOUT = [
    (r"(conv_layers\.\d\.conv|encoder\.conv\d)\.weight", "kernel", (2, 1, 0)),
    (r"parametrizations\.weight\.original0", "weight_g", None),
    (r"parametrizations\.weight\.original1", "weight_v", None),
    (r"(layer_norm|[lL]ayer_?[nN]orm(_embedding)?|ln_(\d|f|cross_attn))\.weight", "scale", None),
    (r"(shared|embed_tokens|embed_positions|wte|wpe|\w+_embeddings)\.weight", "embedding", None),
    (r"\.weight", "kernel", (1, 0)),
]


def flax_name(name, weight):
    """(path, array) of Flax for a weight of PyTorch."""
    for pattern, last, axes in LAYOUT:
        if re.search(f"{pattern}$", name):
            stem = re.sub(r"\.(parametrizations\.weight\.\w+|weight)$", "", name)
            return [*stem.split("."), last], weight if axes is None else weight.transpose(axes)
    return name.split("."), weight


def packed(array, dtype=None):
    return msgpack.ExtType(1, msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes("C"))))


def chunks(array, size=7):
    flat = array.reshape(-1)
    pieces = [flat[start : start + size] for start in range(0, flat.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(axis): length for axis, length in enumerate(array.shape)},
        "chunks": {str(number): packed(piece) for number, piece in enumerate(pieces)},
    }


def grow(tree, path, leaf):
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def flax_tree(model, leaf=packed):
    """The parameters of a model as the tree that Flax saves; a tied output layer has none of its own."""
    tree = {}
    for name, weight in model.named_parameters():
        path, array = flax_name(name, weight.detach().numpy())
        grow(tree, path, leaf(array))
    return tree


def saved(model, folder, files):
    model.config.save_pretrained(folder)
    for name, tree in files.items():
        (folder / name).write_bytes(msgpack.packb(tree))
    return folder


def loaded(folder, **options):
    model, told = SpeechEncoderDecoder.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **options
    )
    assert (told["missing_keys"], told["unexpected_keys"], told["mismatched_keys"]) == (set(), set(), set())
    return model


def logits(model):
    with torch.no_grad():
        return model(**two_utterances(), decoder_input_ids=IDS).logits


@pytest.fixture(scope="module")
def model():
    return joined("wav2vec2", "bart")


@pytest.mark.parametrize("decoder", ["bart", "gpt2", "bert"])
def test_weights_in_the_layout_of_flax_give_the_same_logits(tmp_path, decoder):
    model = joined("wav2vec2", decoder)
    again = loaded(saved(model, tmp_path, {FILE: flax_tree(model)}))
    assert torch.equal(logits(again), logits(model))
    assert again.config._name_or_path == str(tmp_path)


def test_weights_in_chunks_and_in_several_files_are_the_same(tmp_path, model):
    tree = flax_tree(model, leaf=chunks)
    names = {f"{part}/x": f"flax_model-0000{number}-of-00003.msgpack" for number, part in enumerate(tree, 1)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    folder = saved(model, tmp_path, {file: {name[:-2]: tree[name[:-2]]} for name, file in names.items()})
    assert torch.equal(logits(loaded(folder)), logits(model))


def test_layers_that_are_stacked_in_one_array_are_told_apart(tmp_path, model):
    tree = flax_tree(model, leaf=lambda array: array)

    def stack(*layers):
        if isinstance(layers[0], dict):
            return {name: stack(*(layer[name] for layer in layers)) for name in layers[0]}
        return packed(np.stack(layers))

    def packed_tree(each):
        return {k: packed_tree(v) for k, v in each.items()} if isinstance(each, dict) else packed(each)

    encoder, decoder = tree["encoder"]["encoder"], tree["decoder"]["model"]["decoder"]
    stacked = [stack(*part.pop("layers").values()) for part in (encoder, decoder)]
    tree = packed_tree(tree)
    tree["encoder"]["encoder"]["layers"] = {"FlaxWav2Vec2EncoderLayers": stacked[0]}
    tree["decoder"]["model"]["decoder"]["layers"] = {"FlaxBartDecoderLayers": stacked[1]}
    assert torch.equal(logits(loaded(saved(model, tmp_path, {FILE: tree}))), logits(model))


def test_weights_in_bfloat16_are_those_rounded(tmp_path, model):
    def half(array):
        return packed(torch.from_numpy(array.copy()).bfloat16().view(torch.int16).numpy(), "bfloat16")

    again = loaded(saved(model, tmp_path, {FILE: flax_tree(model, leaf=half)}), dtype=torch.float32)
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight.bfloat16().float())


def test_weights_of_flax_beside_others_are_taken_where_they_are_asked_for(tmp_path, model):
    model.save_pretrained(tmp_path)
    saved(model, tmp_path, {FILE: flax_tree(model, leaf=lambda array: packed(np.zeros_like(array)))})
    assert torch.equal(loaded(tmp_path).decoder.lm_head.weight, model.decoder.lm_head.weight)
    assert not loaded(tmp_path, from_flax=True).decoder.lm_head.weight.any()


def test_the_code_of_the_page_runs(tmp_path, model, monkeypatch):
    [code, *_] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/jax.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "FOLDER", tmp_path / "FOLDER_OR_HUB_ID"):
        saved(model, folder, {FILE: flax_tree(model)})
    exec(code, {"sedtrain": sedtrain})


def test_what_an_old_folder_says_of_generation_is_kept(tmp_path, model):
    folder = saved(model, tmp_path, {FILE: flax_tree(model)})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "max_length": 33, "decoder_start_token_id": 7}))
    generation = loaded(folder).generation_config
    assert (generation.max_length, generation.decoder_start_token_id) == (33, 7)


def test_parts_with_weights_of_flax_are_joined(tmp_path, model):
    torch.manual_seed(0)
    config = BartConfig(**{**BART, "is_encoder_decoder": True, "is_decoder": False})
    whole = BartForConditionalGeneration._from_config(config)
    for name, part in {"encoder": model.encoder, "decoder": whole}.items():
        (tmp_path / name).mkdir()
        saved(part, tmp_path / name, {FILE: flax_tree(part)})
    joint = SpeechEncoderDecoder.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    assert joint.encoder.config._name_or_path == str(tmp_path / "encoder")
    for part, source in ((joint.encoder, model.encoder), (joint.decoder, whole)):
        for name, weight in part.state_dict().items():
            assert torch.equal(weight, source.state_dict()[name])


# --- files that are none


def deep(levels):
    tree = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


def array(shape=(2,), dtype="float32", content=bytes(8), code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "it is empty"),
        (b"\x80\x80", "its tree ends at byte 1 of 2"),
        (b"\x80\x04\x95\x00", "its tree ends at byte 1 of 4"),
        (b"\xc1", "byte 0 is 0xc1, which begins no map, text or array"),
        (b"\xdf\xff\xff\xff\xff", "it has more than 200,000 names"),
        (b"\x81\xdb\xff\xff\xff\xff", "an item of 4,294,967,295 bytes at byte 6 goes beyond its end"),
        (b"\x81\xa1\xff\xc2", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ({"a": 3}, "'a' is no array"),
        ({"a": "b"}, "a text in 1 maps at byte 4 is no map of arrays"),
        ({"a": [array()]}, "a list in 1 maps at byte 4 is no map of arrays"),
        (deep(40), "a map in 32 maps at byte 97 is no map of arrays"),
        ({3: array()}, "a number ends at byte 2 where a text belongs"),
        ({"a": array(code=2)}, "extension 2 at byte 27 is no array"),
        ({"a": array(dtype="object")}, "an array of 'object' holds no weights"),
        ({"a": array(dtype="O")}, "an array of 'O' holds no weights"),
        ({"a": array(shape=(3,))}, "an array of the shape (3,) in float32 has 8 bytes"),
        ({"a": array(shape=(2**63, 2**62))}, f"an array of the shape ({2**63}, {2**62}) in float32 has 8 bytes"),
        ({"a": array(shape=(0,), content=b"")}, "an array of the shape (0,) in float32 has 0 bytes"),
        ({"a": array(shape=(1,) * 9)}, "an array is no shape, dtype and bytes"),
        ({"a": array(shape=(-2,))}, "byte 2 is 0xfe, which begins no map, text or array"),
        ({"a": {"__msgpack_chunked_array__": True}}, "the chunks of an array are no shape and arrays"),
        ({"a": {**chunks(np.zeros(9, "f4")), "shape": {"0": 8}}}, "an array of the shape (8,) has chunks of 9 numbers"),
    ],
)  # fmt: skip
def test_a_file_that_holds_anything_but_named_arrays_is_refused(tmp_path, model, content, wrong):
    folder = saved(model, tmp_path, {})
    (folder / FILE).write_bytes(content if isinstance(content, bytes) else msgpack.packb(content))
    assert refusal(folder) == f"{FILE} is no file of Flax weights: {wrong}"


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        SpeechEncoderDecoder.from_pretrained(folder, **options)
    assert (caught.value.option, caught.value.value) == ("checkpoint", str(folder))
    assert caught.value.write == "write checkpoint=FOLDER saved by save_pretrained of a Flax or PyTorch model"
    return caught.value.wrong


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        ({"a": "../b.msgpack"}, f"{INDEX} names '../b.msgpack', which is no file of weights beside it"),
        ({"a": "/etc/passwd"}, f"{INDEX} names '/etc/passwd', which is no file of weights beside it"),
        ({"a": "b.msgpack"}, f"{INDEX} names 'b.msgpack', which is not there"),
        ({}, f"{INDEX} names no files of weights"),
    ],
)
def test_an_index_that_names_other_files_is_refused(tmp_path, model, index, wrong):
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert refusal(saved(model, tmp_path, {})) == wrong


def test_a_damaged_part_is_named(tmp_path, model):
    model.encoder.config.save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"\x80\x80")
    with pytest.raises(UserError) as caught:
        load_encoder("wav2vec2", {}, checkpoint=str(tmp_path))
    assert (caught.value.option, caught.value.value) == ("encoder.checkpoint", str(tmp_path))
    assert caught.value.write == "write encoder.checkpoint=FOLDER saved by save_pretrained of a Flax or PyTorch model"


def test_a_folder_without_weights_of_flax_is_refused_where_they_are_asked_for(tmp_path, model):
    assert refusal(saved(model, tmp_path, {}), from_flax=True) == f"it holds neither {FILE} nor {INDEX}"

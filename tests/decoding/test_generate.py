"""Searches of a batch: what each returns, what a batch and its length change, and what is refused."""

import json
import shutil

import pytest
from corpora import wav
from families import TOKENIZER, tiny_decoder
from tones import batch_of, drawn_texts, joined, train
from transformers import PreTrainedConfig

from sedtrain.decoding.alignment import align
from sedtrain.decoding.ctc import lattice_of
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.errors import UserError
from sedtrain.models.saved import MOST_TOKENS, most_tokens

SEARCHES = [
    {}, {"num_beams": 3}, {"search": "joint", "num_beams": 3}, {"search": "joint"}, {"search": "ctc"},
    {"search": "ctc", "num_beams": 3}, {"search": "rescore", "num_beams": 3}, {"search": "speculative"},
]  # fmt: skip
TEXTS = [[5, 6, 7, 8, 9], [8, 7], [6]]


@pytest.fixture(scope="module", params=["bert", "gpt2", "bart", "roberta"])
def model(request):
    return joined(tiny_decoder(request.param))


@pytest.fixture(scope="module")
def counting():
    return train(joined(tiny_decoder("bert")))


def alone(batch, row):
    """One utterance of a batch, without padding."""
    one, length = batch_of(TEXTS[row : row + 1]), int(batch.attention_mask[row].sum())
    one.inputs, one.attention_mask = batch.inputs[row : row + 1, :length], batch.attention_mask[row : row + 1, :length]
    return one


def num_frames(model, batch):
    return lattice_of(model, model.encode(batch.inputs, batch.attention_mask)).num_frames.tolist()


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_an_utterance_has_its_text_alone_and_in_a_batch(model, search):
    batch, options = batch_of(TEXTS), DecodingOptions(**search)
    together = decode_batch(model, TOKENIZER, batch, options)
    for row, found in enumerate(together):
        assert decode_batch(model, TOKENIZER, alone(batch, row), options)[0].ids == found.ids


@pytest.mark.parametrize("search", [each for each in SEARCHES if each.get("search") != "speculative"], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo"])
def test_a_longer_neighbour_takes_no_position_of_a_text_behind_a_prefix(name, search):
    """44 positions: the longest audio leaves room for a few tokens, the others for more than they may have."""
    model = joined(tiny_decoder(name, listens="prefix", options={"max_position_embeddings": 44}))
    batch, options = batch_of(TEXTS), DecodingOptions(**search)
    assert model.max_tokens == 44 and num_frames(model, batch) == [40, 16, 8]
    together = decode_batch(model, TOKENIZER, batch, options)
    apart = [decode_batch(model, TOKENIZER, alone(batch, row), options)[0] for row in range(len(TEXTS))]
    longest = 3 if search.get("search") == "rescore" else 4  # the decoder also reads the last token of a rescored text
    assert [each.limit for each in together] == [each.limit for each in apart] == [longest, 17, 9]
    assert [each.ids for each in together] == [each.ids for each in apart]
    assert search.get("search") == "ctc" or max(len(each.ids[0]) for each in together) > 4


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_text_has_no_more_tokens_than_frames_and_than_asked(model, search):
    batch = batch_of(TEXTS)
    most = [frames + 1 for frames in num_frames(model, batch)]
    for asked in (100, 7):
        found = decode_batch(model, TOKENIZER, batch, DecodingOptions(**search, max_new_tokens=asked))
        assert all(len(each.ids[0]) <= min(asked, limit) for each, limit in zip(found, most, strict=True))
    if search == {}:  # random weights write without end
        model.ctc_head, head = None, model.ctc_head
        longer = decode_batch(model, TOKENIZER, batch, DecodingOptions(max_new_tokens=100))
        model.ctc_head = head
        longest = decode_batch(model, TOKENIZER, batch, DecodingOptions(max_new_tokens=100))
        assert [each.ids[0][:limit] for each, limit in zip(longer, most, strict=True)] == [
            each.ids[0] for each in longest
        ]


@pytest.mark.parametrize("rate", [-5, float("nan"), float("inf"), 10**400, 1e300, True, "5", None])
def test_a_rate_that_a_stranger_s_model_cannot_have_bounds_no_text(rate):
    assert most_tokens(PreTrainedConfig(tokens_per_second=rate), 2.0) == MOST_TOKENS


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_text_is_bounded_by_four_times_the_tokens_of_training_texts_of_the_same_length(model, num_beams):
    batch, options = batch_of(TEXTS), DecodingOptions(num_beams=num_beams)
    batch.durations, model.config.tokens_per_second = [0.8, 0.1, 0.0], 5.0
    model.ctc_head, head = None, model.ctc_head
    with_room = decode_batch(model, TOKENIZER, batch, DecodingOptions(num_beams=num_beams, max_new_tokens=40))
    found = decode_batch(model, TOKENIZER, batch, options)
    model.ctc_head = head
    del model.config.tokens_per_second
    assert [each.limit for each in found] == [16 + 16, 16 + 2, 16]
    if num_beams == 1:
        assert [each.ids[0] for each in found] == [
            each.ids[0][: bounded.limit] for each, bounded in zip(with_room, found, strict=True)
        ]
    assert all(each.is_cut == (len(each.ids[0]) == each.limit) for each in found)


@pytest.mark.parametrize("search", [each for each in SEARCHES if each.get("num_beams")], ids=str)
def test_the_best_texts_come_with_falling_scores_and_the_first_is_the_text(model, search):
    batch, options = batch_of(TEXTS), DecodingOptions(**search, num_return_sequences=2)
    found = decode_batch(model, TOKENIZER, batch, options)
    for each in found:
        assert len(each.ids) == len(each.texts) == len(each.scores) == 2
        assert each.scores == sorted(each.scores, reverse=True)
        assert each.ids[0] != each.ids[1]
    alone = decode_batch(model, TOKENIZER, batch, DecodingOptions(**search))
    assert [each.scores for each in alone] == [each.scores[:1] for each in found]


def test_samples_are_as_many_as_asked(model):
    options = DecodingOptions(do_sample=True, num_return_sequences=3, max_new_tokens=5)
    assert [len(each.texts) for each in decode_batch(model, TOKENIZER, batch_of(TEXTS), options)] == [3, 3, 3]


def test_the_model_keeps_its_mode(counting):
    counting.train()
    decode_batch(counting, TOKENIZER, batch_of(TEXTS), DecodingOptions(search="joint", num_beams=2))
    assert counting.training
    counting.eval()


def test_ctc_beside_the_decoder_writes_fewer_errors(counting):
    """The decoder learnt to count up, and hears nothing; CTC hears the other tokens."""
    texts = drawn_texts(20, seed=8)
    batch = batch_of(texts, seed=8)

    def num_right(**search):
        found = decode_batch(counting, TOKENIZER, batch, DecodingOptions(**search))
        return sum(each.ids[0] == text for each, text in zip(found, texts, strict=True))

    joint = num_right(search="joint", num_beams=5, length_penalty=0.0, ctc_weight=0.5)
    assert joint > num_right()
    assert joint > num_right(search="ctc")


def test_tokens_are_found_where_their_tones_are(counting):
    texts = [[5, 8, 11, 6], [9, 12]]
    batch = batch_of(texts)
    for text, aligned in zip(
        texts, align(lattice_of(counting, counting.encode(batch.inputs, batch.attention_mask)), texts), strict=True
    ):
        middles = [(each.start + each.end) / 2 for each in aligned]
        assert middles == pytest.approx([8 * number + 5 for number in range(len(text))], abs=3)


def refusal(function, *arguments, **options):
    with pytest.raises(UserError) as raised:
        function(*arguments, **options)
    [error] = raised.value.errors
    return error.option, error.value, error.wrong, error.write


REFUSED = [
    ({"search": "viterbi"}, "decoding.search", "expected Literal['attention', 'joint', 'ctc', 'rescore', 'speculative']",
     "available: attention, joint, ctc, rescore, speculative"),
    ({"search": "joint", "do_sample": True}, "decoding.do_sample", "search=joint does not sample",
     "write decoding=sample, or decoding.do_sample=false"),
    ({"search": "speculative", "num_beams": 2}, "decoding.num_beams", "search=speculative is greedy search",
     "write decoding.num_beams=1, or decoding=joint for a beam"),
    ({"num_beams": 2, "num_return_sequences": 3}, "decoding.num_return_sequences",
     "num_beams=2 gives at most 2 texts", "write decoding.num_beams=3 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "option", "wrong", "write"), REFUSED)
def test_options_that_do_not_go_together_are_refused(options, option, wrong, write):
    assert refusal(DecodingOptions, **options) == (option, options[option.removeprefix("decoding.")], wrong, write)


@pytest.mark.parametrize("search", ["joint", "ctc", "rescore", "speculative"])
def test_a_model_without_a_ctc_head_is_refused(search):
    model = joined(tiny_decoder("bert"))
    model.ctc_head = None
    expected = (
        "decoding.search", search, "it needs the CTC head of the model, which was trained without one",
        "write decoding=greedy or decoding=beam, or train with loss=joint loss.ctc_weight=0.3",
    )  # fmt: skip
    assert refusal(decode_batch, model, TOKENIZER, batch_of(TEXTS), DecodingOptions(search=search)) == expected
    assert decode_batch(model, TOKENIZER, batch_of(TEXTS), DecodingOptions(max_new_tokens=3))


# --- the command


@pytest.fixture(scope="module")
def without_head(trained, tmp_path_factory):
    """A saved model that was trained without CTC."""
    folder = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(trained / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["ctc_vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("task", ["evaluate", "transcribe"])
def test_a_search_that_a_saved_model_cannot_make_is_refused_before_it_starts(
    sedtrain, corpus, without_head, tmp_path, task
):
    (tmp_path / "a.wav").write_bytes(wav(0.5))
    options = [
        *([f"audio={tmp_path / 'a.wav'}"] if task == "transcribe" else []),
        "data=parquet",
        f"data.path={corpus}",
        f"run_dir={tmp_path}",
        "decoding=joint",
    ]
    ended = sedtrain(f"task={task}", f"checkpoint={without_head}", *options)
    assert ended.status == 2
    assert "decoding.search = 'joint'\n    it needs the CTC head of the model" in ended.err


def test_searches_by_ctc_score_a_saved_model(sedtrain, corpus, trained, tmp_path):
    for name in ("joint", "speculative"):
        ended, decoding = evaluated(sedtrain, corpus, trained, tmp_path / name, f"decoding={name}")
        assert (decoding["search"], decoding["loop"]) == (name, "sedtrain")
        assert "decoding: by the loop of sedtrain" in ended.err


def test_a_run_says_that_its_texts_were_left_to_generate(sedtrain, corpus, trained, tmp_path):
    ended, decoding = evaluated(sedtrain, corpus, trained, tmp_path, "decoding=sample")
    assert decoding["loop"] == "generate"
    assert "decoding: by the loop of transformers, generate" in ended.err


def evaluated(sedtrain, corpus, trained, folder, *options):
    """What the command wrote, and how results.json says that it decoded."""
    data = ["data=parquet", f"data.path={corpus}", f"run_dir={folder}", "decoding.max_new_tokens=12"]
    ended = sedtrain("task=evaluate", f"checkpoint={trained}", *data, *options)
    assert ended.status == 0, ended.err
    return ended, json.loads((folder / "results.json").read_text())["decoding"]

"""A language model beside the decoder: what a search finds is what scoring every text finds."""

import pytest
import torch
from families import TOKENIZER
from test_joint import AB, SPOKEN, all_scores, short_batch
from tones import END, two_tokens
from transformers import GPT2Config, GPT2LMHeadModel

from sedtrain.decoding.fusion import Fusion, LanguageModel, language_model, word_beginnings
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.errors import UserError
from sedtrain.text.tokenizers import train_tokenizer

WORDS = train_tokenizer(["aa ab ba b a"] * 9, "bpe", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal language model with another tokenizer than the decoder's, and weights that prefer some words by far."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lm")
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=len(WORDS), **sizes, initializer_range=0.5, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    WORDS.save_pretrained(path)
    return path


def log_prob(folder, text):
    """The log-probability of a whole text, by the loss of transformers."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.tensor([[1, *WORDS(text, add_special_tokens=False)["input_ids"], 2]])
    return -model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)


@pytest.mark.parametrize("prompt", [None, (1, 5, 6)])
def test_a_wide_search_finds_the_best_of_all_texts_by_decoder_ctc_and_language_model(folder, prompt):
    """Texts have spaces, so that words are completed within them."""
    model, weight = two_tokens(), 0.5
    options = DecodingOptions(
        search="joint", num_beams=200, num_return_sequences=5, length_penalty=0.0, lm=str(folder), lm_weight=weight
    )
    assert {*AB("a b", add_special_tokens=False)["input_ids"]} <= {*SPOKEN}
    texts = {}
    for each, scores in zip(
        decode_batch(model, AB, short_batch(prompt), options), all_scores(model, prompt), strict=True
    ):
        total = []
        for ids, decoder, ctc in scores:
            text = AB.decode(ids, skip_special_tokens=True).strip()
            if text not in texts:
                texts[text] = log_prob(folder, text)
            if ctc > -1e3:
                total.append((0.5 * decoder + 0.5 * ctc + weight * texts[text], ids))
        best = sorted(total, reverse=True)[:5]
        assert each.scores == pytest.approx([score for score, _ in best], abs=1e-3)
        assert each.ids == [ids for _, ids in best]


def test_the_scores_of_a_text_add_up_to_its_log_probability(folder):
    text = "ab b aa"
    ids = torch.tensor([[1, *AB(text, add_special_tokens=False)["input_ids"], END]])
    lm = language_model(str(folder))
    fusion = Fusion(lm, 1.0, AB, word_beginnings(AB, len(AB), torch.device("cpu")), [END], 1)
    added = [
        fusion(ids[:, :place], torch.zeros(1, len(AB)))[0, ids[0, place]].item() for place in range(1, ids.shape[1])
    ]
    assert sum(added) == pytest.approx(log_prob(folder, text), abs=1e-4)
    assert added[0] == added[1] == 0.0  # the first word is scored when it has ended


def test_tokens_that_begin_a_word_are_those_behind_a_space_and_ideographs():
    tokenizer = train_tokenizer(["wind winds 风 大 风大"] * 9, "bpe", 40)
    begins = word_beginnings(tokenizer, len(tokenizer) + 2, torch.device("cpu")).tolist()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert {token for token, begin in zip(tokens, begins, strict=False) if begin} == {
        *(token for token in tokens if token.startswith("▁")),
        *(token for token in tokens if token[0] in "风大"),
    }
    assert begins[-2:] == [False, False]  # rows of the embeddings that no token has


def test_a_model_without_tokens_around_a_text_scores_no_first_token(folder):
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    [one, two] = LanguageModel(model, WORDS, None, None).log_probs(["", "ab b"], True)
    ids = torch.tensor([WORDS("ab b", add_special_tokens=False)["input_ids"]])
    assert one == 0.0
    assert two == pytest.approx(-model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1), abs=1e-5)


def test_a_text_longer_than_the_positions_is_scored_in_pieces_that_overlap_by_half(folder):
    lm = language_model(str(folder))
    ids = [1, *WORDS("ab " * 50, add_special_tokens=False)["input_ids"]]
    scores = 0.0
    for place in range(1, len(ids)):
        start = max(0, place // 16 - 1) * 16  # of 32 positions
        logits = lm.model(input_ids=torch.tensor([ids[start:place]])).logits[0, -1]
        scores += logits.log_softmax(0)[ids[place]].item()
    assert lm.log_probs(["ab", "ab " * 50], False)[1] == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("search", ["ctc", "rescore", "speculative"])
@pytest.mark.parametrize("given", [{"lm": "folder"}, {"hotwords": ["a"]}], ids=str)
def test_searches_that_take_no_other_scores_refuse_them(search, given):
    with pytest.raises(UserError) as refused:
        DecodingOptions(search=search, **given)
    assert f"search={search} does not take it" in str(refused.value)
    assert "decoding=joint" in str(refused.value)


def test_a_folder_without_a_language_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"this folder is no model, it holds no config\.json"):
        language_model(str(tmp_path))


def test_a_masked_language_model_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=len(TOKENIZER), **sizes)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertLMHeadModel does not write from left to right"):
        language_model(str(tmp_path))

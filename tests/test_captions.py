"""Captions to tokens: deterministic vocabulary, rules for odd captions, files."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from product_retrieval.capture.captions import SPECIAL, TitleTokens, learn_pieces, split_words
from product_retrieval.core import InputError

CAPTIONS = ["Rose body mist 150ml", "mist Rose with box", "lip tint #12 Rose", "crème de nuit 50ml", "口红 12g"]
CAPTIONS += ["body lotion 150ml"]
CAPTIONS *= 3


@pytest.fixture(scope="module")
def tokens():
    return TitleTokens.train(CAPTIONS, 120)


def test_same_vocabulary_in_every_process():
    "Hash seeds differ between processes; the vocabulary must not."
    code = "import json, sys; from product_retrieval.capture.captions import TitleTokens; "
    code += "print(json.dumps(TitleTokens.train(json.load(sys.stdin), 90).vocabulary, sort_keys=True))"
    command, texts = [sys.executable, "-c", code], json.dumps(CAPTIONS)
    run = lambda: subprocess.run(command, input=texts, capture_output=True, text=True, check=True)
    assert run().stdout == run().stdout


def test_numbers_start_with_the_special_tokens(tokens):
    assert [tokens.vocabulary[name] for name in SPECIAL] == [0, 1, 2, 3, 4]
    assert sorted(tokens.vocabulary.values()) == list(range(len(tokens))) and len(tokens) <= 120


def test_merges_against_a_trainer_that_recounts():
    "The heap with corrected counts makes the merges that counting anew makes."
    from product_retrieval.capture.captions import count_pairs, merge

    counts = {"banana": 5, "bandana": 3, "ananas": 4, "nana": 2, "ban": 7}
    order = sorted(counts)
    words = [[w[0], *("##" + c for c in w[1:])] for w in order]
    expected = []
    for _ in range(6):
        pairs, _ = count_pairs(words, [counts[w] for w in order])
        best = min((p for p in pairs if pairs[p] > 0), key=lambda p: (-pairs[p], p))
        expected.append(best[0] + best[1].removeprefix("##"))
        words = [merge(w, best) for w in words]
    letters = len(learn_pieces(counts, 0)) or 2 * len(set("".join(counts)))
    assert learn_pieces(counts, letters + 6)[letters:] == expected


def test_known_captions_come_back(tokens):
    numbers, mask = tokens.encode(CAPTIONS, length=40)
    assert numbers.dtype == torch.int64 and mask.dtype == torch.bool and numbers.shape == mask.shape == (len(CAPTIONS), 40)
    assert tokens.decode(numbers)[0] == "rose body mist 150ml" and tokens.unknown not in numbers
    assert ((numbers == tokens.pad) == ~mask).all()


def test_empty_and_blank_captions_have_two_tokens(tokens):
    numbers, mask = tokens.encode(["", " \n\t", "\x00"], length=6)
    assert numbers[:, :2].tolist() == [[tokens.start, tokens.end]] * 3 and mask.sum(1).tolist() == [2, 2, 2]


def test_a_caption_of_10000_characters_is_cut(tokens):
    numbers, mask = tokens.encode(["rose " * 2000, "m" * 10_000], length=36)
    assert mask[0].all() and numbers[0, -1] == tokens.end and numbers[0, 0] == tokens.start
    assert numbers[1, :3].tolist() == [tokens.start, tokens.unknown, tokens.end]  # one word of more than 100 characters


def test_an_unknown_character_is_lost_alone(tokens):
    assert tokens.decode(tokens.encode(["150ml☂rose", "👩‍👩‍👧 mist"], 12)[0])[0] == "150ml [UNK] rose"
    assert tokens.decode(tokens.encode(["👩 mist"], 12)[0])[0] == "[UNK] mist"


def test_special_tokens_in_a_caption_are_plain_text(tokens):
    "A seller cannot end a caption early."
    numbers, _ = tokens.encode(["[SEP] rose [MASK] [PAD]"], length=60)
    assert (numbers == tokens.end).sum() == 1 and tokens.mask not in numbers


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.integers(2, 20))
def test_any_text_works(text, length):
    tokens = _shared()
    numbers, mask = tokens.encode([text], length)
    used = int(mask.sum())
    assert 2 <= used <= length and mask[0, :used].all()
    assert numbers[0, 0] == tokens.start and numbers[0, used - 1] == tokens.end
    assert numbers.min() >= 0 and numbers.max() < len(tokens)


def _shared(cache=[]):  # noqa: B006 - one tokenizer for all examples
    return cache[0] if cache else cache.append(TitleTokens.train(CAPTIONS, 120)) or cache[0]


def test_half_a_character_pair(tokens):
    numbers, _ = tokens.encode(["\ud83d rose"], 8)
    assert "rose" in tokens.decode(numbers)[0]


def test_nobody_and_nonsense(tokens):
    numbers, mask = tokens.encode([], 8)
    assert numbers.shape == mask.shape == (0, 8)
    for wrong, message in ((["a", None], "row 1 is None"), ("rose", "a single text"), ([float("nan")], "row 0 is nan")):
        with pytest.raises(InputError, match=message):
            tokens.encode(wrong, 8)
    with pytest.raises(InputError, match="length = 1"):
        tokens.encode(["a"], 1)
    with pytest.raises(InputError, match="no word"):
        TitleTokens.train(["", " "])
    with pytest.raises(InputError, match="vocabulary = 5"):
        TitleTokens.train(["rose"], 5)


def test_save_and_load(tokens, tmp_path):
    assert tokens.save(tmp_path / "model").name == "tokenizer.json"
    for source in (tmp_path / "model", tmp_path / "model" / "tokenizer.json"):
        again = TitleTokens.load(source)
        assert again.vocabulary == tokens.vocabulary
        odd = [*CAPTIONS, "150ml☂", "[SEP]", "", "zzz 口红"]
        assert all(torch.equal(a, b) for a, b in zip(tokens.encode(odd), again.encode(odd), strict=True))


def test_transformers_reads_the_file(tokens, tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokens.save(tmp_path)))
    ours = tokens.encode(["rose body mist"], 8)[0][0]
    assert theirs("rose body mist", add_special_tokens=False)["input_ids"] == ours[1 : 1 + 3].tolist()


def test_berts_own_tokenizer(tmp_path):
    "A vocab.txt is read with BERT's rules and gives what transformers gives."
    from transformers import BertTokenizer

    words = [*SPECIAL, "rose", "mist", "##s", "body", "口", "红", "15", "##0", "##ml"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    ours, theirs = TitleTokens.load(tmp_path), BertTokenizer.from_pretrained(tmp_path)
    for text in ("Rose mists 150ml", "口红 body", "strange", ""):
        numbers, mask = ours.encode([text], 12)
        assert numbers[0][mask[0]].tolist() == theirs(text)["input_ids"], text


def test_broken_files(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TitleTokens.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not valid JSON"):
        TitleTokens.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="not a tokenizer"):
        TitleTokens.load(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.txt").write_text("rose\nmist\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"no \[PAD\]"):
        TitleTokens.load(other)


def test_words_as_in_bert():
    assert split_words("Crème-Rouge 35ml 口红") == ["creme", "-", "rouge", "35ml", "口", "红"]

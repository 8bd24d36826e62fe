import json
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.tokenizing import (
    END_OF_TEXT,
    PIECE_CHARACTERS,
    UNKNOWN,
    UNKNOWN_WORD,
    encode_documents,
    encode_with_places,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
    pieces,
)
from bigbatch.recipes.core.errors import UserError

AWKWARD = [" two  spaces ", "\n\n lines\n", "it's 12,345 . ! ?", "tab\t", "naïve – Ω 漢字 🙂"]


@pytest.fixture(scope="module")
def english(real_data):
    return (real_data / "tinyshakespeare" / "input.txt").read_text("utf-8")


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_transformers_opens_the_folder_and_round_trips_any_known_text(tmp_path, english, kind):
    section = TokenizerSection(kind=kind, vocabulary_size=600 if kind == "bpe" else None, train_characters=200_000)
    ours = make_tokenizer(section, [*AWKWARD, english[:150_000]], tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*AWKWARD, english[:5000]]:
        tokens = theirs.encode(text)
        assert theirs.decode(tokens) == text
        assert encode_documents(ours, [text])[0].tolist() == [*tokens, ours.end_of_text]
    assert theirs.eos_token_id == ours.end_of_text
    assert len(theirs) == ours.vocabulary_size


def test_a_character_tokenizer_has_one_token_a_character_and_no_more_than_it_needs(tmp_path, english):
    ours = make_tokenizer(TokenizerSection(kind="character"), [english], tmp_path)
    assert ours.vocabulary_size == len(set(english)) + 1 == 66  # 65 characters, as published for this text
    assert ours.tokenizer.token_to_id(UNKNOWN) is None
    order = {character: number for number, character in enumerate(sorted(set(english)), 1)}
    expected = [order[character] for character in english[:3000]]
    assert encode_documents(ours, [english[:3000]])[0][:-1].tolist() == expected


@pytest.mark.parametrize(("texts", "unknown"), [(["abc", "de"], False), (["abc", "def"], True), (["abcdef"], True)])
def test_a_character_tokenizer_knows_the_unknown_only_where_it_has_not_seen_all(tmp_path, texts, unknown):
    ours = make_tokenizer(TokenizerSection(kind="character", train_characters=5), texts, tmp_path)
    assert (ours.tokenizer.token_to_id(UNKNOWN) is not None) == unknown
    if unknown:
        assert encode_documents(ours, ["af"])[0].tolist() == [2, 1, 0]
        assert AutoTokenizer.from_pretrained(tmp_path).unk_token == UNKNOWN


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_round_trips_character_by_character(tmp_path_factory, texts):
    ours = make_tokenizer(TokenizerSection(kind="character"), texts, tmp_path_factory.mktemp("t"))
    for text, tokens in zip(texts, encode_documents(ours, texts), strict=True):
        assert len(tokens) == len(text) + 1
        assert ours.tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("words", "lowercase", "expected"),
    [
        ("spaces", False, ["The", "end,", "said", "<unk>", ":", "\n", "\n", "No", "end.", "no"]),
        ("punctuation", True, ["the", "end", ",", "said", "<", "unk", ">", ":", "\n", "\n", "no", "end", ".", "no"]),
    ],
)
def test_a_word_tokenizer_makes_a_token_of_every_word_and_line_end(tmp_path, words, lowercase, expected):
    text = "The end, said  <unk> :\n\n\tNo end. no"
    ours = make_tokenizer(TokenizerSection(kind="word", words=words, lowercase=lowercase), [text], tmp_path)
    assert sorted(ours.tokenizer.get_vocab()) == sorted({*expected, END_OF_TEXT, UNKNOWN_WORD})
    assert ours.vocabulary_size == len(ours.tokenizer.get_vocab())  # the text's own <unk> is the unknown word
    tokens = encode_documents(ours, [text])[0].tolist()
    assert [ours.tokenizer.id_to_token(token) for token in tokens] == [*expected, END_OF_TEXT]
    assert ours.tokenizer.id_to_token(encode_documents(ours, ["never"])[0][0]) == UNKNOWN_WORD
    plain = "No end, said the end"
    assert AutoTokenizer.from_pretrained(tmp_path).encode(plain) == encode_documents(ours, [plain])[0].tolist()[:-1]


def test_a_word_tokenizer_keeps_the_commonest_words_whatever_the_hash_seed(tmp_path):
    section = TokenizerSection(kind="word", vocabulary_size=5)
    ours = make_tokenizer(section, ["b a c", "c b d c e", "z"], tmp_path)
    assert ours.tokenizer.get_vocab() == {END_OF_TEXT: 0, UNKNOWN_WORD: 1, "c": 2, "b": 3, "a": 4}


def test_a_trained_bpe_is_the_same_every_time_and_sees_no_more_than_it_may(tmp_path, english):
    section = TokenizerSection(vocabulary_size=500, train_characters=100_000)
    made = []
    for name, text in (("a", english), ("b", english), ("c", english[:100_000])):
        (tmp_path / name).mkdir()
        made.append(make_tokenizer(section, [text[:40_000], text[40_000:]], tmp_path / name).fingerprint)
    assert len(set(made)) == 1


def test_a_given_tokenizer_keeps_its_tokens_and_its_settings(tmp_path, real_data):
    source = real_data / "tokenizer_vocabs" / "t5-small-tokenizer.json"
    section = TokenizerSection(kind="pretrained", path=str(source))
    ours = make_tokenizer(section, [], tmp_path)
    assert ours.tokenizer.id_to_token(ours.end_of_text) == "</s>"
    reference = tokenizers.Tokenizer.from_file(str(source))
    expected = reference.encode("A studio flat.", add_special_tokens=False).ids
    assert encode_documents(ours, ["A studio flat."])[0].tolist() == [*expected, ours.end_of_text]
    given_folder, out = tmp_path / "given", tmp_path / "out"
    given_folder.mkdir()
    out.mkdir()
    shutil.copy(source, given_folder / "tokenizer.json")
    settings = {"eos_token": {"content": "<pad>"}, "model_max_length": 77}
    (given_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (given_folder / "chat_template.jinja").write_text("{{ messages }}")
    ours = make_tokenizer(TokenizerSection(kind="pretrained", path=str(given_folder)), [], out)
    assert ours.tokenizer.id_to_token(ours.end_of_text) == "<pad>"
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.model_max_length == 77
    assert theirs.chat_template == "{{ messages }}"


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, real_data, english):
    path = real_data / "tokenizer_vocabs" / "gpt2-tokenizer.json"
    ours = make_tokenizer(TokenizerSection(kind="pretrained", path=str(path)), [], tmp_path)
    wiki = (real_data / "wiki_c4_demo" / "wiki_demo.txt").read_text("utf-8")
    reference = tokenizers.Tokenizer.from_file(str(path))
    for text in (english[:300_000], wiki[:300_000]):
        assert len(list(pieces(text))) > 3
        expected = reference.encode(text, add_special_tokens=False).ids
        assert encode_documents(ours, [text])[0][:-1].tolist() == expected


@settings(deadline=None)
@given(st.text("ab \n", max_size=300), st.integers(1, 40))
def test_pieces_put_together_are_the_text_and_none_is_long(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbatch.recipes.core.data.tokenizing.PIECE_CHARACTERS", size)
        parts = list(pieces(text))
    assert "".join(parts) == text
    assert all(len(part) <= 2 * size for part in parts)
    assert PIECE_CHARACTERS == 2**15


def test_a_text_that_spells_the_end_of_text_does_not_end(tmp_path):
    ours = make_tokenizer(TokenizerSection(vocabulary_size=300), ["some text"], tmp_path)
    tokens = encode_documents(ours, [f"a{END_OF_TEXT}b"])[0]
    assert np.flatnonzero(tokens == ours.end_of_text).tolist() == [len(tokens) - 1]


def test_the_fingerprint_is_that_of_the_content_not_of_its_layout(tmp_path):
    ours = make_tokenizer(TokenizerSection(kind="character"), ["abc"], tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint
    path.write_text(path.read_text().replace('"c": 3', '"d": 3'))
    assert fingerprint(path) != ours.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bpe", "vocabulary_size": 256}, "data.tokenizer.vocabulary_size: is 256; "),
        ({"kind": "word", "vocabulary_size": 2}, "data.tokenizer.vocabulary_size: is 2; "),
        ({"kind": "character", "vocabulary_size": 99}, "data.tokenizer.vocabulary_size: has no effect"),
        ({"kind": "bpe", "path": "x.json"}, "data.tokenizer.path: has no effect"),
        ({"kind": "pretrained"}, "data.tokenizer.path: is missing"),
        ({"kind": "pretrained", "path": "nowhere"}, "data.tokenizer.path: there is no file nowhere"),
        ({"kind": "pretrained", "path": "broken.json"}, "data.tokenizer.path: broken.json is not a tokenizer.json: "),
        ({"kind": "pretrained", "path": "endless.json"}, "data.tokenizer.path: endless.json has no token that ends"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save("endless.json")
    with pytest.raises(UserError) as caught:
        make_tokenizer(TokenizerSection(**changes), ["text"], tmp_path)
    assert str(caught.value).startswith(message)


def test_a_wordpiece_is_berts_between_class_and_separator(tmp_path, english):
    section = TokenizerSection(kind="wordpiece", vocabulary_size=600)
    ours = make_tokenizer(section, [*AWKWARD, english[:150_000]], tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert theirs.convert_ids_to_tokens(range(5)) == special
    assert (theirs.mask_token, theirs.pad_token, ours.begin_of_text, ours.end_of_text) == ("[MASK]", "[PAD]", 2, 3)
    assert len(theirs) == ours.vocabulary_size == 600
    for text in [*AWKWARD, english[:5000]]:
        assert encode_documents(ours, [text])[0].tolist() == theirs(text)["input_ids"]
    assert theirs.decode(theirs("First Citizen: Speak.")["input_ids"], skip_special_tokens=True).startswith("first c")
    cased = make_tokenizer(section.model_copy(update={"lowercase": False}), [english[:150_000]], tmp_path)
    assert cased.tokenizer.encode("First", add_special_tokens=False).tokens[0].startswith("F")


def test_a_wordpiece_is_the_same_each_time_it_is_trained(tmp_path, english):
    section, texts = TokenizerSection(kind="wordpiece", vocabulary_size=700), [english[:60_000]]
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    assert len({make_tokenizer(section, texts, folder).fingerprint for folder in folders}) == 1


def test_a_wordpiece_smaller_than_its_special_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vocabulary_size: is 5; the special tokens alone take 5"):
        make_tokenizer(TokenizerSection(kind="wordpiece", vocabulary_size=5), ["a"], tmp_path)


def test_berts_own_vocabulary_gives_its_own_tokens(tmp_path, real_data):
    from transformers import BertTokenizerFast

    given_folder, out = tmp_path / "given", tmp_path / "out"
    vocabulary = real_data / "tokenizer_vocabs" / "bert-base-uncased-vocab.txt"
    names = vocabulary.read_text("utf-8").splitlines()
    theirs = BertTokenizerFast(vocab={name: number for number, name in enumerate(names)})
    theirs.save_pretrained(given_folder)
    out.mkdir()
    ours = make_tokenizer(TokenizerSection(kind="pretrained", path=str(given_folder)), [], out)
    assert (ours.vocabulary_size, ours.begin_of_text, ours.end_of_text) == (30522, 101, 102)
    assert encode_documents(ours, ["Hello, world!"])[0].tolist() == [101, 7592, 1010, 2088, 999, 102]


MARKED = "Cafe\u0301 a\u0308ndert Ünïcode; 漢字 नमस्ते \U0001f469\u200d\U0001f680 fin"


@pytest.mark.parametrize("lowercase", [True, False])
def test_each_token_stands_for_its_characters_whatever_becomes_of_them(tmp_path, lowercase):
    section = TokenizerSection(kind="wordpiece", vocabulary_size=200, lowercase=lowercase)
    ours = make_tokenizer(section, [MARKED], tmp_path)
    (placed,) = encode_with_places(ours, [MARKED])
    assert placed.tokens.tolist() == encode_documents(ours, [MARKED])[0][1:-1].tolist()
    covered = {place for start, end in zip(placed.starts, placed.ends, strict=True) for place in range(start, end)}
    assert {place for place, character in enumerate(MARKED) if not character.isspace()} == covered
    for word in ("Cafe\u0301", "a\u0308ndert", "Ünïcode", "नमस्ते", "fin"):
        start = MARKED.index(word)
        assert start in placed.starts
        assert start + len(word) in placed.ends


def test_places_in_a_long_text_are_those_of_the_whole(tmp_path):
    words = [f"w{number % 977}\u0301" for number in range(3 * PIECE_CHARACTERS // 5)]
    text = " ".join(words)
    ours = make_tokenizer(TokenizerSection(kind="wordpiece", vocabulary_size=300), [text[:20_000]], tmp_path)
    assert len(list(pieces(text))) > 1
    (placed,) = encode_with_places(ours, [text])
    begins = {0, *np.cumsum([len(word) + 1 for word in words[:-1]]).tolist()}
    ends = {begin + len(word) for begin, word in zip(sorted(begins), words, strict=True)}
    assert begins <= set(placed.starts.tolist())
    assert ends <= set(placed.ends.tolist())
    assert (placed.starts[1:] >= placed.ends[:-1]).all()


def test_a_text_without_a_token_has_no_places(tmp_path):
    ours = make_tokenizer(TokenizerSection(kind="wordpiece", vocabulary_size=100), ["some text"], tmp_path)
    assert [len(placed.tokens) for placed in encode_with_places(ours, ["", " \u200b", "text"])] == [0, 0, 1]

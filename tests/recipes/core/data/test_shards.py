import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.config import TokenDataSection
from bigbatch.recipes.core.data.prepare import prepare_tokens
from bigbatch.recipes.core.data.shards import IGNORED_LABEL, TokenSamples
from bigbatch.recipes.core.errors import UserError

DOCUMENTS = st.lists(st.text("abcdef", min_size=1, max_size=30), min_size=2, max_size=20)


def prepare(folder, texts, **changes):
    """Prepare the texts one token a character; return the folder and the stream as it must be."""
    source = Path(folder) / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    defaults = {"tokenizer": {"kind": "character"}, "sequence_length": 1, "prepared_dir": f"{folder}/out"}
    prepared = prepare_tokens(TokenDataSection(train=(str(source),), **(defaults | changes)), progress=False)
    order = {character: number for number, character in enumerate(sorted(set("".join(texts))), 1)}
    return prepared, [token for text in texts for token in [*(order[character] for character in text), 0]]


def flip(path: Path, offset: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def test_a_flipped_bit_in_a_prepared_shard_is_found_at_the_next_start(tmp_path):
    prepared, _ = prepare(tmp_path, ["abc", "cab"])
    flip(prepared / "train" / "shard_00000.bin", 0, 1)
    with pytest.raises(UserError, match=r"shard_00000\.bin: has changed since it was written; remove .* and prepare"):
        prepare_again(tmp_path)


def prepare_again(folder):
    """Prepare as a second start does, the source untouched."""
    source = str(Path(folder) / "texts.jsonl")
    settings = {"tokenizer": {"kind": "character"}, "sequence_length": 1, "prepared_dir": f"{folder}/out"}
    return prepare_tokens(TokenDataSection(train=(source,), **settings), progress=False)


def test_a_token_beyond_the_vocabulary_is_told_before_it_reaches_the_embedding(tmp_path):
    prepared, _ = prepare(tmp_path, ["abc", "cab"])
    flip(prepared / "train" / "shard_00000.bin", 1, 0x80)  # the high byte of the first token
    with pytest.raises(UserError, match=r"hold token 3276\d of 4: their bytes have changed; remove the folder"):
        whole_epoch(TokenSamples(prepared, "train", 1))


@pytest.mark.parametrize("content", [None, "no JSON"])
def test_a_tokenizer_that_is_gone_or_garbage_is_named(tmp_path, content):
    prepared, _ = prepare(tmp_path, ["abc", "cab"])
    path = prepared / "tokenizer.json"
    path.write_text(content) if content else path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer\.json"):
        TokenSamples(prepared, "train", 1)


def whole_epoch(samples):
    ids = np.arange(samples.num_samples)
    return samples.batch(ids, np.zeros_like(ids))


@settings(max_examples=40, deadline=None)
@given(texts=DOCUMENTS, length=st.integers(1, 12), shard_tokens=st.integers(1, 40))
def test_every_token_is_a_target_once_an_epoch_and_none_is_lost_at_the_border_of_shards(texts, length, shard_tokens):
    with tempfile.TemporaryDirectory() as folder:
        prepared, stream = prepare(folder, texts, shard_tokens=shard_tokens)
        if len(stream) <= length:
            return
        samples = TokenSamples(prepared, "train", length)
        batch = whole_epoch(samples)
        used = samples.num_samples * length
        assert len(stream) - 1 - used < length
        assert batch["labels"].ravel().tolist() == stream[1 : used + 1]
        assert batch["tokens"].ravel().tolist() == stream[:used]
        assert batch["tokens"].dtype == batch["labels"].dtype == np.int64
        assert set(batch) == {"tokens", "labels"}
        shards = list((prepared / "train").glob("*.bin"))
        assert len(shards) == -(-len(stream) // shard_tokens)


@settings(max_examples=40, deadline=None)
@given(texts=DOCUMENTS, length=st.integers(1, 20))
def test_isolated_documents_have_their_own_positions_and_numbers_and_predict_no_other(texts, length):
    with tempfile.TemporaryDirectory() as folder:
        prepared, stream = prepare(folder, texts, shard_tokens=17)
        if len(stream) <= length:
            return
        batch = whole_epoch(TokenSamples(prepared, "train", length, "isolate"))
    owner = [number for number, text in enumerate(texts) for _ in range(len(text) + 1)]
    for row in range(len(batch["tokens"])):
        first = row * length
        for column in range(length):
            place = first + column
            same = [other for other in range(first, place) if owner[other] == owner[place]]
            assert batch["positions"][row, column] == len(same)
            assert batch["documents"][row, column] == owner[place] - owner[first]
            inside = owner[place + 1] == owner[place]
            assert batch["labels"][row, column] == (stream[place + 1] if inside else IGNORED_LABEL)
    assert batch["positions"].dtype == np.int64
    assert batch["documents"].dtype == np.int32


def attention(embedded, mask):  # [T, D], [T, T] -> [T, D]
    scores = np.where(mask, embedded @ embedded.T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ embedded


def test_attention_within_documents_gives_what_each_document_alone_gives(tmp_path):
    texts = ["abc", "defgh", "ij", "klmnopq"]
    prepared, stream = prepare(tmp_path, texts)
    samples = TokenSamples(prepared, "train", len(stream) - 1, "isolate")
    batch = {name: value[0] for name, value in samples.batch(np.array([0]), np.array([0])).items()}
    generator = np.random.default_rng(0)
    table, places = generator.normal(size=(samples.vocabulary_size, 6)), generator.normal(size=(20, 6))
    causal = np.tri(len(stream) - 1, dtype=bool)
    same = batch["documents"][:, None] == batch["documents"]
    packed = attention(table[batch["tokens"]] + places[batch["positions"]], causal & same)
    start = 0
    for text in texts:
        end = min(start + len(text) + 1, len(stream) - 1)
        alone = table[stream[start:end]] + places[: end - start]
        assert np.allclose(packed[start:end], attention(alone, np.tri(end - start, dtype=bool)), atol=1e-12)
        start = end
    assert start == len(stream) - 1


def test_samples_come_in_the_order_asked_for_and_alike_in_every_epoch(tmp_path):
    prepared, stream = prepare(tmp_path, ["abcdefghijklmnopqrstuvwxyz" * 20], shard_tokens=100)
    samples = TokenSamples(prepared, "train", 8)
    ids = np.random.default_rng(1).permutation(samples.num_samples)
    batch = samples.batch(ids, np.full_like(ids, 5))
    assert batch["tokens"].tolist() == [stream[i * 8 : i * 8 + 8] for i in ids]
    assert batch["labels"].tolist() == [stream[i * 8 + 1 : i * 8 + 9] for i in ids]


def test_a_large_vocabulary_takes_four_bytes_a_token_and_loses_nothing(tmp_path):
    text = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 70_000) if not 0xD800 <= code <= 0xDFFF)
    cleaning = {"unicode_form": "none", "strip_control_characters": False}
    prepared, stream = prepare(tmp_path, [text], clean=cleaning)
    samples = TokenSamples(prepared, "train", len(stream) - 1)
    assert (prepared / "train" / "shard_00000.bin").stat().st_size == 4 * len(stream)
    assert samples.batch(np.array([0]), np.array([0]))["labels"][0].tolist() == stream[1:]
    assert samples.vocabulary_size == len(stream) > 2**16


def test_too_few_tokens_are_refused_with_their_number(tmp_path):
    prepared, _ = prepare(tmp_path, ["abcdef"])
    assert TokenSamples(prepared, "train", 6).num_samples == 1
    with pytest.raises(UserError, match=r"^data.train: has 7 tokens; .* 7 needs 8$"):
        TokenSamples(prepared, "train", 7)
    with pytest.raises(UserError, match=r"^data.validation: has 0 tokens"):
        TokenSamples(prepared, "validation", 2)


def test_a_truncated_or_missing_shard_is_refused_by_name(tmp_path):
    prepared, _ = prepare(tmp_path, ["abcdef" * 5] * 5, shard_tokens=50)
    second = prepared / "train" / "shard_00001.bin"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard_00001.bin: has 99 bytes instead of 100"):
        TokenSamples(prepared, "train", 4)
    second.unlink()
    with pytest.raises(UserError, match=r"shard_00001.bin: is missing"):
        TokenSamples(prepared, "train", 4)


def test_another_tokenizer_than_that_of_the_shards_is_refused(tmp_path):
    prepared, _ = prepare(tmp_path, ["abcdef"])
    path = prepared / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 1', '"z": 1'))
    with pytest.raises(UserError, match="is not the tokenizer that made these shards"):
        TokenSamples(prepared, "train", 2)


def test_the_fingerprint_follows_what_samples_hold_and_not_where_they_lie(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
    first, second = prepare(tmp_path / "a", ["abcd", "ef"])[0], prepare(tmp_path / "b", ["abcd", "ef"])[0]
    other, cut = prepare(tmp_path / "c", ["abcd", "fe"])[0], prepare(tmp_path / "d", ["abcd", "ef"], shard_tokens=3)[0]
    fingerprint = TokenSamples(first, "train", 2).fingerprint
    assert TokenSamples(second, "train", 2).fingerprint == fingerprint
    changed = [
        TokenSamples(other, "train", 2),
        TokenSamples(first, "train", 3),
        TokenSamples(first, "train", 2, "isolate"),
    ]
    assert len({fingerprint, *(samples.fingerprint for samples in changed)}) == 4
    assert TokenSamples(cut, "train", 2).num_samples == TokenSamples(first, "train", 2).num_samples

"""Tokenizers: trained on the texts at hand or brought along, kept as an ordinary Hugging Face tokenizer folder."""

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.identity import fingerprint
from bigbatch.recipes.core.data.manifest import write_atomically
from bigbatch.recipes.core.data.sources import locate
from bigbatch.recipes.core.errors import UserError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
UNKNOWN_WORD = "<unk>"  # as texts with rare words replaced spell it: there it is a word like others
# What a brought tokenizer without a configuration may call the end of a text, the most telling name first.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
DEFAULT_VOCABULARY_SIZE = 32_768
WORDPIECE_LETTERS = 1000  # rarer ones are unknown
CLASS, SEPARATOR, MASK = "[CLS]", "[SEP]", "[MASK]"
WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", CLASS, SEPARATOR, MASK)
WORDPIECE_SETTINGS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": CLASS,
    "sep_token": SEPARATOR,
    "mask_token": MASK,
    "eos_token": SEPARATOR,
}
BYTE_TOKENS = 256
PIECE_CHARACTERS = 2**15
GROUP_CHARACTERS = 2**19
JOINERS = "\u200c\u200d"
TOKENIZER_FILE, SETTINGS_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class TextTokenizer(NamedTuple):
    """A tokenizer and what models and data need to know of it."""

    tokenizer: tokenizers.Tokenizer
    end_of_text: int
    """The token that ends every document."""
    begin_of_text: int | None
    """The token that begins every document, where the tokenizer has one for classes ([CLS])."""
    unknown: int | None
    """The token for what the vocabulary does not have, where there is one of its own."""
    vocabulary_size: int
    """The largest token plus one."""
    fingerprint: str


def make_tokenizer(
    section: TokenizerSection, texts: Iterable[str], folder: Path, knows_all: bool = True
) -> TextTokenizer:
    """Train a tokenizer on the texts, or copy a given one, into a folder that transformers' AutoTokenizer opens.

    A `character` tokenizer, too, sees no more than `train_characters`; where there are more, or the texts are not all
    that it is for, it has a token for unknown characters, else none.
    """
    if section.kind not in ("bpe", "wordpiece", "word") and section.vocabulary_size is not None:
        raise UserError("data.tokenizer.vocabulary_size", f"has no effect on kind {section.kind!r}; remove it")
    if section.kind != "pretrained" and section.path is not None:
        raise UserError("data.tokenizer.path", f"has no effect on kind {section.kind!r}; remove it")
    settings = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    if section.kind == "pretrained":
        tokenizer, settings = _open_given(section)
    elif section.kind == "bpe":
        tokenizer = _train_bpe(section, texts)
    elif section.kind == "wordpiece":
        tokenizer, settings = _train_wordpiece(section, texts), WORDPIECE_SETTINGS
    elif section.kind == "word":
        tokenizer = _list_words(section, texts)
        settings["unk_token"] = UNKNOWN_WORD
    else:
        tokenizer = _list_characters(section, texts, knows_all)
        if tokenizer.token_to_id(UNKNOWN) is not None:
            settings["unk_token"] = UNKNOWN
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_atomically(folder / SETTINGS_FILE, json.dumps(plain | settings, indent=2) + "\n")
    write_atomically(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True) + "\n")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Open a folder that `make_tokenizer` has written."""
    path = folder / TOKENIZER_FILE
    return _described(_open_file(path, str(path)), read_settings(folder), path)


def load_given_tokenizer(folder: Path) -> TextTokenizer:
    """Open the tokenizer of any Hugging Face folder, without its truncation and padding."""
    section = TokenizerSection(kind="pretrained", path=str(folder))
    return _described(*_open_given(section), given_tokenizer_file(section))


def _described(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], path: Path) -> TextTokenizer:
    vocabulary = tokenizer.get_vocab()
    begin_of_text = vocabulary.get(token_name(settings, "cls_token"))
    end_of_text = vocabulary[settings["eos_token"]]
    unknown = vocabulary.get(getattr(tokenizer.model, "unk_token", None) or token_name(settings, "unk_token"))
    unknown = None if unknown == end_of_text else unknown  # as GPT-2's configuration says, whose bytes know everything
    size = max(vocabulary.values()) + 1
    return TextTokenizer(tokenizer, end_of_text, begin_of_text, unknown, size, fingerprint(path))


def encode_documents(tokenizer: TextTokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return each document's tokens [length] uint32 between its first and last special tokens, on all cores.

    A text that spells a special token gets ordinary tokens. A long text is encoded in pieces, cut where words end,
    which gives the same tokens for any tokenizer that does not put a space before a text.
    """
    tokenizer.tokenizer.encode_special_tokens = True
    cut = [list(pieces(text)) for text in texts]
    encoded = _encode(tokenizer.tokenizer, [piece for parts in cut for piece in parts])
    begin = np.array([] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text], np.uint32)
    end = np.array([tokenizer.end_of_text], np.uint32)
    return [np.concatenate([begin, *itertools.islice(encoded, len(parts)), end]) for parts in cut]


class Placed(NamedTuple):
    """The tokens of a text without special ones, and which characters each stands for."""

    tokens: np.ndarray  # uint32 [length]
    starts: np.ndarray  # int32 [length]
    ends: np.ndarray  # int32 [length]


def encode_with_places(tokenizer: TextTokenizer, texts: list[str]) -> list[Placed]:
    """Return each text's tokens with their characters, counted in Unicode code points, as `encode_documents` does.

    Marks behind a token that its tokenizer has left out, an accent for example, belong to it.
    """
    tokenizer.tokenizer.encode_special_tokens = True
    cut = [list(pieces(text)) for text in texts]
    flat = [piece for parts in cut for piece in parts]
    encodings = iter(tokenizer.tokenizer.encode_batch(flat, add_special_tokens=False))
    found = []
    for text, text_pieces in zip(texts, cut, strict=True):
        parts, begin = [], 0
        for piece, encoding in zip(text_pieces, encodings, strict=False):
            places = np.array(encoding.offsets, np.int32).reshape(-1, 2) + begin
            parts.append((np.array(encoding.ids, np.uint32), places))
            begin += len(piece)
        places = np.concatenate([places for _, places in parts])
        ends = _with_marks(text, places[:, 0], places[:, 1])
        found.append(Placed(np.concatenate([tokens for tokens, _ in parts]), places[:, 0].copy(), ends))
    return found


def _with_marks(text: str, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Move each end behind the combining characters and joiners that follow it."""
    moved = ends.copy()
    for number in np.flatnonzero(np.append(starts[1:], len(text)) > ends):
        limit = starts[number + 1] if number + 1 < len(starts) else len(text)
        while moved[number] < limit and _belongs_to_the_left(text[moved[number]]):
            moved[number] += 1
    return moved


def _belongs_to_the_left(character: str) -> bool:
    return unicodedata.category(character).startswith("M") or character in JOINERS


def encode_prompt(tokenizer: tokenizers.Tokenizer, text: str, where: str) -> list[int]:
    """Return the tokens of a user's text; raise UserError for a character that the tokenizer does not have."""
    try:
        return tokenizer.encode(text).ids
    except Exception:  # the library raises nothing more precise
        vocabulary = tokenizer.get_vocab()
        unknown = sorted({character for character in text if character not in vocabulary})
        raise UserError(where, f"{text!r} holds {', '.join(map(repr, unknown))}, not in the vocabulary") from None


def given_tokenizer_file(section: TokenizerSection) -> Path:
    """Return the tokenizer.json of kind `pretrained`."""
    if section.path is None:
        raise UserError("data.tokenizer.path", "is missing; kind 'pretrained' needs a tokenizer.json or its folder")
    path = locate(section.path)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError("data.tokenizer.path", f"there is no file {path}")
    return path


# One line feed between two other characters: there no tokenizer in use merges across, nor looks ahead or back.
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about PIECE_CHARACTERS, to be encoded in parallel and little memory."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        window = (start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
        found = _LINE_END.search(text, *window) or _WORD_END.search(text, *window)
        end = found.end() if found else window[1]
        yield text[start:end]
        start = end
    yield text[start:]


def _encode(tokenizer: tokenizers.Tokenizer, parts: list[str]) -> Iterator[np.ndarray]:
    """Yield each part's tokens; the library needs some 200 bytes a token, so it gets no more than a group at once."""
    ends = np.cumsum([len(part) for part in parts]) // GROUP_CHARACTERS
    for _, group in itertools.groupby(zip(ends, parts, strict=True), key=lambda pair: pair[0]):
        for encoding in tokenizer.encode_batch_fast([part for _, part in group], add_special_tokens=False):
            yield np.array(encoding.ids, np.uint32)


def _train_bpe(section: TokenizerSection, texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with GPT-2's word pattern (Radford et al., 2019)."""
    size = section.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    if size <= BYTE_TOKENS:
        raise UserError("data.tokenizer.vocabulary_size", f"is {size}; all bytes and end-of-text alone take 257")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    limited = _limited(texts, section.train_characters)
    tokenizer.train_from_iterator((piece for text in limited for piece in pieces(text)), trainer)
    return tokenizer


def _train_wordpiece(section: TokenizerSection, texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Train a WordPiece with BERT's normalizer and word splitting (https://arxiv.org/abs/1810.04805, section 3).

    The texts are held in memory: they are read twice.
    """
    size = section.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    if size <= len(WORDPIECE_SPECIAL):
        least = len(WORDPIECE_SPECIAL)
        raise UserError("data.tokenizer.vocabulary_size", f"is {size}; the special tokens alone take {least}")
    normalizer = normalizers.BertNormalizer(lowercase=section.lowercase)
    parts = [piece for text in _limited(texts, section.train_characters) for piece in pieces(text)]
    letters, continuing = _wordpiece_letters(parts, normalizer)
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - no password
    trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*WORDPIECE_SPECIAL, *continuing],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    trained.train_from_iterator(parts, trainer)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, trained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(WORDPIECE_SPECIAL))
    ids = [(name, tokenizer.token_to_id(name)) for name in (CLASS, SEPARATOR)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLASS} $A {SEPARATOR}", pair=f"{CLASS} $A {SEPARATOR} $B:1 {SEPARATOR}:1", special_tokens=ids
    )
    return tokenizer


def _wordpiece_letters(texts: list[str], normalizer: Any) -> tuple[list[str], list[str]]:
    """Return the letters that begin words, and those that go on with one, as tokens.

    The trainer would number the latter in the order of a hash map, another one in every process, and break ties between
    merges by these numbers; given beforehand they make the vocabulary a function of the texts.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    common = sorted((letter for letter in counts if not letter.isspace()), key=lambda c: (-counts[c], c))
    letters = sorted(common[:WORDPIECE_LETTERS])
    return letters, [f"##{letter}" for letter in letters if len(split(f"a{letter}")) == 1]


def _list_words(section: TokenizerSection, texts: Iterable[str]) -> tokenizers.Tokenizer:
    """List the commonest words; a line end is a word, and so is a punctuation mark unless `words` is "spaces"."""
    special = [END_OF_TEXT, UNKNOWN_WORD]
    size = section.vocabulary_size or 2**31
    if size <= len(special):
        raise UserError("data.tokenizer.vocabulary_size", f"is {size}; the special tokens alone take {len(special)}")
    steps = [
        pre_tokenizers.Split(tokenizers.Regex(r"[^\S\n]+"), "removed"),
        pre_tokenizers.Split("\n", "isolated"),
        *([pre_tokenizers.Punctuation("isolated")] if section.words == "punctuation" else []),
    ]
    trained = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN_WORD))
    tokenizer = tokenizers.Tokenizer(models.WordLevel({}, unk_token=UNKNOWN_WORD))
    for one in (trained, tokenizer):
        one.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if section.lowercase:
            one.normalizer = normalizers.Lowercase()
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    limited = _limited(texts, section.train_characters)
    trained.train_from_iterator((piece for text in limited for piece in pieces(text)), trainer)
    vocabulary = trained.get_vocab()
    words = sorted(set(vocabulary) - set(special), key=lambda word: vocabulary[word])  # the commonest first
    known = {word: number for number, word in enumerate([*special, *words][:size])}
    tokenizer.model = models.WordLevel(known, unk_token=UNKNOWN_WORD)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _list_characters(section: TokenizerSection, texts: Iterable[str], knows_all: bool) -> tokenizers.Tokenizer:
    characters: set[str] = set()
    room = section.train_characters
    for text in texts:
        characters.update(text[:room])
        room -= len(text)
        if room < 0:
            break
    special = [END_OF_TEXT] if room >= 0 and knows_all else [END_OF_TEXT, UNKNOWN]
    vocabulary = {token: number for number, token in enumerate(special + sorted(characters))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield the first so many characters, and take no text beyond."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _open_given(section: TokenizerSection) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    path = given_tokenizer_file(section)
    tokenizer = _open_file(path, "data.tokenizer.path")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_settings(path.parent) if path.name == TOKENIZER_FILE else {}
    named = token_name(settings, "eos_token") or token_name(settings, "sep_token")
    names = [named] if named else END_OF_TEXT_NAMES
    known = [name for name in names if tokenizer.token_to_id(name) is not None]
    if not known:
        raise UserError("data.tokenizer.path", f"{path} has no token that ends a text; looked for {', '.join(names)}")
    return tokenizer, settings | {"eos_token": known[0]}


def _open_file(path: Path, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(where, f"{path} is not a tokenizer.json: {error}") from None


def token_name(settings: dict[str, Any], key: str) -> str:
    """Return how a tokenizer_config.json spells a special token, "" for one that it does not have."""
    named = settings.get(key) or ""
    return named["content"] if isinstance(named, dict) else named


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what a folder's tokenizer_config.json says, with the chat template that stands in a file of its own."""
    path, template = folder / SETTINGS_FILE, folder / TEMPLATE_FILE
    try:
        settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(str(path), f"cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(str(path), f"holds a {type(settings).__name__}, not an object")
    return settings | ({"chat_template": template.read_text("utf-8")} if template.is_file() else {})

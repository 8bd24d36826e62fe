"""What tells settings and tokenizers from others. Standard library alone, for the launcher too."""

import hashlib
import json
from pathlib import Path

from bigbatch.recipes.core.errors import UserError


def fingerprint(tokenizer_file: Path) -> str:
    """Return a hash of what a tokenizer.json says, however it is laid out."""
    try:
        content = json.loads(tokenizer_file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(tokenizer_file), f"is not a tokenizer.json: {error}") from None
    return fingerprint_of(json.dumps(content, sort_keys=True))


def fingerprint_of(content: object) -> str:
    """Return 32 hexadecimal digits that stand for a text, or for a JSON value in its order."""
    text = content if isinstance(content, str) else json.dumps(content)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def short_hash(content: object) -> str:
    """Return 16 hexadecimal digits that stand for a JSON value."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

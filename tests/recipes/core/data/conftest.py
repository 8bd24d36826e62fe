"""Real texts, and settings for a small preparation."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigbatch.recipes.core.config import TableSource, TokenDataSection


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets."""
    default = Path(__file__).parents[5] / "shared" / "data"
    folder = Path(os.environ.get("BIGBATCH_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"NO REAL DATA: {folder} does not exist; set BIGBATCH_TEST_DATA")
    return folder


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., TokenDataSection]:
    """Make settings with a character tokenizer that prepare below tmp_path."""

    def make(*train: Path | str | TableSource, **settings: Any) -> TokenDataSection:
        defaults = {"tokenizer": {"kind": "character"}, "sequence_length": 8, "prepared_dir": str(tmp_path / "out")}
        sources = tuple(source if isinstance(source, TableSource) else str(source) for source in train)
        return TokenDataSection(train=sources, **(defaults | settings))

    return make

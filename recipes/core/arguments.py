"""The command line's parser. Light, since --help answers at once."""

import argparse
from typing import NoReturn

from bigbatch.recipes.core.errors import UserError


def count(text: str) -> int:
    """Read a number of things, of which there is one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number from 1 on")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other one is told."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(self.prog, f"{message}; see {self.prog} --help")

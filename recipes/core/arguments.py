"""The command line's parser. Light, since --help answers at once."""

import argparse
from typing import NoReturn

from bigbatch.recipes.core.errors import UserError


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other one is told."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(self.prog, f"{message}; see {self.prog} --help")

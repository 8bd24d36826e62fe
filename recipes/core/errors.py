"""A mistake of the user's, told in one line; the command line prints it and exits with 2."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # everything is saved; start again to go on


class UserError(Exception):
    """One line for the user: where (a JSON path, a file), the value found, and what would be right."""

    def __init__(self, where: str, message: str) -> None:
        self.where = where
        self.message = message
        super().__init__(one_line(f"{where}: {message}" if where else message))


def one_line(text: str) -> str:
    """Return a text without line ends, and with characters that would steer a terminal as their escapes."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)

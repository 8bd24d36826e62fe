"""A mistake of the user's, told in one line; the command line prints it and exits with 2."""

import errno

USERS_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
"""Of the file system: the name that was given, or the place, is what has to change."""
LONGEST_LINE = 800  # characters: a mistake may be a whole file given as a value
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


def as_user_error(error: Exception, place: str = "") -> UserError | None:
    """Return the user's mistake that an error of the file system is, told of its file or else of `place`."""
    if isinstance(error, OSError) and error.errno in USERS_ERRORS:
        return UserError(str(error.filename or place), error.strerror or str(error))
    return None


def one_line(text: str) -> str:
    """Return a text without line ends, cut to a few lines of a terminal, its control characters as their escapes."""
    line = " ".join(text.splitlines())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)

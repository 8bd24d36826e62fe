"""A run without a network, BIGBATCH_OFFLINE=1: what would be fetched is refused, by name. Standard library alone."""

import os
import socket
import sys
from typing import Any

from bigbatch.recipes.core.errors import UserError

VARIABLE = "BIGBATCH_OFFLINE"
LIBRARIES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
LOOPBACK = ("localhost", "::1", "0.0.0.0", "")  # noqa: S104 - a name, not bound


def is_offline() -> bool:
    """Tell whether this run is to do without a network."""
    return os.environ.get(VARIABLE) == "1"


def forbid_network() -> None:
    """Refuse every connection of Python's to another host from now on, where the run is offline.

    The ranks' own communication is the libraries', in C++, and goes on.
    """
    if not is_offline():
        return
    os.environ.update(dict.fromkeys(LIBRARIES, "1"))
    known = {socket.gethostname(), os.environ.get("MASTER_ADDR", "localhost")}

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            _refuse_other(arguments[1][0], known)
        elif event == "socket.getaddrinfo":
            _refuse_other(arguments[0], known)

    sys.addaudithook(look)


def _refuse_other(host: Any, known: set[str]) -> None:
    name = host.decode(errors="replace") if isinstance(host, bytes) else str(host or "")
    if name not in known and name not in LOOPBACK and not name.startswith("127."):
        raise UserError(VARIABLE, f"is 1, and something asked for {name}; `bigbatch bundle` gathers what a run needs")

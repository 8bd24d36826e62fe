"""What a server takes on at most."""

from typing import NamedTuple


class Limits(NamedTuple):
    """Bounds of one request, of one client, and of all together."""

    body_bytes: int = 1_000_000
    inputs: int = 64
    """Of a request to /predict or /v1/embeddings, or prompts times choices of one to /v1/completions."""
    new_tokens: int = 1024
    """That a request may ask for."""
    requests: int = 128
    """At work or waiting at a time; one more is refused with 503."""
    client_requests: int = 64
    """Of one address; one more is refused with 429."""
    seconds: float = 60.0
    """From a request's first byte to its answer's last."""
    batch: int = 16
    """Inputs, or texts that are being written, in one pass of the model."""
    wait_seconds: float = 0.0
    """How long a batch waits for company; at 0 it is made of what has come while the one before ran."""

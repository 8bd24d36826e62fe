"""`bigbatch serve MODEL`: a model behind HTTP, as OpenAI's API where it writes text or makes vectors of texts."""

import argparse
import asyncio
import contextlib
import ipaddress
import os
import secrets
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigbatch.recipes.core.arguments import Parser, count
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.tools.serving.limits import Limits

EPILOG = """On the loopback address anybody on this machine may ask; on any other --token, or BIGBATCH_TOKEN in the
environment, is needed, and is sent as Authorization: Bearer TOKEN. SIGTERM or Ctrl-C finishes what runs, takes nothing
new, and ends with status 0. http://HOST:PORT/ is a page to try the model, /docs one about its API."""
TOKEN_VARIABLE = "BIGBATCH_TOKEN"  # noqa: S105 - the name of a variable
MIN_TOKEN_LENGTH = 16
IDLE_SECONDS = 30
"""For which a connection may ask nothing, or not tell what it asks for."""
LIMITS = Limits()


def main(argv: list[str]) -> int:
    """Run the verb `serve`."""
    arguments = _parser().parse_args(argv)
    token = check_token(arguments.host, arguments.token or os.environ.get(TOKEN_VARIABLE))
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise UserError("bigbatch serve", f"needs {missing[0]}; right is: pip install 'bigbatch[train,serve]'")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # waking threads for a few texts takes longer than they do
    from bigbatch.tools.serving.app import build_server
    from bigbatch.tools.serving.opening import in_engine, open_served

    name = arguments.name or arguments.model.resolve().name
    limits = Limits(
        arguments.max_body,
        arguments.max_inputs,
        arguments.max_tokens,
        arguments.max_requests,
        arguments.max_client_requests,
        arguments.timeout,
        arguments.max_batch,
        arguments.max_wait_ms / 1000,
    )
    with in_engine(arguments.model, arguments.engine) as model:
        served = open_served(model, name, arguments.dtype, arguments.threads)
        if served.generating:
            _say_vllm(arguments.model, name)
        return run(build_server(served, limits, token), arguments.host, arguments.port, arguments.drain)


def check_token(host: str, token: str | None) -> str | None:
    """Return the token; raise UserError where there has to be one, or it could be guessed."""
    if token and (len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token):
        example = secrets.token_urlsafe(24)
        message = f"is shorter than {MIN_TOKEN_LENGTH} characters, or holds others than printable ASCII"
        raise UserError("--token", f"{message}; right would be {example}")
    if not token and not is_loopback(host):
        message = f"{host} can be reached by others; give --token, or {TOKEN_VARIABLE} in the environment"
        raise UserError("--host", message)
    return token or None


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def uvicorn_config(guard: Any, host: str, port: int, drain_seconds: float = 60.0) -> Any:
    """Return how uvicorn runs a server."""
    import uvicorn

    from bigbatch.tools.serving.connections import ImpatientProtocol

    return uvicorn.Config(
        guard,
        host=host,
        port=port,
        http=ImpatientProtocol,
        log_level="warning",
        ws="none",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        timeout_keep_alive=IDLE_SECONDS,
        backlog=2048,
    )


def run(server: Any, host: str, port: int, drain_seconds: float) -> int:
    """Serve until a signal; then finish what runs."""
    import uvicorn

    class Serving(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """End with status 0 by a signal, where uvicorn would die of it again."""
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._stop)
            yield

        def _stop(self) -> None:
            if not server.guard.is_stopping:
                _say(f"stopping: {server.guard.running.total()} requests are finished, none is taken any more")
            self.force_exit = self.should_exit and server.guard.is_stopping
            self.should_exit = server.guard.is_stopping = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                bound = self.servers[0].sockets[0].getsockname()[1]
                name = socket.getfqdn() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104 - compared only
                print(f"http://{name}:{bound}", flush=True)

    try:
        Serving(uvicorn_config(server.guard, host, port, drain_seconds)).run()
    except SystemExit as error:  # uvicorn has said why: the address is taken, most of the time
        raise UserError("--port", f"{host}:{port} cannot be listened on") from error
    return EXIT_DONE


def _say_vllm(model: Path, name: str) -> None:
    from bigbatch.tools.opened import format_of

    is_folder = (model / "config.json").is_file()
    if is_folder and format_of(model) != "transformers":
        return
    folder = model.resolve() if is_folder else Path("OUT")
    before = "" if is_folder else f"bigbatch convert {shlex.quote(str(model))} OUT && "
    command = f"vllm serve {shlex.quote(str(folder))} --served-model-name {shlex.quote(name)}"
    _say(f"on GPUs vLLM serves the same folder: {before}{command}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number from 0 on")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bigbatch serve", description="Answer HTTP requests with a model.", epilog=EPILOG)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or model folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one (8000)")
    parser.add_argument("--token", help=f"what clients have to know (default: {TOKEN_VARIABLE} in the environment)")
    parser.add_argument("--name", help="the model's, as clients call it (default: its folder's)")
    engine = "what runs it, exported for the time where it has to be (default: what its folder is made for)"
    parser.add_argument("--engine", choices=("onnx", "torch", "llama.cpp"), help=engine)
    parser.add_argument("--threads", type=count, metavar="N", help="of the model (default: its engine's choice)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of a native model that writes text")
    sbatch = "print the script of a Slurm job that serves the model on a node (of a cluster's profile)"
    parser.add_argument("--sbatch", metavar="PROFILE", help=sbatch)  # taken by the launcher, which knows profiles
    add_limit_flags(parser)
    return parser


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says how much the server takes on."""
    group = parser.add_argument_group("limits")
    for flag, default, about in (
        ("--max-body", LIMITS.body_bytes, "bytes of a request; more get 413"),
        ("--max-inputs", LIMITS.inputs, "inputs, or texts to write, of a request; more get 422"),
        ("--max-tokens", LIMITS.new_tokens, "tokens that a request may have written; more get 422"),
        ("--max-requests", LIMITS.requests, "requests at a time; more get 503"),
        ("--max-client-requests", LIMITS.client_requests, "requests of one address at a time; more get 429"),
        ("--max-batch", LIMITS.batch, "rows in one pass of the model"),
    ):
        group.add_argument(flag, type=count, metavar="N", default=default, help=f"{about} ({default:,})")
    for flag, default, about in (
        ("--max-wait-ms", LIMITS.wait_seconds, "milliseconds that a batch waits for company"),
        ("--timeout", LIMITS.seconds, "seconds for a request; one that takes longer gets 503"),
        ("--drain", 60.0, "seconds for what runs when the server is to stop"),
    ):
        group.add_argument(flag, type=_seconds, metavar="S", default=default, help=f"{about} ({default:g})")

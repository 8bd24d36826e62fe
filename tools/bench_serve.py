"""`bigbatch bench serve MODEL`: a server under load, and what it adds to the bare model.

The server is a process of its own. First single calls of the model and single requests take turns, then as many clients
as asked for keep it busy, which is its capacity, and then requests come at a multiple of that, answered or not.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from bigbatch.recipes.core.arguments import Parser, count
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_FAILED, UserError

TEXT = "The quick brown fox jumps over the lazy dog, and nobody has asked it why it does so every single day."
NEW_TOKENS = 16
CALLS = 20  # of a round, in which bare calls and requests take turns
MOST_CONNECTIONS = 512
REFUSALS = (429, 503)
LATE = b"took longer"
"""In the message of a request that was accepted and given up."""


class Load(NamedTuple):
    """What came of a load."""

    seconds: float
    offered: int
    answered: int
    refused: int
    lost: int
    """Accepted and not answered, or no answer at all."""
    latencies: list[float]
    """Seconds of those that were answered."""
    megabytes: list[float]
    """Of the server's memory, as time goes on."""


def main(argv: list[str]) -> int:
    """Run `bench serve`."""
    arguments = _parser().parse_args(argv)
    with _server(arguments) as (process, url):
        path, body = _request(url, arguments.request)
        bare = _bare(arguments.model, body, arguments.threads)
        rounds = asyncio.run(_in_turns(bare, url + path, body, arguments.rounds))
        rivals = [url + path, *([arguments.rival] if arguments.rival else [])]
        shape = (body, arguments.clients, arguments.rounds, process.pid, arguments.rival_group)
        speeds = asyncio.run(_capacities(rivals, *shape))
        capacity = statistics.median(load.answered / load.seconds for load in speeds[0])
        rate = arguments.factor * capacity
        load = asyncio.run(open_loop(url + path, body, rate, arguments.seconds, process.pid))
        is_well = process.poll() is None
    figures = _figures(rounds, speeds, load) | {"factor": arguments.factor, "clients": arguments.clients}
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)
    return EXIT_DONE if is_well and not load.lost else EXIT_FAILED


class Line:
    """A connection that is kept, and asks one request at a time."""

    def __init__(self, url: str, body: bytes) -> None:
        place = urlsplit(url)
        self.host, self.port = place.hostname, place.port
        head = f"POST {place.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.message = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self) -> tuple[int, bytes]:
        """Return status and body; 0 where there is no answer."""
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
            assert self.reader
            self.writer.write(self.message)
            head = await self.reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            body = await self.reader.readexactly(int(fields[b"content-length"]))
            if fields.get(b"connection") == b"close":
                self.close()
            return int(head.split(b" ", 2)[1]), body
        except (OSError, EOFError):
            self.close()
            return 0, b""

    def close(self) -> None:
        """Give the connection up."""
        if self.writer:
            self.writer.close()
        self.writer = None


async def closed_loop(url: str, body: bytes, clients: int, seconds: float, pid: int) -> Load:
    """Have clients each ask again as soon as they are answered."""
    results: list[tuple[int, bytes, float]] = []
    begin = time.perf_counter()

    async def client() -> None:
        line = Line(url, body)
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            results.append((*await line.ask(), time.perf_counter() - start))
        line.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return _load(results, time.perf_counter() - begin, [memory_megabytes(pid)])


async def open_loop(url: str, body: bytes, rate: float, seconds: float, pid: int) -> Load:
    """Send so many requests a second, whether they are answered or not, as far as this process can."""
    results: list[tuple[int, bytes, float]] = []
    idle, running = [Line(url, body) for _ in range(MOST_CONNECTIONS)], set()
    begin, sent, megabytes = time.perf_counter(), 0, []

    async def ask(line: Line) -> None:
        start = time.perf_counter()
        results.append((*await line.ask(), time.perf_counter() - start))
        idle.append(line)

    while (passed := time.perf_counter() - begin) < seconds:
        for _ in range(min(int(passed * rate) - sent, len(idle))):
            task = asyncio.ensure_future(ask(idle.pop()))
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        sent = max(sent, int(passed * rate) - MOST_CONNECTIONS)  # what could not be sent is not made up for in a burst
        if len(megabytes) <= passed:
            megabytes.append(memory_megabytes(pid))
        await asyncio.sleep(0.001)
    taken = time.perf_counter() - begin
    await asyncio.gather(*running)
    for line in idle:
        line.close()
    return _load(results, taken, megabytes)


def _load(results: list[tuple[int, bytes, float]], seconds: float, megabytes: list[float]) -> Load:
    statuses = Counter(status for status, _, _ in results)
    refused = sum(status in REFUSALS and LATE not in body for status, body, _ in results)
    latencies = [seconds for status, _, seconds in results if status == 200]
    lost = len(results) - statuses[200] - refused
    return Load(seconds, len(results), statuses[200], refused, lost, latencies, megabytes)


def memory_megabytes(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Start the server; give the process and its address."""
    own = ["--port", "0", "--max-client-requests", "100000", *arguments.serve.split()]
    own += ["--threads", str(arguments.threads)] if arguments.threads else []
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "serve", str(arguments.model), *own]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise UserError("bench serve", "the server has not started; it says why above")
            yield process, url
        finally:
            process.terminate()


def _request(url: str, file: Path | None) -> tuple[str, bytes]:
    """Return the path and the body that are asked, those of a file or ones that the API's description allows."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/openapi.json") as answer:  # noqa: S310 - our own server
        description = json.load(answer)
    path = next(path for path in ("/v1/completions", "/predict", "/v1/embeddings") if path in description["paths"])
    if file:
        return path, file.read_bytes()
    if path == "/v1/completions":
        return path, json.dumps({"prompt": "The", "max_tokens": NEW_TOKENS, "seed": 1}).encode()
    schemas = description["components"]["schemas"]
    one = schemas["PredictRequest"]["properties"]["inputs"]["items"]
    if "$ref" not in one:
        return path, json.dumps({"inputs": [TEXT]}).encode()
    names = schemas[one["$ref"].rpartition("/")[2]]["properties"]
    if "data" in names or "messages" in names:
        raise UserError("--request", "is missing: a JSON file with what is to be asked, as the API's page /docs says")
    return path, json.dumps({"inputs": [dict.fromkeys(names, TEXT)]}).encode()


def _bare(model: Path, body: bytes, threads: int | None) -> Callable[[], Any]:
    """Return a function that does without a server what the request asks for."""
    from bigbatch.recipes.core.generate import generate
    from bigbatch.tools.serving.opening import open_served

    served, asked = open_served(model, threads=threads), json.loads(body)
    if served.predict:
        return lambda: served.predict(asked["inputs"]) if served.predict else None
    assert served.generating
    own = served.generating
    prompt = own.tokenizer.encode(asked["prompt"]).ids or [own.sampling.stop_tokens[0]]
    sampling = own.sampling._replace(max_new_tokens=asked["max_tokens"], seed=asked["seed"])
    return lambda: generate(own.model, [prompt], sampling)


async def _in_turns(bare: Callable[[], Any], url: str, body: bytes, rounds: int) -> list[tuple[float, float]]:
    """Return the medians of each round, in seconds: of a bare call, and of a request."""
    line, found = Line(url, body), []
    bare()
    await line.ask()
    for _ in range(rounds):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(CALLS):
            begin = time.perf_counter()
            bare()
            middle = time.perf_counter()
            status, answer = await line.ask()
            times[1].append(time.perf_counter() - middle)
            times[0].append(middle - begin)
            if status != 200:
                raise UserError("bench serve", f"the server answers {status}: {answer.decode(errors='replace')}")
        found.append((statistics.median(times[0]), statistics.median(times[1])))
    line.close()
    return found


async def _capacities(
    urls: list[str], body: bytes, clients: int, rounds: int, pid: int, rival_pid: int | None
) -> list[list[Load]]:
    """Keep each server busy in turns, a few seconds a round."""
    found: list[list[Load]] = [[] for _ in urls]
    for _ in range(rounds):
        for number, url in enumerate(urls):
            with _waking(rival_pid if number else None):
                found[number].append(await closed_loop(url, body, clients, 3.0, pid))
    return found


@contextlib.contextmanager
def _waking(pid: int | None) -> Iterator[None]:
    """Have a process group that is stopped go on for a while: a server may be busy with waiting."""
    if pid:
        os.killpg(pid, signal.SIGCONT)
    try:
        yield
    finally:
        if pid:
            os.killpg(pid, signal.SIGSTOP)


def _figures(rounds: list[tuple[float, float]], speeds: list[list[Load]], load: Load) -> dict[str, Any]:
    per_second = [[one.answered / one.seconds for one in loads] for loads in speeds]
    own = [seconds for one in speeds[0] for seconds in one.latencies]
    third = max(1, len(load.megabytes) // 3)
    figures = {
        "bare_ms": 1e3 * statistics.median(bare for bare, _ in rounds),
        "request_ms": 1e3 * statistics.median(request for _, request in rounds),
        "overhead_ms": 1e3 * statistics.median(request - bare for bare, request in rounds),
        "capacity": statistics.median(per_second[0]),
        "closed_ms": _percentiles(own),
        "load": {name: getattr(load, name) for name in ("seconds", "offered", "answered", "refused", "lost")},
        "load_ms": _percentiles(load.latencies),
        "megabytes_first": statistics.median(load.megabytes[:third]),
        "megabytes_last": statistics.median(load.megabytes[-third:]),
    }
    if len(speeds) > 1:
        ratios = [ours / theirs for ours, theirs in zip(*per_second, strict=True)]
        figures |= {"rival_capacity": statistics.median(per_second[1]), "ratio": statistics.median(ratios)}
    return figures


def _percentiles(latencies: list[float]) -> dict[str, float]:
    """Return the milliseconds within which so many of a hundred are answered."""
    ranked = sorted(latencies)
    if not ranked:
        return {}
    return {f"p{share}": 1e3 * ranked[min(len(ranked) - 1, len(ranked) * share // 100)] for share in (50, 95, 99)}


def _print(figures: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("load", "requests/s", "p50 ms", "p95 ms", "p99 ms"):
        table.add_column(title, justify="left" if title == "load" else "right")
    load, closed, opened = figures["load"], figures["closed_ms"], figures["load_ms"]
    rows = ((f"{figures['clients']} clients, closed loop", figures["capacity"], closed),)
    rows += ((f"open loop, {figures['factor']:g} times as much", load["answered"] / load["seconds"], opened),)
    for name, speed, times in rows:
        table.add_row(name, f"{speed:,.1f}", *(f"{value:,.1f}" for value in times.values()))
    Console().print(table)
    print(f"{load['offered']:,} requests in {load['seconds']:.0f} s: {load['answered']:,} answered, ", end="")
    print(f"{load['refused']:,} refused at once, {load['lost']:,} lost")
    print(f"the server's memory: {figures['megabytes_first']:,.0f} MB, at the end {figures['megabytes_last']:,.0f} MB")
    print(f"one request {figures['request_ms']:.2f} ms, bare {figures['bare_ms']:.2f} ms", end="")
    print(f": the server adds {figures['overhead_ms']:.2f} ms (target: under 3)")
    if "ratio" in figures:
        print(f"the other server: {figures['rival_capacity']:,.1f} requests/s; this one has {figures['ratio']:.2f} x")


def _factor(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number above 0")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bigbatch bench serve", description="Measure a server of a model under load.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint or model folder")
    parser.add_argument("--clients", type=count, default=16, metavar="N", help="that keep it busy (16)")
    parser.add_argument("--factor", type=_factor, default=4.0, help="how many times its capacity is offered (4)")
    parser.add_argument("--seconds", type=_factor, default=20.0, help="for how long that is (20)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="of what is measured in turns (5)")
    parser.add_argument("--request", type=Path, metavar="FILE", help="JSON of what is asked")
    parser.add_argument("--rival", metavar="URL", help="another server that answers the same request, to compare")
    group = "its process group, which is stopped but for its turns, as some servers are busy with waiting"
    parser.add_argument("--rival-group", type=count, metavar="PID", help=group)
    parser.add_argument("--threads", type=count, metavar="N", help="of the model (default: its engine's choice)")
    parser.add_argument("--serve", default="", metavar="FLAGS", help='of bigbatch serve, as "--max-batch 32"')
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser

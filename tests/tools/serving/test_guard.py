"""What the server refuses before it works: by token, name, size, number and time."""

import concurrent.futures
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.serve import check_token
from bigbatch.tools.serving.limits import Limits
from bigbatch.tools.serving.opening import Served

TOKEN = "sixteen-letters-and-more"


@pytest.fixture
def gate():
    """Give a model that answers once it is let, and what lets it."""
    opened, seen = threading.Event(), []

    def predict(texts):
        seen.append(len(texts))
        opened.wait(20)
        return [{"label": text, "probability": 1.0} for text in texts]

    return Served("gate", "classify", "torch", predict=predict), opened, seen


def ask(client, text="a"):
    return client.http.post("/predict", json={"inputs": [text]})


def test_without_the_token_only_pages_and_health_answer(serve, gate):
    served, opened, _ = gate
    opened.set()
    with serve(served, token=TOKEN) as client, httpx.Client(base_url=client.url) as bare:
        assert ask(client).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for path in ("/predict", "/metrics", "/openapi.json", "/v1/models", "/nowhere"):
                answer = bare.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
            assert [bare.get(path).status_code for path in ("/", "/docs", "/health")] == [200] * 3


@pytest.mark.parametrize("begun", [b"", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_a_connection_that_does_not_get_to_ask_is_closed_and_others_are_answered(serve, gate, monkeypatch, begun):
    monkeypatch.setattr("bigbatch.tools.serve.IDLE_SECONDS", 1)
    served, opened, _ = gate
    opened.set()
    with serve(served) as client:
        address = urlsplit(client.url)
        with socket.create_connection((address.hostname, address.port), timeout=20) as slow:
            begin = time.monotonic()
            closed = False
            while not closed and time.monotonic() - begin < 10:
                try:
                    slow.sendall(begun[:1])
                    begun = begun[1:]
                    closed = slow.recv(1, socket.MSG_DONTWAIT) == b""
                except BlockingIOError:
                    time.sleep(0.05)
                except ConnectionError:
                    closed = True
            assert closed
        assert ask(client).status_code == 200


def test_a_name_that_only_leads_to_this_machine_is_refused(serve, gate):
    with serve(gate[0]) as client:
        assert client.http.get("/health", headers={"Host": "evil.example:80"}).status_code == 403
        assert client.http.get("/health", headers={"Host": "[::1]:80"}).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_long_gets_413(serve, gate, is_chunked):
    served, opened, _ = gate
    opened.set()
    with serve(served, Limits(body_bytes=1000)) as client:
        body = b'{"inputs": ["' + b"a" * 100_000 + b'"]}'
        content = iter([body[:500], body[500:]]) if is_chunked else body
        answer = client.http.post("/predict", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert "1,000" in answer.json()["error"]["message"]
        assert ask(client).status_code == 200


def test_more_requests_than_the_server_or_a_client_may_have_are_shed_and_the_others_answered(serve, gate):
    for limits, status in ((Limits(requests=3), 503), (Limits(client_requests=3), 429)):
        served, opened, _ = gate
        opened.clear()
        with serve(served, limits) as client, concurrent.futures.ThreadPoolExecutor(3) as pool:
            accepted = [pool.submit(ask, client) for _ in range(3)]
            while client.server.guard.running.total() < 3:
                time.sleep(0.01)
            refused = ask(client)
            assert refused.status_code == status
            assert refused.headers["Retry-After"] == "1"
            opened.set()
            assert [one.result().status_code for one in accepted] == [200] * 3
            assert ask(client).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(serve, gate):
    served, opened, _ = gate
    with serve(served, Limits(seconds=0.3)) as client:
        answer = ask(client)
        opened.set()
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the answer took longer than 0.3 s"


def test_a_body_that_never_comes_is_given_up(serve, gate):
    with serve(gate[0], Limits(seconds=0.3)) as client, socket.create_connection(("127.0.0.1", _port(client))) as line:
        head = (
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        )
        line.sendall(head + b"{")
        line.settimeout(10)
        assert line.recv(100).startswith(b"HTTP/1.1 503")


def _port(client):
    return int(client.url.rpartition(":")[2])


def test_requests_that_wait_are_answered_together_and_those_of_gone_clients_not_at_all(serve, gate):
    served, opened, seen = gate
    with serve(served) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, client)
        while not seen:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{client.url}/predict", json={"inputs": ["gone"]}, timeout=0.2)
        waiting = [pool.submit(ask, client, text) for text in "bcdef"]
        while client.server.guard.running.total() < 6:
            time.sleep(0.01)
        time.sleep(0.1)
        opened.set()
        assert first.result().json()["answers"][0]["label"] == "a"
        assert [one.result().json()["answers"][0]["label"] for one in waiting] == list("bcdef")
        assert seen == [1, 5]
        told = client.http.get("/metrics").text
        assert 'bigbatch_requests_total{path="/predict",status="200"} 6.0' in told
        assert 'bigbatch_batch_size_bucket{le="8.0"} 2.0' in told


def test_requests_that_would_wait_too_long_are_refused_at_once(serve, gate):
    served, opened, _ = gate
    with serve(served, Limits(seconds=5, batch=1)) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        client.server.guard.pace_seconds = 7.0
        first = pool.submit(ask, client)
        while not client.server.guard.running.total():
            time.sleep(0.01)
        assert "it would take about 7 s; 5 s are the most" in ask(client).json()["error"]["message"]
        opened.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "node7"])
def test_an_address_that_others_reach_needs_a_token(host):
    with pytest.raises(UserError, match="can be reached by others; give --token, or BIGBATCH_TOKEN"):
        check_token(host, None)
    assert check_token(host, TOKEN) == TOKEN
    with pytest.raises(UserError, match="--token: is shorter than 16 characters"):
        check_token(host, "short")


def test_this_machine_needs_none():
    assert [check_token(host, None) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [None] * 4

"""A server under load loses nothing, and the figures say so."""

import asyncio
import json
import os
import time

import pytest

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.bench_serve import _figures, _load, _request, closed_loop, open_loop
from bigbatch.tools.serving.limits import Limits
from bigbatch.tools.serving.opening import Served


def test_four_times_the_capacity_is_shed_and_no_accepted_request_lost(serve):
    def slow(texts):
        time.sleep(0.02)
        return [{"label": text, "probability": 1.0} for text in texts]

    served = Served("slow", "classify", "torch", predict=slow)
    with serve(served, Limits(batch=2, requests=8)) as client:
        path, body = _request(client.url, None)
        url = client.url + path
        busy = asyncio.run(closed_loop(url, body, 4, 1.0, os.getpid()))
        capacity = busy.answered / busy.seconds
        assert 40 < capacity <= 100
        assert busy.lost == busy.refused == 0
        load = asyncio.run(open_loop(url, body, 4 * capacity, 2.0, os.getpid()))
    assert load.lost == 0
    assert load.answered + load.refused == load.offered
    assert load.offered > 2.5 * capacity * load.seconds
    assert load.answered > 0.6 * capacity * load.seconds
    assert load.refused > load.answered
    assert max(load.latencies) < 2


def test_what_was_accepted_and_given_up_counts_as_lost():
    late = json.dumps({"error": {"message": "the answer took longer than 60 s"}}).encode()
    results = [(200, b"", 0.1), (200, b"", 0.3), (503, b"shed", 0.0), (429, b"", 0.0), (503, late, 60.0), (0, b"", 1.0)]
    load = _load([*results, (500, b"", 0.1)], 2.0, [100.0, 200.0, 300.0])
    assert (load.offered, load.answered, load.refused, load.lost) == (7, 2, 2, 3)
    figures = _figures([(0.001, 0.003), (0.002, 0.003), (0.001, 0.005)], [[load, load], [load, load]], load)
    assert figures["overhead_ms"] == pytest.approx(2.0)
    assert figures["load_ms"]["p99"] == pytest.approx(300)
    assert (figures["ratio"], figures["megabytes_first"], figures["megabytes_last"]) == (1.0, 100.0, 300.0)


def test_a_request_of_files_has_to_be_given(serve):
    served = Served("ears", "transcribe", "torch", predict=list, reads_files=True)
    with serve(served) as client, pytest.raises(UserError, match="--request: is missing"):
        _request(client.url, None)

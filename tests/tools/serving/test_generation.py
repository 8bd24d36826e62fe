"""Texts that are written side by side say what each says alone."""

import asyncio
from types import SimpleNamespace

import pytest

from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.tools.serving.generation import Job, JoiningRows, StreamingRows, TogetherRows, Writer
from bigbatch.tools.serving.telemetry import Telemetry
from bigbatch.tools.serving.texts import Text

ASKED = [
    ([5, 6, 7], Sampling(max_new_tokens=12, temperature=0)),
    ([9] * 20, Sampling(max_new_tokens=30, temperature=0.9, top_k=5, seed=3, num_samples=2)),
    ([1], Sampling(max_new_tokens=5, temperature=1.3, top_k=0, top_p=0.8, seed=4)),
    ([3, 200, 4, 8], Sampling(max_new_tokens=50, temperature=0, stop_tokens=tuple(range(60, 90)))),
    ([2] * 50, Sampling(max_new_tokens=14, temperature=2.0, top_k=0, seed=1)),
    ([7, 7], Sampling(max_new_tokens=20, temperature=0)),
]


def run(work):
    return asyncio.run(work)


async def rows_of(writer, prompt, sampling, begin=0.0):
    await asyncio.sleep(begin)
    rows, ends = [[] for _ in range(sampling.num_samples)], [""] * sampling.num_samples
    async for _, step in writer.write(prompt, sampling):
        if step.token is not None:
            rows[step.sample].append(step.token)
        ends[step.sample] = step.finish
    return rows, ends


def started(rows):
    writer = Writer(rows, Telemetry())
    writer.thread.start()
    return writer


@pytest.mark.parametrize("kind", [JoiningRows, TogetherRows, StreamingRows])
def test_requests_that_come_and_go_get_what_each_would_get_alone(decoder, kind):
    writer = started(kind(decoder, 4))

    async def ask():
        together = [rows_of(writer, *asked, begin=0.004 * n) for n, asked in enumerate(ASKED * 2)]
        return await asyncio.gather(*together)

    found = run(ask())
    for (prompt, sampling), (rows, ends) in zip(ASKED * 2, found, strict=True):
        (alone,) = generate(decoder, [prompt], sampling)
        assert rows == [one.tokens for one in alone]
        assert ends == ["stop" if one.stopped == "end" else "length" for one in alone]
    assert writer.rows.rows == []


def test_a_request_joins_others_between_two_steps(decoder):
    rows = JoiningRows(decoder, 8)

    async def ask():
        first = Job(*ASKED[5])
        rows.join(first)
        for _ in range(6):
            rows.step()
        rows.join(Job(*ASKED[1]))
        rows.join(Job(*ASKED[0]))
        sizes = []
        while rows.rows:
            sizes.append(len(rows.step()))
        return sizes

    sizes = run(ask())
    assert sizes[0] == 4
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 30


def test_whoever_stops_listening_frees_the_row(decoder):
    writer = started(JoiningRows(decoder, 1))

    async def ask():
        steps = writer.write([5], Sampling(max_new_tokens=60, temperature=0))
        await anext(steps)
        await steps.aclose()
        waited = Job([6], Sampling())
        waited.drop()
        writer.jobs.append(waited)
        return await asyncio.wait_for(rows_of(writer, *ASKED[0]), 20)

    rows, _ = run(ask())
    assert rows[0] == generate(decoder, [ASKED[0][0]], ASKED[0][1])[0][0].tokens


def test_a_failing_model_is_told_to_its_requests_and_serves_the_next(decoder):
    rows = JoiningRows(decoder, 2)
    writer = started(rows)

    async def ask():
        rows.model = SimpleNamespace(parameters=decoder.parameters)
        with pytest.raises(AttributeError):
            await rows_of(writer, *ASKED[0])
        rows.model = decoder
        return await rows_of(writer, *ASKED[0])

    assert len(run(ask())[0][0]) == 12


def test_memory_of_rows_that_have_left_is_given_up(decoder):
    rows = JoiningRows(decoder, 8)

    async def ask():
        rows.join(Job([9] * 40, Sampling(max_new_tokens=2, temperature=0)))
        rows.join(Job([5], Sampling(max_new_tokens=9, temperature=0)))
        lengths = []
        while rows.rows:
            lengths.append(rows.cache.length)
            rows.step()
        return lengths

    assert run(ask())[:4] == [40, 41, 3, 4]


def test_a_stop_text_is_never_shown_not_even_its_beginning():
    text = Text(None, [1], ["stop", "oops"], strip=False)
    text.decoder = SimpleNamespace(step=lambda _, token: chr(token))
    shown = [text.add(ord(letter)) for letter in "so st sto stoop stop"]
    assert "".join(part for part, _ in shown) == "so st sto stoop "
    assert [place for place, (_, has_ended) in enumerate(shown) if has_ended] == [len(shown) - 1]

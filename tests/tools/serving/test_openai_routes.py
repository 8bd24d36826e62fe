"""OpenAI's own client talks with a model that knows nothing."""

import base64
import json
import re
import time

import numpy as np
import openai
import pytest

from bigbatch.recipes.core.data.chat import encode_request
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.tools.serving.opening import Embedding, Served

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def written(served, prompt, **settings):
    """Return what the model writes without a server."""
    sampling = Sampling(stop_tokens=served.generating.sampling.stop_tokens)._replace(**settings)
    (found,) = generate(served.generating.model, [prompt], sampling)
    return [served.generating.tokenizer.decode(one.tokens) for one in found], [len(one.tokens) for one in found]


def test_the_model_is_listed(talk):
    assert [model.id for model in talk.openai.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b'{"prompt":', "application/json", "the body is no JSON: Expecting value at character 10"),
        (b"", "application/json", "the body is empty; right is a JSON object"),
        (b'{"prompt": "a"}', "text/plain", "found the Content-Type 'text/plain'; right is application/json"),
        (b'{"prompt": "\\ud800"}', "application/json", "prompt: Input should be a valid string, unable to parse"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_for_what_it_is(talk, body, kind, message):
    answer = talk.http.post("/v1/completions", content=body, headers={"content-type": kind})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(message)


def test_a_path_or_a_method_that_is_not_there_is_told_by_name(talk):
    for method, path, status, message in (
        ("POST", "/predict", 404, "there is no /predict here; /docs tells what there is"),
        ("GET", "/v1/completions", 405, "GET is not for /v1/completions"),
    ):
        answer = talk.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)


def test_a_completion_is_what_the_model_writes_without_a_server(talk, chatting):
    prompt = chatting.generating.tokenizer.encode("Once").ids
    texts, counts = written(chatting, prompt, max_new_tokens=24, temperature=0.7, top_p=0.9, seed=5, num_samples=3)
    settings = {"max_tokens": 24, "temperature": 0.7, "top_p": 0.9, "seed": 5, "n": 3}
    found = talk.openai.completions.create(model="tiny", prompt="Once", **settings)
    assert [choice.text.rstrip("\ufffd") for choice in found.choices] == [text.rstrip("\ufffd") for text in texts]
    assert found.usage.completion_tokens == sum(counts)
    assert found.usage.prompt_tokens == len(prompt)
    again = talk.openai.completions.create(model="tiny", prompt=prompt, **settings)
    assert [choice.text for choice in again.choices] == [choice.text for choice in found.choices]


def test_several_prompts_are_answered_in_their_order_and_a_seed_is_drawn_where_none_is_given(talk):
    prompts = ["a", "bb", "ccc"]
    found = talk.openai.completions.create(model="tiny", prompt=prompts, temperature=0, n=2)
    alone = [talk.openai.completions.create(model="tiny", prompt=one, temperature=0) for one in prompts]
    assert [one.text for one in found.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    drawn = {talk.openai.completions.create(model="tiny", prompt="a").choices[0].text for _ in range(3)}
    assert len(drawn) > 1


def test_a_reply_comes_piece_by_piece_as_it_comes_whole(talk, chatting):
    settings = {"model": "tiny", "messages": HELLO, "seed": 1, "max_completion_tokens": 30}
    whole = talk.openai.chat.completions.create(**settings)
    events = list(talk.openai.chat.completions.create(stream=True, stream_options={"include_usage": True}, **settings))
    pieces = [choice for event in events for choice in event.choices]
    assert "".join(one.delta.content for one in pieces) == whole.choices[0].message.content
    assert [one.delta.role for one in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert [one.finish_reason for one in pieces if one.finish_reason] == [whole.choices[0].finish_reason]
    assert events[-1].usage == whole.usage
    request = encode_request(chatting.generating.chat, HELLO)
    (text,), _ = written(chatting, request, seed=1, max_new_tokens=30)
    assert whole.choices[0].message.content.rstrip("\ufffd") == text.lstrip().rstrip("\ufffd")


def test_a_stop_text_ends_a_completion(talk):
    settings = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 40}
    whole = talk.openai.completions.create(**settings).choices[0].text
    stop = whole[10:13]
    stopped = talk.openai.completions.create(stop=["never", stop], **settings).choices[0]
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    streamed = talk.openai.completions.create(stop=stop, stream=True, **settings)
    assert "".join(event.choices[0].text for event in streamed) == stopped.text


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": "a", "logprobs": 2}, "'logprobs' is not known to this server; leave it out"),
        ({"prompt": "a", "max_tokens": 5000}, "max_tokens is 5,000; 1,024 are the most here"),
        ({"prompt": [1] * 600}, "the prompt has 600 tokens; the model has 512 positions, one must be free"),
        ({"prompt": [100000]}, "prompt holds the token 100000; there are 259"),
        ({"prompt": "a", "n": 100}, "asks for 100 texts; 64 are the most"),
        ({"prompt": "a", "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({}, "prompt: Field required"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(talk, asked, told):
    answer = talk.http.post("/v1/completions", json=asked)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == told


def test_mistakes_in_a_dialogue_are_told_as_openai_tells_them(talk):
    with pytest.raises(openai.UnprocessableEntityError, match="spells the special token"):
        talk.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "<|im_end|>"}])
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'; there is 'tiny'"):
        talk.openai.chat.completions.create(model="gpt-5", messages=HELLO)
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    whole = [{"role": "user", "content": "Hi"}]
    both = [talk.openai.chat.completions.create(model="tiny", messages=said, temperature=0) for said in (parts, whole)]
    assert both[0].choices[0].message == both[1].choices[0].message


def test_vectors_come_as_numbers_or_as_bytes(serve):
    table = np.random.default_rng(0).normal(size=(128, 7))
    embedding = Embedding(lambda texts: np.stack([table[len(text)] for text in texts]), len)
    with serve(Served("vectors", "match", "torch", embedding=embedding)) as client:
        found = client.openai.embeddings.create(model="vectors", input=["one", "three"])
        assert np.allclose([one.embedding for one in found.data], table[[3, 5]].astype(np.float32))
        assert found.usage.prompt_tokens == 8
        asked = {"input": "one", "encoding_format": "base64"}
        (raw,) = client.http.post("/v1/embeddings", json=asked).json()["data"]
        assert np.array_equal(np.frombuffer(base64.b64decode(raw["embedding"]), "<f4"), table[3].astype("<f4"))
        refused = client.http.post("/v1/embeddings", json={"input": ["a", " "]})
        assert refused.json()["error"]["message"] == "input[1] is empty"


def test_a_stream_ends_as_openai_ends_it(talk):
    with talk.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line[6:])["object"] == "text_completion" for line in lines[:-1])


def test_a_client_that_goes_away_frees_its_row(talk):
    def written():
        told = talk.http.get("/metrics").text
        return float(re.search(r'bigbatch_tokens_total\{kind="written"\} (\S+)', told)[1])

    asked = {"prompt": "a", "stream": True, "max_tokens": 480, "temperature": 2, "top_k": 0, "n": 60}
    with talk.http.stream("POST", "/v1/completions", json=asked) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while talk.server.guard.running.total() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    before = written()
    time.sleep(0.2)
    assert written() == before

"""/predict takes what a recipe's predictor takes, and says what is wrong with what it cannot take."""

import base64
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.serving.batching import answer_all
from bigbatch.tools.serving.opening import Served


def lengths(texts):
    if empty := [text for text in texts if not text.strip()]:
        raise UserError("text", f"is empty: {empty[0]!r}")
    return [{"label": str(len(text)), "probability": 1.0, "probabilities": {str(len(text)): 1.0}} for text in texts]


@pytest.fixture(scope="module")
def client(serve):
    with serve(Served("lengths", "classify", "torch", predict=lengths)) as client:
        yield client


def test_answers_come_in_the_order_of_the_inputs(client):
    answer = client.http.post("/predict", json={"inputs": ["a", "bb", "ccc"], "top": 1}).json()
    assert answer["model"] == "lengths"
    assert [one["label"] for one in answer["answers"]] == ["1", "2", "3"]
    assert answer["answers"][0]["labels"] == [{"label": "1", "probability": 1.0}]


def test_one_input_that_cannot_be_taken_is_named_and_costs_others_nothing(client):
    answer = client.http.post("/predict", json={"inputs": ["a", " "]})
    assert answer.status_code == 422
    assert answer.json()["error"] == {
        "message": "inputs[1].text: is empty: ' '",
        "type": "invalid_request_error",
        "param": "inputs[1].text",
        "code": 422,
    }
    found = answer_all(lengths, ["a", "", "b", "cc", " "], 4)
    assert [isinstance(one, UserError) for one in found] == [False, True, False, False, True]
    assert [one["label"] for one in found if isinstance(one, dict)] == ["1", "1", "2"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'{"inputs": "a"}', b'{"inputs": []}', b'{"inputs": ["\\ud800"]}', b"\xff\xfe", b"[" * 9999],
)
def test_what_is_no_request_gets_422_in_one_line(client, body):
    answer = client.http.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert "\n" not in answer.json()["error"]["message"]


def test_objects_have_the_recipe_s_fields_and_files_come_as_base64(serve):
    def judge(items):
        return [{"score": float(item["left"] == item["right"])} for item in items]

    with serve(Served("pairs", "match", "torch", predict=judge, fields=("left", "right"))) as client:
        asked = {"inputs": [{"left": "a", "right": "a"}, {"left": "a", "right": "b"}]}
        assert client.http.post("/predict", json=asked).json()["answers"] == [{"score": 1.0}, {"score": 0.0}]
        missing = client.http.post("/predict", json={"inputs": [{"left": "a"}]})
        assert missing.json()["error"]["message"] == "inputs.0.right: Field required"

    def listen(paths):
        contents = [Path(path).read_bytes() for path in paths]
        if b"bad" in contents:
            raise UserError(paths[0], f"{paths[contents.index(b'bad')]} is no recording")
        return [{"transcript": content.decode(), "seconds": 1.0} for content in contents]

    with serve(Served("ears", "transcribe", "torch", predict=listen, reads_files=True)) as client:
        asked = {"inputs": [{"data": base64.b64encode(b"hello").decode()}]}
        assert client.http.post("/predict", json=asked).json()["answers"][0]["transcript"] == "hello"
        asked["inputs"].append({"data": base64.b64encode(b"bad").decode()})
        message = client.http.post("/predict", json=asked).json()["error"]["message"]
        assert message == "inputs[1].data: the file is no recording"
        asked = {"inputs": [{"data": "/etc/passwd"}]}
        assert "is not base64" in client.http.post("/predict", json=asked).json()["error"]["message"]


def test_a_model_that_fails_is_told_as_500_and_answers_the_next(serve, capsys):
    def fragile(texts):
        if "bad" in texts:
            raise ZeroDivisionError("told to nobody")
        return lengths(texts)

    with serve(Served("fragile", "classify", "torch", predict=fragile)) as client:
        failed = client.http.post("/predict", json={"inputs": ["bad"]})
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == "the model failed: ZeroDivisionError"
        assert client.http.post("/predict", json={"inputs": ["good"]}).status_code == 200
    assert "ZeroDivisionError: told to nobody" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["predict", "write"])
@pytest.mark.filterwarnings("ignore")  # schemathesis's own
def test_schemathesis_finds_no_request_that_breaks_the_server(client, talk, kind):
    asked = client if kind == "predict" else talk
    schema = schemathesis.openapi.from_dict(asked.http.get("/openapi.json").json())
    few = hypothesis.settings(max_examples=5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    statuses = set()

    def send(case):
        answer = case.call(base_url=asked.url)
        case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])
        statuses.add(answer.status_code)

    for operation in schema.get_all_operations():
        few(hypothesis.seed(1)(hypothesis.given(operation.ok().as_strategy())(send)))()
    assert {200, 422} <= statuses <= {200, 404, 405, 422}

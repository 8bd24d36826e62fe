"""The whole way as a user types it, in a folder whose name has a space: raw text in, a generating GPT out."""

import json
import pydoc_data.topics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

HALF, STEPS, SEQUENCE_LENGTH = 25, 50, 64
PROMPT = "The "
DOCUMENT = {
    "version": 1,
    "recipe": "gpt",
    "about": {"purpose": "Go the whole way.", "needs": "little", "expect": "little"},
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "max_positions": 96},
    "data": {
        "train": ["my texts/train.jsonl"],
        "validation": ["my texts/validation.jsonl"],
        "tokenizer": {"kind": "bpe", "vocabulary_size": 400},
        "sequence_length": SEQUENCE_LENGTH,
    },
    "batch": {"global_size": 16, "micro_size": 4},
    "precision": {"dtype": "bf16"},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "schedule": {"total_steps": STEPS, "warmup_steps": 5},
    "evaluate": {"every_steps": HALF},
    "report": {"every_steps": 1},
    "sample": {"prompts": [PROMPT], "max_new_tokens": 20},
}


class Chain(NamedTuple):
    """What the commands left behind."""

    folder: Path
    ended: dict[str, subprocess.CompletedProcess]
    validation: list[str]


@pytest.fixture(scope="module")
def chain(bigbatch, write_documents, tmp_path_factory):
    """Type every command once."""
    folder = tmp_path_factory.mktemp("chain") / "a user's folder"
    (folder / "my texts").mkdir(parents=True)
    topics = [pydoc_data.topics.topics[name] for name in ("for", "while", "try", "with", "class", "import", "lambda")]
    write_documents(folder / "my texts/train.jsonl", topics)
    validation = [*pydoc_data.topics.topics["if"].split("\n\n"), pydoc_data.topics.topics["function"]]
    write_documents(folder / "my texts/validation.jsonl", validation)
    (folder / "my run.json").write_text(json.dumps(DOCUMENT))
    greedy = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "40"]
    typed: dict[str, list[str]] = {
        "train": ["train", "my run.json", "--ranks", "2", "--set", f"schedule.stop_step={HALF}"],
        "resume": ["train", "runs/my run-1", "--ranks", "2", "--set", "schedule.stop_step=null", "--resume", "must"],
        "evaluate": ["evaluate", "runs/my run-1"],
        "verify": ["checkpoint", "verify", "runs/my run-1", "--json"],
        "convert": ["convert", "runs/my run-1", "hugging face"],
        "generate": ["generate", "runs/my run-1", *greedy],
        "generate_converted": ["generate", "hugging face", *greedy],
        "report": ["report", "runs/my run-1"],
    }
    ended = {}
    for name, arguments in typed.items():
        before = files(folder / "runs")
        ended[name] = bigbatch(folder, *arguments)
        assert not name.startswith("evaluate") or files(folder / "runs") == before
    return Chain(folder, ended, validation)


def files(folder: Path) -> dict[Path, int]:
    """Return when each file was written last: an evaluation leaves all to a training that goes on meanwhile."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def rows(chain: Chain, kind: str) -> list[dict[str, Any]]:
    lines = (chain.folder / "runs/my run-1/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_training_stops_half_way_and_goes_on_with_every_step_once(chain):
    train = rows(chain, "train")
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["consumed_samples"] for row in train] == [16 * step for step in range(1, STEPS + 1)]
    assert train[-1]["loss"] < train[0]["loss"] - 1
    sessions = [row["event"] for row in rows(chain, "event") if row["event"] in ("started", "resumed")]
    assert sessions == ["started", "resumed"]
    assert f"resumed after step {HALF}:" in chain.ended["resume"].stderr


def test_nothing_but_results_is_on_standard_output(chain):
    out = {name: ended.stdout for name, ended in chain.ended.items()}
    assert out["train"] == out["resume"] == ""
    assert json.loads(out["evaluate"]).keys() >= {"step", "loss", "perplexity", "num_targets"}
    assert [row["problem"] for row in json.loads(out["verify"])] == ["", ""]
    assert out["convert"] == "hugging face\n"
    assert out["generate"].startswith(PROMPT)
    assert out["report"] == "runs/my run-1/report.html\n"
    for ended in chain.ended.values():
        assert "Traceback" not in ended.stderr
        assert "Warning" not in ended.stderr


def test_the_run_folder_and_the_converted_folder_generate_the_same_text(chain):
    text = chain.ended["generate"].stdout
    assert len(text) > len(PROMPT) + 20
    assert chain.ended["generate_converted"].stdout == text


def test_both_checkpoints_are_verified_and_the_report_shows_the_run(chain):
    assert [row["step"] for row in json.loads(chain.ended["verify"].stdout)] == [HALF, STEPS]
    page = (chain.folder / "runs/my run-1/report.html").read_text()
    assert "my run-1" in page
    assert f"{rows(chain, 'train')[-1]['loss']:.3f}"[:-1] in page


def test_evaluation_says_what_training_said_at_its_end(chain):
    figures = json.loads(chain.ended["evaluate"].stdout)
    last = rows(chain, "evaluation")[-1]
    assert figures["step"] == last["step"] == STEPS
    assert figures["loss"] == pytest.approx(last["loss"], rel=1e-4)


def test_transformers_finds_the_same_loss_on_the_validation_text(chain):
    folder = chain.folder / "hugging face"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = [token for text in chain.validation for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    num_samples = (len(stream) - 1) // SEQUENCE_LENGTH
    starts = range(0, num_samples * SEQUENCE_LENGTH, SEQUENCE_LENGTH)
    windows = torch.tensor([stream[start : start + SEQUENCE_LENGTH + 1] for start in starts])
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    figures = json.loads(chain.ended["evaluate"].stdout)
    assert figures["num_targets"] == num_samples * SEQUENCE_LENGTH
    assert figures["loss"] == pytest.approx(loss, abs=1e-3)
    assert figures["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)

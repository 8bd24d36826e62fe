import json
import math
import os
import pty
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.report import Reporter, StepRecord, measured_peak_flops, read_metrics, time_spent


def config(every_steps=10, tensorboard=False):
    return RunConfig.model_validate(
        {
            "version": 1,
            "recipe": "gpt",
            "batch": {"global_size": 8},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": 100},
            "report": {"every_steps": every_steps, "tensorboard": tensorboard},
        }
    )


def record(step, **changes):
    values = {
        "step": step,
        "loss": 10.0 / step,
        "learning_rate": 1e-3 * step,
        "grad_norm": 1.0,
        "num_targets": 100,
        "num_samples": 8,
        "consumed_samples": 8 * step,
        "step_seconds": 0.5,
    }
    return StepRecord(**values | changes)


def open_reporter(run_dir, every_steps=10, tensorboard=False, **arguments):
    settings = {"is_writer": True, "total_steps": 100} | arguments
    return Reporter(run_dir, config(every_steps, tensorboard), **settings)


@pytest.fixture
def start():
    """Open reporters, and let go of those that the test left as a kill would."""
    opened = []

    def open_one(*arguments, **settings):
        opened.append(open_reporter(*arguments, **settings))
        return opened[-1]

    yield open_one
    for it in opened:
        it.close()


def lines_of(run_dir):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_steps_between_reports_are_averaged_by_their_targets(tmp_path, start):
    it = start(tmp_path, every_steps=3, num_ranks=2, tokens_per_sample=16, flops_per_sample=1e9, peak_flops=2e10)
    it.step(record(1, loss=4.0, num_targets=100, grad_norm=1.0, step_seconds=1.0))
    it.step(record(2, loss=1.0, num_targets=300, grad_norm=5.0, step_seconds=0.5))
    assert read_metrics(tmp_path).train == []
    it.step(record(3, loss=2.0, num_targets=600, grad_norm=3.0, step_seconds=0.5))
    (line,) = read_metrics(tmp_path).train
    assert line["loss"] == pytest.approx((4.0 * 100 + 1.0 * 300 + 2.0 * 600) / 1000)
    assert (line["grad_norm"], line["grad_norm_max"]) == (3.0, 5.0)
    assert line["learning_rate"] == 3e-3
    assert (line["steps"], line["num_targets"], line["consumed_samples"]) == (3, 1000, 24)
    assert line["samples_per_second"] == pytest.approx(24 / 2.0)
    assert line["tokens_per_second"] == pytest.approx(12 * 16)
    assert line["model_flops_utilization"] == pytest.approx(12 * 1e9 / (2 * 2e10))
    assert line["memory_bytes"] > 2**20


def test_a_skipped_step_counts_as_work_but_not_in_the_averages(tmp_path, start):
    it = start(tmp_path, every_steps=2)
    it.step(record(1, loss=2.0, loss_scale=256.0))
    it.step(record(2, loss=math.nan, grad_norm=math.inf, skipped=True, loss_scale=128.0))
    it.step(record(3, loss=math.nan, grad_norm=math.inf, skipped=True, loss_scale=64.0))
    it.step(record(4, loss=math.nan, grad_norm=math.inf, skipped=True, loss_scale=32.0))
    first, second = read_metrics(tmp_path).train
    assert (first["loss"], first["grad_norm"], first["skipped"], first["loss_scale"]) == (2.0, 1.0, 1, 128.0)
    assert first["samples_per_second"] == pytest.approx(16 / 1.0)
    assert (second["loss"], second["grad_norm"], second["skipped"]) == (None, None, 2)
    assert "non_finite" not in second


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path, start):
    it = start(tmp_path, every_steps=2)
    it.step(record(1, loss=math.nan, grad_norm=math.nan))
    it.step(record(2, grad_norm=1.0))
    it.evaluation(2, {"loss": math.inf, "accuracy": 0.5})
    _, train, evaluation = lines_of(tmp_path)
    assert train["loss"] is None and train["grad_norm_max"] is None
    assert train["non_finite"] == {"loss": "nan", "grad_norm": "nan", "grad_norm_max": "nan"}
    assert evaluation["loss"] is None and evaluation["accuracy"] == 0.5
    assert evaluation["non_finite"] == {"loss": "inf"}


def test_a_run_that_goes_on_replaces_what_the_killed_one_wrote_after_the_save(tmp_path, start):
    killed = start(tmp_path)
    for step in range(1, 26):
        killed.step(record(step, loss=1.0))
        if step == 13:
            killed.event(13, "saved", "checkpoints/step_00000013")
    killed.evaluation(20, {"loss": 1.0})
    killed.text(20, [{"prompt": "a", "text": "lost"}])

    resumed = start(tmp_path, start_step=13, total_steps=30)
    for step in range(14, 31):
        resumed.step(record(step, loss=2.0))
    resumed.close()

    metrics = read_metrics(tmp_path)
    assert [(line["step"], line["steps"], line["loss"]) for line in metrics.train] == [
        (10, 10, 1.0),
        (13, 3, 1.0),
        (20, 7, 2.0),
        (30, 10, 2.0),
    ]
    assert sum(line["num_samples"] for line in metrics.train) == 30 * 8
    assert metrics.evaluation == [] and metrics.text == []
    assert [line["event"] for line in metrics.events] == ["started", "saved", "resumed", "ended"]
    assert sorted((line["kind"], line["step"]) for line in metrics.superseded) == [
        ("evaluation", 20),
        ("text", 20),
        ("train", 20),
    ]


def test_the_last_record_of_a_step_counts(tmp_path, start):
    it = start(tmp_path)
    it.evaluation(5, {"loss": 3.0})
    it.evaluation(5, {"loss": 2.0})
    assert [line["loss"] for line in read_metrics(tmp_path).evaluation] == [2.0]


def test_half_a_line_at_the_end_is_left_out_and_cut_off_on_resume(tmp_path, start):
    first = start(tmp_path)
    first.evaluation(1, {"loss": 3.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "train", "step": 10, "lo')
    assert [line["loss"] for line in read_metrics(tmp_path).evaluation] == [3.0]
    start(tmp_path, start_step=1)
    assert path.read_bytes().startswith(whole)
    assert [line["event"] for line in read_metrics(tmp_path).events] == ["started", "resumed"]


@pytest.mark.parametrize("bad", [b"\xff\x00", b"[1, 2]", b'{"kind": "train"}', b'{"kind": "poem", "step": 1}', b""])
def test_a_damaged_line_in_the_middle_is_refused_by_its_number(tmp_path, start, bad):
    it = start(tmp_path)
    it.evaluation(1, {"loss": 3.0})
    path = tmp_path / "metrics.jsonl"
    first, second, rest = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, bad, second, rest]))
    with pytest.raises(UserError) as error:
        read_metrics(tmp_path)
    assert error.value.where == f"{path}:2"
    assert "no line of metrics" in error.value.message


def test_a_run_that_reported_nothing_reads_as_empty(tmp_path):
    assert read_metrics(tmp_path) == ([], [], [], [], [])


def test_a_rank_that_does_not_write_leaves_no_trace(tmp_path, start, capsys):
    it = start(tmp_path, is_writer=False, tensorboard=True)
    it.step(record(10))
    it.evaluation(10, {"loss": 1.0})
    it.text(10, [{"prompt": "", "text": ""}])
    it.event(10, "saved")
    it.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_tensorboard_reads_back_the_same_numbers_and_forgets_what_was_done_again(tmp_path, start):
    killed = start(tmp_path, tensorboard=True)
    for step in range(1, 41):
        killed.step(record(step))
    killed.evaluation(40, {"loss": 9.0})
    killed.text(40, [{"prompt": "Once", "text": " upon"}])
    resumed = start(tmp_path, tensorboard=True, start_step=20)
    for step in range(21, 51):
        resumed.step(record(step, loss=7.0))
    resumed.evaluation(50, {"loss": 5.0, "perplexity": math.exp(5.0)})
    resumed.close()

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    train = read_metrics(tmp_path).train
    for name in ("loss", "learning_rate", "grad_norm", "samples_per_second"):
        points = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert [step for step, _ in points] == [10, 20, 30, 40, 50]
        assert [value for _, value in points] == pytest.approx([line[name] for line in train])
    assert [(event.step, event.value) for event in board.Scalars("evaluation/loss")] == [(50, 5.0)]
    assert "train/kind" not in board.Tags()["scalars"]


def test_time_is_divided_by_what_it_was_spent_on(tmp_path, start):
    killed = start(tmp_path, start_up_seconds=4.0)
    for step in range(1, 31):
        killed.step(record(step))
        if step == 20:
            killed.evaluation(20, {"loss": 1.0}, seconds=3.0)
            killed.event(20, "saved", seconds=1.5)
    resumed = start(tmp_path, start_step=20, start_up_seconds=6.0)
    for step in range(21, 41):
        resumed.step(record(step))
    resumed.text(40, [{"prompt": "", "text": ""}], seconds=0.25)
    resumed.close()

    # The clock stood still while the seconds above were made up: let two sessions of 25 and 12 seconds have passed.
    lines = lines_of(tmp_path)
    second = next(number for number, line in enumerate(lines) if line.get("event") == "resumed")
    for number, line in enumerate(lines):
        first, last, begin, end = (0, second - 1, 0, 25) if number < second else (second, len(lines) - 1, 900, 912)
        line["time"] = 1e9 + begin + (end - begin) * (number - first) / (last - first)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = time_spent(read_metrics(tmp_path))
    assert spent == {
        "training": 40 * 0.5,
        "repeated": 10 * 0.5,
        "evaluation": 3.0,
        "saving": 1.5,
        "samples of text": 0.25,
        "start-up": 10.0,
        "other": pytest.approx(25 + 12 - 20 - 5 - 3 - 1.5 - 0.25),
    }


def test_without_a_terminal_each_report_is_one_plain_line(tmp_path, start, capsys):
    it = start(tmp_path, tokens_per_sample=64, flops_per_sample=1e9, peak_flops=3.2e10, num_ranks=2)
    for step in range(1, 31):
        it.step(record(step, loss=2.0, learning_rate=3e-4))
    it.evaluation(30, {"loss": 1.5, "perplexity": 4.48169})
    it.event(30, "saved", "checkpoints/step_00000030", seconds=1.25)
    it.close()
    out, err = capsys.readouterr()
    assert out == ""
    formula, *reports = err.splitlines()
    assert formula == (
        "model FLOPs utilization = FLOPs a sample x samples/s / peak"
        " (1e+09 FLOPs a sample, peak 0.064 TFLOP/s of 2 ranks)"
    )
    assert err.count("FLOPs utilization") == 1
    assert len(reports) == 5
    assert reports[0].startswith("step 10/100  loss 2.0000  lr 0.0003  grad norm 1  1,024 tokens/s  MFU 25.0%  ")
    assert reports[0].endswith(" left")
    assert reports[3] == "step 30  validation: loss 1.5, perplexity 4.4817"
    assert reports[4] == "step 30  saved: checkpoints/step_00000030  (1.2 s)"


def test_generated_text_cannot_steer_the_terminal(tmp_path, start, capsys):
    start(tmp_path).text(1, [{"prompt": "\x1b[2J", "text": "[bold]\x1b]0;owned\x07\n\u202eabc" * 20}])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.strip().isprintable() and err.isascii()
    assert "[bold]" in err


BAR_SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_report import open_reporter, record
it = open_reporter(Path(sys.argv[1]), tokens_per_sample=64)
for step in range(1, 101):
    it.step(record(step, loss=2.5))
    if step == 50:
        it.event(50, "saved", "half-way")
    if step == 95:
        time.sleep(0.6)
it.close()
"""


def test_in_a_terminal_a_bar_moves_to_the_end_and_events_stand_above_it(tmp_path):
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", BAR_SCRIPT, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        screen = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # Linux's end of file for a terminal
                break
            if not chunk:
                break
            screen += chunk
    os.close(master)
    text = screen.decode()
    assert process.returncode == 0, text
    assert "━" in text
    assert "10/100" in text and "loss 2.5000  1,024 tokens/s" in text
    assert "step 50  saved: half-way" in text
    # Step 96 is no report, but half a second has passed since the bar was drawn.
    assert "96/100" in text
    assert text.rindex("100/100") > text.rindex("96/100")
    assert "0:00:00 left" in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor must be given back"


def test_a_step_between_reports_costs_microseconds(tmp_path, start):
    it = start(tmp_path, every_steps=10_000, total_steps=20_000)
    costs = []
    for step in range(1, 2001):
        line = record(step)
        begin = time.perf_counter()
        it.step(line)
        costs.append(time.perf_counter() - begin)
    assert statistics.median(costs) < 50e-6


def test_the_measured_peak_agrees_with_a_matrix_product_timed_here():
    left, right = torch.randn(2, 1024, 1024)
    left @ right
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begin)
    here = 2 * 1024**3 / min(times)
    assert here / 3 < measured_peak_flops(torch.float32, seconds=0.2) < here * 3

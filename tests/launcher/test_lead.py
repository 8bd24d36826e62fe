"""How long ahead of the time limit a job has to save."""

import json

from bigbatch.launcher.lead import OWN_SECONDS, TAIL_BYTES, lead_seconds


def test_until_a_save_has_been_measured_the_profiles_word_counts(tmp_path):
    assert lead_seconds(tmp_path, 120.0) == 240.0 + OWN_SECONDS


def test_the_longest_save_step_and_evaluation_count_that_this_run_has_measured(tmp_path):
    lines = [
        {"kind": "train", "step": 10, "steps": 10, "seconds": 30.0},
        {"kind": "train", "step": 15, "steps": 5, "seconds": 20.0},
        {"kind": "evaluation", "step": 15, "loss": 1.0, "seconds": 7.0},
        {"kind": "event", "event": "saved", "step": 10, "seconds": 2.0, "whole_seconds": 9.0},
        {"kind": "event", "event": "saved", "step": 15, "seconds": 5.0, "whole_seconds": 5.0},
        {"kind": "event", "event": "resumed", "step": 15, "seconds": 400.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "event", "event": "sav'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert lead_seconds(tmp_path, 120.0) == 2 * 9.0 + 4.0 + 7.0 + OWN_SECONDS


def test_of_a_long_run_the_end_of_its_record_is_read(tmp_path):
    def line(seconds: float) -> str:
        return json.dumps({"kind": "event", "event": "saved", "seconds": seconds}) + "\n"

    (tmp_path / "metrics.jsonl").write_text(line(500.0) + line(3.0) * (TAIL_BYTES // len(line(3.0))))
    assert lead_seconds(tmp_path, 120.0) == 6.0 + OWN_SECONDS

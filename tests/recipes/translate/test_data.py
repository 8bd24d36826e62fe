"""Pairs from files to rows: what a sample holds, and what is refused or counted."""

import gzip
import json

import numpy as np
import pytest

from bigbatch.launcher.preflight import check_run
from bigbatch.recipes.core.data.number_words import english, german
from bigbatch.recipes.core.data.splits import prepared_splits
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.translate import data
from bigbatch.recipes.translate.config import PairDataSection

BEGIN = 0


def section(folder, train, **changes):
    settings = {"tokenizer": {"kind": "bpe", "vocabulary_size": 300}, "prepared_dir": str(folder / "prepared")}
    document = {"train": train, **settings, **changes}
    return PairDataSection.model_validate_json(json.dumps(document))


def parallel(folder, sources, targets, suffix=""):
    open_file = gzip.open if suffix else open
    for name, lines in (("de", sources), ("en", targets)):
        with open_file(folder / f"text.{name}{suffix}", "wt") as file:
            file.write("".join(f"{line}\n" for line in lines))
    return [{"path": str(folder / f"text.de{suffix}"), "target": str(folder / f"text.en{suffix}")}]


def samples_of(settings, split="train", seed=0):
    return data.PairSamples(data.prepare(settings), split, settings, BEGIN, seed)


def test_every_pair_stands_once_in_the_rows_and_is_read_back_from_them(tmp_path):
    numbers = range(1, 500)
    settings = section(tmp_path, parallel(tmp_path, map(german, numbers), map(english, numbers), ".gz"))
    samples = samples_of(settings)
    ids = np.arange(samples.num_samples)
    batch = samples.batch(ids, np.zeros_like(ids))
    assert batch["tokens"].shape == batch["labels"].shape == (samples.num_samples, 64)
    assert samples.lengths.sum() > 0.9 * 2 * 64 * samples.num_samples
    tokenizer = data.load_tokenizer(prepared_splits(settings)).tokenizer
    found = []
    for row in range(samples.num_samples):
        for number in range(batch["documents"][row].max() + 1):
            own, theirs = (batch[name][row] == number for name in ("documents", "target_documents"))
            source, target = batch["tokens"][row][own], batch["labels"][row][theirs]
            assert source[-1] == target[-1] == tokenizer.token_to_id("<|endoftext|>")
            assert batch["written"][row][theirs].tolist() == [BEGIN, *target[:-1]]
            found.append((tokenizer.decode(source), tokenizer.decode(target)))
    assert sorted(found) == sorted((german(number), english(number)) for number in numbers)
    others = samples_of(settings, seed=1)
    assert others.fingerprint != samples.fingerprint
    assert not np.array_equal(others.pairs, samples.pairs)


def test_tables_with_scores_give_a_pair_a_row_with_its_score(tmp_path):
    rows = [{"source": german(n), "translation": english(n), "score": n / 10} for n in range(1, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"target_column": "translation", "score_column": "score"}
    samples = samples_of(section(tmp_path, [str(tmp_path / "rows.jsonl")], **columns))
    ids = np.array([4, 30, 7])
    batch = samples.batch(ids, np.zeros_like(ids))
    assert batch["scores"].tolist() == [0.5, 3.1, 0.8]
    assert batch["tokens"].shape[0] == 3
    assert samples.facts["score_mean"] == pytest.approx(3.0)


BAD = {
    "misaligned": (["eins", "zwei", "drei"], ["one", "two"], 3, "has no 'target'", "1 without a partner", 2),
    "longer target": (["eins"], ["one", "two"], 2, "has no 'source'", "1 without a partner", 1),
    "empty": (["eins", " "], ["one", "two"], 2, "has an empty 'source'", "1 empty", 1),
    "without end": (
        ["eins", "zwei"],
        ["one", "two " * 99],
        2,
        "tokens; data.sequence_length is 64; data.on_error 'skip'",
        "1 too long",
        1,
    ),
}


@pytest.mark.parametrize(("sources", "targets", "line", "message", "counted", "kept"), BAD.values(), ids=BAD.keys())
def test_a_bad_pair_is_told_with_its_line_or_counted(tmp_path, capsys, sources, targets, line, message, counted, kept):
    train = parallel(tmp_path, sources, targets)
    with pytest.raises(UserError) as error:
        data.prepare(section(tmp_path, train))
    longer = "en" if len(targets) > len(sources) else "de"
    assert error.value.where == f"{tmp_path}/text.{longer}:{line}"
    assert message in error.value.message
    folder = data.prepare(section(tmp_path, train, on_error="skip"))
    assert f"left out: {counted}" in capsys.readouterr().err
    assert data.read_examples(folder).splits["train"].num_rows == kept


def test_a_score_that_is_no_number_and_a_file_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"source": "a", "target": "b", "score": "good"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: has the score 'good'; right is a number"):
        data.prepare(section(tmp_path, [str(tmp_path / "rows.jsonl")], score_column="score"))
    train = parallel(tmp_path, ["eins"], ["one"])
    train[0]["target"] += ".gone"
    with pytest.raises(UserError, match=r"^data\.train\[0\]\.target: .*\.gone' is no file here"):
        data.prepare(section(tmp_path, train))


def test_preflight_knows_the_columns_of_parallel_files_and_that_pairs_share_samples(tmp_path):
    train = f"data.train={json.dumps(parallel(tmp_path, ['eins'], ['one']))}"
    findings = check_run("translate/quick", [train], 1, tmp_path / "runs")
    assert not [finding for finding in findings if finding.severity == "error" or "epochs" in finding.message]
    findings = check_run("translate/quick", [train, "data.target_column=english"], 1, tmp_path / "runs")
    (found,) = [finding for finding in findings if finding.severity == "error"]
    assert found.path == "data.target_column"
    assert found.message.endswith('has no column "english"; there are: "source", "target"')


def test_settings_of_translating_are_refused_where_translations_are_judged():
    settings = ["search.num_beams=8", "objective.label_smoothing=0.2"]
    findings = check_run("translate/multi30k_quality", settings, 1)
    found = {finding.path for finding in findings if "has no effect in this run" in finding.message}
    assert found == {"search.num_beams", "objective.label_smoothing"}

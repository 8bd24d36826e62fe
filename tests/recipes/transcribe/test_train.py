"""Speech to text under every plan: against the golden losses, and itself resumed, in chunks and under a beam.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/transcribe.json anew; say in the change why the losses differ.
"""

import json

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from trained_runs import EVERY_PLAN, RANKS, STAGES, STEPS, Plans, losses, opened, rows

from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.transcribe import recipe
from bigbatch.recipes.transcribe.decoding import Language, best_path
from bigbatch.tools.convert import convert
from bigbatch.tools.opened import open_model
from bigbatch.tools.predict import main as predict

AUGMENT = {"speeds": [0.9, 1.1], "gain_decibels": 6.0, "time_masks": 1, "band_masks": 1, "band_mask_width": 3}


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("transcribe")
    plans = Plans(out)
    plans.add("plain", make_document(out), *EVERY_PLAN)
    hard = {"augment": AUGMENT, "data": {"concatenate": {"most": 3}}, "model": {"cell": "lstm", "num_layers": 2}}
    hard["model"]["dropout"] = 0.1
    plans.add("resumed", make_document(out, **hard), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, **hard), (2, 3, None))
    settings = {"schedule": {"total_steps": 70}, "evaluate": {"every_steps": 70}, "data": {"concatenate": {"most": 2}}}
    plans.add("learning", make_document(out, **settings, decode={"beam_size": 4, "ngram_order": 2}), (2, 1, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    return kept_golden("transcribe", lambda: {"plain": losses(trained, "plain", 1, 0)})["plain"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"plain_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "plain", ranks, stage) == pytest.approx(golden, rel=1e-4)
    assert len(set(golden)) == STEPS


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


def test_figures_of_two_ranks_are_jiwers_of_each_utterance_once(trained):
    config, data, model = opened(trained / "learning_2_1")
    ids = np.arange(data.validation.num_samples)
    assert len(ids) == 18  # not a multiple of two ranks' batches
    texts, found = [], []
    for number in ids:
        batch = data.validation.batch(ids[number : number + 1], np.zeros(1, np.int64))
        with torch.no_grad():
            logarithms, _ = model(**{name: torch.from_numpy(batch[name]) for name in ("samples", "lengths")})
        found.append(model.text(best_path(logarithms[0].argmax(-1).tolist())))
        texts.append(model.text(batch["units"][0].tolist()))
    (row,) = rows(trained / "learning_2_1", "evaluation")
    assert row["word_error_rate"] == pytest.approx(jiwer.wer(texts, found))
    assert row["character_error_rate"] == pytest.approx(jiwer.cer(texts, found))
    assert row["sentence_error_rate"] == pytest.approx(np.mean([a != b for a, b in zip(texts, found, strict=True)]))
    assert row["character_error_rate"] < 0.3
    beam = recipe.generated_figures(config, data.facts, model, data.validation)
    assert beam["beam_word_error_rate"] <= row["word_error_rate"] + 0.05
    assert recipe.figures(config, data.facts, _arrays(texts, found), thorough=True)["details"]["utterances"] == 18


def _arrays(texts, found):
    return dict(zip(("words", "characters"), recipe.edits(texts, found), strict=True))


def test_error_rates_are_shares_of_what_was_said():
    words, characters = recipe.edits(["one two", "three"], ["one to two", "tree"])
    assert words.tolist() == [[2, 0, 0, 1], [0, 1, 0, 0]]
    assert characters.sum(0).tolist() == [11, 0, 1, 3]
    found = recipe.error_rates(words, characters)
    assert found == {"word_error_rate": 2 / 3, "character_error_rate": 4 / 12, "sentence_error_rate": 1.0}


def test_the_ngram_model_knows_what_samples_are_like(trained):
    _, data, _ = opened(trained / "learning_2_1")
    language = Language(data.train, 2)
    ids = np.arange(data.train.num_samples)
    texts = [text.tolist() for text in data.train.texts(Order(ids, 0 * ids))]
    begins = np.bincount([text[0] for text in texts], minlength=len(data.train.alphabet) + 1) / len(texts)
    found = np.exp(language.logarithms(()))
    assert found.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(found, begins, atol=0.03)  # smoothed


def test_predict_hears_files_in_chunks_as_in_one(trained, tmp_path, capsys, monkeypatch):
    run_dir = trained / "learning_2_1"
    config, data, model = opened(run_dir)
    recordings = sorted((trained / "letters").glob("*.wav"))[:12]
    long = np.concatenate([soundfile.read(path, dtype="int16")[0] for path in recordings])
    soundfile.write(tmp_path / "long.flac", long, 4000)
    soundfile.write(tmp_path / "click.wav", long[:10], 4000)
    texts = []
    for chunk, context in ((100.0, 1.0), (0.5, 0.5)):
        decode = config.decode.model_copy(update={"chunk_seconds": chunk, "context_seconds": context})
        predictor = recipe.predictor(config.model_copy(update={"decode": decode}), data.facts, model)
        (answer,) = predictor([str(tmp_path / "long.flac")])
        assert answer["seconds"] == pytest.approx(len(long) / 4000, abs=1e-3)
        texts.append(answer["transcript"])
    expected = "".join(path.stem.partition("_")[2] for path in recordings)
    assert len(expected) > 15
    assert jiwer.cer(texts[0], texts[1]) < 0.1
    monkeypatch.chdir(tmp_path)
    assert predict([str(run_dir), "long.flac", "click.wav", "--format", "jsonl"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"text": "long.flac", "transcript": texts[0], "seconds": answer["seconds"]}
    assert second["transcript"] == ""
    predict([str(run_dir), str(tmp_path / "long.flac"), "--format", "table"])
    assert capsys.readouterr().out.startswith(texts[0][:20])


def test_a_file_that_is_no_recording_is_told_with_its_name(trained, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no recording")
    with pytest.raises(UserError, match=r"TEXT 1: .*text.wav cannot be read as a recording"):
        predict([str(trained / "learning_2_1"), str(tmp_path / "text.wav")])
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'gone.wav'}\n")
    assert predict([str(trained / "learning_2_1"), "--file", str(tmp_path / "list.txt"), "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == f"there is no file {tmp_path / 'gone.wav'}"


def test_the_folder_that_convert_makes_writes_down_the_same_in_a_session_too(trained, tmp_path):
    run = trained / "learning_2_1"
    parity = convert(run, tmp_path / "out")
    assert parity == (0.0, parity.largest_logit, parity.num_tokens, "samples", "this project's own")
    files = sorted(map(str, (trained / "letters").iterdir()))[:4]
    native, folder = open_model(run), open_model(tmp_path / "out")
    answers = native.recipe.predictor(native.config, native.facts, native.model)(files)
    assert len({answer["transcript"] for answer in answers}) > 1
    assert folder.recipe.predictor(folder.config, folder.facts, folder.model)(files) == answers

    def session(samples, lengths):
        found, frames = native.model.model(samples, lengths)
        return {"log_probabilities": found, "frames": frames}

    foreign = recipe.foreign(folder.config, folder.facts, session).eval()
    assert recipe.predictor(folder.config, folder.facts, foreign)(files) == answers

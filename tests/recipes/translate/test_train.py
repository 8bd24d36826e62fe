"""Translation under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/translate.json anew; say in the change why the losses differ.
"""

import json
import math

import numpy as np
import pytest
import sacrebleu
import tokenizers
import torch
import transformers
from scipy import stats
from trained_runs import EVERY_PLAN, RANKS, STAGES, STEPS, Plans, losses, opened, rows

from bigbatch.launcher.preflight import check_run
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.data.sampler import sample_order
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import Seq2SeqSection
from bigbatch.recipes.core.models.seq2seq import hugging_face_config, hugging_face_state
from bigbatch.recipes.core.recipe import of_folder, open_folder
from bigbatch.recipes.translate import rate, recipe
from bigbatch.recipes.translate.config import TranslateConfig
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict

RATED = {"target_column": "translation", "score_column": "score"}


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("translate")
    plans = Plans(out)
    plans.add("plain", make_document(out), *EVERY_PLAN)
    dropout = {"model": {"dropout": 0.2}}
    plans.add("resumed", make_document(out, **dropout), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, **dropout), (2, 3, None))
    learning = make_document(out, schedule={"total_steps": 120}, data={"test_fraction": 0.1})
    plans.add("learning", learning, (1, 0, None))
    rows = [
        {"source": f"{word} {word}", "translation": word * (1 + number % 3), "score": number % 3 / 2}
        for number, word in enumerate(f"a{number}" for number in range(200))
    ]
    (out / "rated.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judging = make_document(out, model={"head": "quality"}, data={"train": [str(out / "rated.jsonl")], **RATED})
    del judging["search"]
    plans.add("quality", {**judging, "schedule": {"total_steps": 40, "name": "constant"}}, (1, 0, None), (2, 3, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    measured = {"translation": ("plain", 1, 0), "quality": ("quality", 1, 0)}
    return kept_golden("translate", lambda: {name: losses(trained, *plan) for name, plan in measured.items()})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"plain_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "plain", ranks, stage) == pytest.approx(golden["translation"], rel=1e-4)


def test_a_head_that_judges_gives_its_golden_losses_and_learns(trained, golden):
    assert losses(trained, "quality", 1, 0) == pytest.approx(golden["quality"], rel=1e-4)
    assert losses(trained, "quality", 2, 3) == pytest.approx(golden["quality"], rel=1e-4)
    (row,) = rows(trained / "quality_1_0", "evaluation")
    assert row["spearman"] > 0.8


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


def test_the_first_loss_is_that_of_transformers_own_model(trained, golden):
    """Each pair by itself, with smoothed labels as PyTorch smooths them."""
    config = TranslateConfig.model_validate_json((trained / "plain_1_0" / "run.json").read_text())
    data = recipe.open_data(config)
    torch.manual_seed(config.seed)
    model = recipe.build_model(config, data.facts)
    export = recipe.hugging_face(config, data.facts)
    theirs = transformers.MarianMTModel(transformers.AutoConfig.for_model(**export.config))
    theirs.load_state_dict(hugging_face_state(model), strict=False)
    order = sample_order(config.seed, data.train.num_samples, 0, 8)
    batch = data.train.batch(order.ids, order.epochs)
    total, count = 0.0, 0
    for row in range(8):
        for number in range(batch["documents"][row].max() + 1):
            own, said = batch["documents"][row] == number, batch["target_documents"][row] == number
            tokens, written, labels = (
                torch.from_numpy(batch[name][row][chosen]).unsqueeze(0)
                for name, chosen in (("tokens", own), ("written", said), ("labels", said))
            )
            logits = theirs(input_ids=tokens, decoder_input_ids=written).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum", label_smoothing=0.1)
            total, count = total + loss.item(), count + labels.numel()
    assert total / count == pytest.approx(golden["translation"][0], rel=1e-5)


def test_figures_are_those_of_predicted_translations_by_sacrebleu(trained, capsys):
    config, data, model = opened(trained / "learning_1_0")
    numbers = np.arange(data.test.num_samples)
    sources, references = (data.test.examples.texts(side, numbers) for side in ("source", "target"))
    found = recipe.generated_figures(config, data.facts, model, data.test)
    capsys.readouterr()
    assert predict([str(trained / "learning_1_0"), *sources]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == sources
    translations = [line["translation"] for line in lines]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(translations, [references]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(translations, [references]).score)
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found["chrf"] > 40
    assert rows(trained / "learning_1_0", "evaluation")[-1]["loss"] < math.log(300) / 2


def test_a_converted_run_translates_in_transformers_as_it_does_here(trained, tmp_path, capsys):
    run_dir, out = trained / "learning_1_0", tmp_path / "converted"
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["dreihundertfünf", "elf"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    theirs = tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    config, data, ours = opened(run_dir)
    found = recipe.predictor(config, data.facts, ours)(texts)
    assert [one["translation"] for one in found] == [text.strip() for text in theirs]
    assert of_folder(out) == "translate"
    assert recipe.predictor(*open_folder(recipe, out))(texts) == [
        {"translation": one["translation"], "score": pytest.approx(one["score"], abs=1e-5)} for one in found
    ]
    capsys.readouterr()
    assert predict([str(out), *texts, "--format", "table"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("elf")


def test_training_starts_where_a_run_or_its_folder_ended(trained, make_document, tmp_path):
    run_dir = trained / "learning_1_0"
    convert(run_dir, tmp_path / "folder")
    _, data, model = opened(run_dir)
    for start in (run_dir, tmp_path / "folder"):
        document = make_document(tmp_path)
        document["model"] = {"initialize_from": str(start), "dropout": 0.3}
        del document["data"]["tokenizer"]
        config = TranslateConfig.model_validate_json(json.dumps(document))
        recipe.prepare(config)
        facts = recipe.open_data(config).facts
        assert facts["shape"]["dropout"] == 0.3
        assert facts["vocabulary_size"] == data.facts["vocabulary_size"]
        begun, size = (
            recipe.build_model(config, facts).state_dict(),
            facts["vocabulary_size"],
        )  # a folder has no padding
        assert all(torch.equal(begun[name][:size], tensor[:size]) for name, tensor in model.state_dict().items())
    document["model"]["initialize_from"] = str(trained)
    with pytest.raises(UserError, match=r"has neither checkpoints nor a config\.json: no model to start from"):
        recipe.prepare(TranslateConfig.model_validate_json(json.dumps(document)))


def test_a_bart_with_tokens_of_its_own_around_a_text_is_gone_on_with(make_document, tmp_path):
    """Its targets begin with <s> too, behind the token that its decoder begins with."""
    shape = Seq2SeqSection(
        family="bart", num_encoder_layers=1, num_decoder_layers=1, hidden_size=16, num_heads=2, max_positions=48
    )
    config = hugging_face_config(shape, 300, begin_of_target=2, end_of_text=2)
    folder = tmp_path / "bart"
    transformers.BartForConditionalGeneration(transformers.BartConfig(**config)).save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "<unk>": 1, "</s>": 2, "one": 3}, "<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "<s>", "eos_token": "</s>"}))
    document = make_document(tmp_path)
    document["model"] = {"initialize_from": str(folder)}
    del document["data"]["tokenizer"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    assert not [
        one for one in check_run(str(tmp_path / "run.json"), [], 1, tmp_path / "runs") if one.severity == "error"
    ]
    settings = TranslateConfig.model_validate_json(json.dumps(document))
    recipe.prepare(settings)
    data = recipe.open_data(settings)
    batch = data.validation.batch(np.array([0]), np.array([0]))
    assert batch["labels"].tolist() == [[0, 1, 2]]
    assert batch["written"].tolist() == [[2, 0, 1]]
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    assert recipe.loss(recipe.build_model(settings, data.facts), tensors).num_targets == 3


def test_rated_translations_are_rows_that_a_judge_learns_from(trained, make_document, tmp_path, capsys):
    run_dir = trained / "learning_1_0"
    assert rate.main([str(run_dir), "--split", "test", "--max-pairs", "12"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12
    for line in lines:
        chrf = sacrebleu.sentence_chrf(line["translation"], [line["reference"]]).score
        assert line["score"] == pytest.approx(chrf)
    files = ["--source", str(trained / "numbers.de"), "--target", str(trained / "numbers.en")]
    rate.main([str(run_dir), *files, "--max-pairs", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["source"], line["reference"]) for line in lines] == [("eins", "one"), ("zwei", "two")]


def test_predicted_quality_is_what_evaluation_finds(trained, tmp_path, capsys):
    run_dir = trained / "quality_1_0"
    data = opened(run_dir)[1]
    numbers = np.arange(data.validation.num_samples)
    sources, targets = (data.validation.examples.texts(side, numbers) for side in ("source", "target"))
    pairs = [{"source": source, "translation": target} for source, target in zip(sources, targets, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert predict([str(run_dir), "--file", str(tmp_path / "pairs.jsonl"), "--format", "jsonl"]) == 0
    found = [json.loads(line)["quality"] for line in capsys.readouterr().out.splitlines()]
    (row,) = rows(run_dir, "evaluation")
    right = data.validation.examples.numbers("score")
    assert row["spearman"] == pytest.approx(stats.spearmanr(found, right).statistic, abs=1e-4)
    assert predict([str(run_dir), "a1 a1", "a1", "--format", "table"]) == 0
    with pytest.raises(UserError, match="TEXT 2: is empty"):
        predict([str(run_dir), "a1 a1", "a1", "a2", " "])
    convert(run_dir, tmp_path / "judge")
    capsys.readouterr()
    assert predict([str(tmp_path / "judge"), "--file", str(tmp_path / "pairs.jsonl"), "--format", "jsonl"]) == 0
    assert [json.loads(line)["quality"] for line in capsys.readouterr().out.splitlines()] == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"head": "quality"}}, "model.head 'quality' needs data.score_column"),
        ({"data": {"score_column": "score"}}, "model.head 'translation' has no use for data.score_column"),
        ({"model": {"initialize_from": "here"}}, "has both of shape and initialize_from; one of them is right"),
        ({"data": {"sequence_length": 64}}, "data.sequence_length 64 is more than model.shape.max_positions 48"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make_document, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TranslateConfig.model_validate_json(json.dumps(make_document(tmp_path, **changes)))

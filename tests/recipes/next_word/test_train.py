"""Next-word prediction under every plan: against the golden losses, PyTorch's own layers, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/next_word.json anew; say in the change why the losses are other ones.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from trained_runs import EVERY_PLAN, RANKS, STAGES, STEPS, Plans, first, losses, opened, plain_steps

from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import open_folder
from bigbatch.recipes.next_word import recipe
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict

MODELS = ("lstm", "gru", "ngram")


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("next_word")
    plans = Plans(out)
    for model in MODELS:
        plans.add(model, make_document(out, model), *EVERY_PLAN)
    names = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout")
    dropout = make_document(out, "lstm", model=dict.fromkeys(names, 0.2))
    plans.add("resumed", dropout, (1, 1, 2), (2, 3, 2))
    plans.add("resumed_whole", dropout, (1, 1, None), (2, 3, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept, by model; write them first when asked to."""
    return kept_golden("next_word", lambda: {model: losses(trained, model, 1, 0) for model in MODELS})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, model, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"{model}_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, model, ranks, stage) == pytest.approx(golden[model], rel=1e-4)


def test_a_network_that_knows_nothing_finds_all_words_alike_and_learns(golden):
    for model in ("lstm", "gru"):
        assert golden[model][0] == pytest.approx(math.log(31), abs=0.02)
        assert golden[model][-1] < golden[model][0] - 0.2


class Reference(nn.Module):
    """The same network of PyTorch's own parts."""

    def __init__(self, cell: type[nn.LSTM | nn.GRU], widths: list[int], vocabulary_size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, widths[0])
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(cell(before, width, batch_first=True) for before, width in pairs)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.words(tokens)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return hidden @ self.words.weight.T + self.bias


@pytest.mark.parametrize(("model", "cell", "widths"), [("lstm", nn.LSTM, [16, 24, 16]), ("gru", nn.GRU, [16, 16])])
def test_a_network_of_pytorchs_own_layers_takes_the_same_steps(trained, golden, model, cell, widths):
    config, data, ours = first(trained / f"{model}_1_0")
    theirs = Reference(cell, widths, data.facts["vocabulary_size"])
    renamed = {
        name.replace("embed.words", "words").replace("head.bias", "bias"): p for name, p in ours.named_parameters()
    }
    theirs.load_state_dict(renamed)

    def losses_of(order):
        batch = {name: torch.from_numpy(array) for name, array in data.train.batch(*order).items()}
        yield nn.functional.cross_entropy(theirs(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden[model], rel=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained, ranks, stage):
    whole = losses(trained, "resumed_whole", ranks, stage)
    assert losses(trained, "resumed", ranks, stage) == whole
    assert len(set(whole)) == STEPS


@pytest.mark.parametrize("model", MODELS)
def test_predicted_probabilities_are_those_that_the_test_split_is_judged_by(trained, model):
    """Add up the logarithms over the beginning of the test text, each word predicted from those before it."""
    config, data, network = opened(trained / f"{model}_1_0")
    data = recipe.open_data(config.model_copy(update={"data": config.data.model_copy(update={"context_length": 0})}))
    assert data.test is not None
    batch = {name: torch.from_numpy(array) for name, array in data.test.batch(np.array([0]), np.array([0])).items()}
    batch["labels"][0, 0] = -100  # n-grams take the beginning of all text for another than that of a text
    with torch.no_grad():
        expected = recipe.loss(network, batch)
    count = config.data.sequence_length
    assert expected.num_targets == count - 1
    words = [word for line in (trained / "test.txt").read_text().splitlines() for word in [*line.split(), "\n"]]
    answers = recipe.predictor(config, data.facts, network)([" ".join(words[:end]) for end in range(count)])
    found = [dict(answer["words"]) for answer in answers]
    assert [sum(chances.values()) for chances in found] == pytest.approx([1.0] * count, abs=1e-5)
    total = -sum(math.log(chances[word]) for chances, word in zip(found[1:], words[1:], strict=False))
    assert total == pytest.approx(expected.sum.item(), abs=1e-4)


def test_the_command_prints_the_likeliest_words(trained, capfd):
    predict([str(trained / "ngram_1_0"), "the old", "the old engine finds an", "--top", "3"])
    first, unknown = map(json.loads, capfd.readouterr().out.splitlines())
    assert first["text"] == "the old"
    assert len(first["words"]) == 3
    chances = [item["probability"] for item in first["words"]]
    assert chances == sorted(chances, reverse=True)
    assert first["words"][0]["word"] in ("engine", "river", "lamp", "teacher", "window", "garden", "letter", "machine")
    assert unknown["words"][0]["word"]  # behind a word that the text does not have
    predict([str(trained / "lstm_1_0"), "the old", "--format", "table"])
    assert capfd.readouterr().out.rstrip().endswith("the old")


def test_counts_that_have_changed_since_the_run_are_refused(trained, tmp_path):
    config, data, network = opened(trained / "ngram_1_0")
    with pytest.raises(UserError, match="other counts than those that the run was trained with"):
        recipe.predictor(config, data.facts | {"counts": "0" * 32}, network)


@pytest.mark.parametrize("model", MODELS)
def test_the_folder_that_convert_makes_predicts_the_same_words(trained, tmp_path, model):
    run_dir = trained / f"{model}_2_3"
    assert convert(run_dir, tmp_path / "out").largest_difference == 0
    config, data, network = opened(run_dir)
    texts = ["the old", "the old engine finds an", ""]
    expected = recipe.predictor(config, data.facts, network)(texts)
    assert recipe.predictor(*open_folder(recipe, tmp_path / "out"))(texts) == expected
    assert bool(list((tmp_path / "out").glob("ngrams_3_*"))) == (model == "ngram")

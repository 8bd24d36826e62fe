"""The model against transformers' own, its loss against theirs, and the best spans against looking at every pair."""

import numpy as np
import pytest
import torch
import transformers

from bigbatch.launcher.predict import count_parameters
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import section_from_hugging_face
from bigbatch.recipes.question_answering.config import AnswerSection, QuestionAnsweringConfig, SpanModelSection
from bigbatch.recipes.question_answering.data import collate
from bigbatch.recipes.question_answering.model import best_spans, build_model, span_loss

SIZE = 50
SETTINGS = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Windows:
    """What `collate` needs to know."""

    question_tokens, sequence_length, begin_of_text, end_of_text = 8, 24, 2, 3

    def __init__(self, packing):
        self.packing = packing


@pytest.fixture
def bert(tmp_path):
    """Write transformers' own model into a folder."""
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**SETTINGS, pad_token_id=None)).eval()
    torch.nn.init.normal_(model.qa_outputs.bias)
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def started(folder, config, **settings):
    section = SpanModelSection(initialize_from=str(folder), **settings)
    facts = {"vocabulary_size": SIZE, "encoder": section_from_hugging_face(config.to_dict()).model_dump(mode="json")}
    return build_model(section, AnswerSection(), facts, initialize=True).eval()


def make_batch(packing):
    generator = np.random.default_rng(1)
    questions = [generator.integers(5, SIZE, length).astype(np.uint32) for length in (3, 5, 2, 4)]
    contexts = [generator.integers(5, SIZE, length).astype(np.uint32) for length in (6, 9, 4, 2)]
    layout = Windows(packing)
    batch = collate(questions, contexts, np.zeros(4, int), layout, layout)
    return {name: torch.from_numpy(array) for name, array in batch.items()}, questions, contexts


def their_outputs(model, questions, contexts, **targets):
    """Run transformers' model on each pair alone."""
    found = []
    for number, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        ids = torch.tensor([[2, *question.tolist(), 3, *context.tolist(), 3]])
        kinds = torch.tensor([[0] * (len(question) + 2) + [1] * (len(context) + 1)])
        own = {name: values[number : number + 1] for name, values in targets.items()}
        with torch.no_grad():
            found.append(model(input_ids=ids, token_type_ids=kinds, **own))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_logits_and_loss_are_transformers_own(bert, packing):
    folder, theirs = bert
    ours = started(folder, theirs.config, keep_head=True)
    batch, questions, contexts = make_batch(packing)
    assert len(batch["tokens"]) == (3 if packing else 4)
    targets = {"start_positions": torch.tensor([5, 0, 4, 6]), "end_positions": torch.tensor([7, 0, 4, 7])}
    expected = their_outputs(theirs, questions, contexts, **targets)
    with torch.no_grad():
        logits = ours(batch["tokens"], batch["documents"], batch["segments"])
        loss = span_loss(logits, batch["firsts"], batch["lengths"], *targets.values())
    flat = logits.flatten(0, 1)
    for first, length, output in zip(batch["firsts"], batch["lengths"], expected, strict=True):
        found = flat[first : first + length]
        assert (found[:, 0] - output.start_logits[0]).abs().max() < 1e-5
        assert (found[:, 1] - output.end_logits[0]).abs().max() < 1e-5
    assert loss.item() == pytest.approx(sum(output.loss.item() for output in expected), rel=1e-5)


def test_a_new_head_is_drawn_unless_it_is_to_be_kept_and_none_can_be_kept_of_a_model_without(bert, tmp_path):
    folder, theirs = bert
    assert torch.equal(started(folder, theirs.config, keep_head=True).head.weight, theirs.qa_outputs.weight)
    assert not torch.equal(started(folder, theirs.config).head.weight, theirs.qa_outputs.weight)
    theirs.bert.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"model.keep_head: .*plain answers no questions; right is false"):
        started(tmp_path / "plain", theirs.config, keep_head=True)


def test_the_best_spans_are_those_of_all_pairs_and_never_reach_into_the_question():
    generator = torch.Generator().manual_seed(4)
    batch, questions, contexts = make_batch(True)
    logits = torch.randn(*batch["tokens"].shape, 2, generator=generator)
    logits.flatten(0, 1)[batch["firsts"] + 1] += 100  # of the questions' first tokens
    layout = {name: batch[name] for name in ("firsts", "lengths", "contexts")}
    found = best_spans(logits, **layout, most_tokens=3, count=6)
    for window, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        own = logits.flatten(0, 1)[batch["firsts"][window] :][: batch["lengths"][window]]
        begin, end = len(question) + 2, len(question) + 2 + len(context)
        pairs = {
            (first, last): float(own[first, 0] + own[last, 1])
            for first in range(begin, end)
            for last in range(first, min(end, first + 3))
        }
        best = sorted(pairs, key=lambda pair: -pairs[pair])[:6]
        count = len(best)
        assert (
            list(zip(found.starts[window, :count].tolist(), found.ends[window, :count].tolist(), strict=True)) == best
        )
        assert found.scores[window, :count].tolist() == pytest.approx([pairs[pair] for pair in best], rel=1e-6)
        assert torch.isinf(found.scores[window, count:]).all()
        assert found.nulls[window].item() == pytest.approx(float(own[0].sum()))


def test_a_shape_of_first_weights_is_drawn_and_its_parameters_are_counted_without():
    shape = EncoderSection(num_layers=1, hidden_size=16, num_heads=2)
    section = SpanModelSection(encoder=shape)
    facts = {"vocabulary_size": SIZE, "encoder": shape.model_dump()}
    model = build_model(section, AnswerSection(), facts, initialize=True)
    assert 0.01 < model.head.weight.std().item() < 0.03
    built = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(section, SIZE, QuestionAnsweringConfig.num_outputs) == built

"""Choose the sentences of a document that summarize it."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.data.examples import Examples
from bigbatch.recipes.core.data.splits import SPLITS
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, load_given_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import encoder_tensors, hugging_face_config
from bigbatch.recipes.core.models.hugging_face import Piece, read_json
from bigbatch.recipes.core.recipe import RECORD_FILE, Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.core.start import WHERE, Start, find_start, starting_shape, starting_vocabulary
from bigbatch.recipes.core.start import learning_rate_scales as encoder_scales
from bigbatch.recipes.summarize import data
from bigbatch.recipes.summarize.choosing import choose, lead, text_rank
from bigbatch.recipes.summarize.config import SummarizeConfig
from bigbatch.recipes.summarize.model import INPUTS, THEIR_HEAD, sentence_loss
from bigbatch.recipes.summarize.model import build_model as build
from bigbatch.recipes.summarize.rouge import CONFIDENCE, KINDS, Rouge, Words, intervals

FIELDS = ("document",)
"""What an input of the predictor consists of."""
WINDOWS_AT_ONCE = 64
BOOTSTRAP_SAMPLES = 1000


def prepare(config: SummarizeConfig) -> Path:
    """Split and tokenize the documents, and label their best sentences."""
    start = _start(config)
    return data.prepare(config.data, start.tokenizer if start else None)


def open_data(config: SummarizeConfig) -> DataSplits:
    """Map the prepared documents into memory."""
    start = _start(config)
    folder = data.prepared(config.data, start.tokenizer if start else None)
    train = data.DocumentSamples(folder, "train", config.data, config.objective.token_dropout, config.seed)
    facts = {
        "vocabulary_size": starting_vocabulary(folder, start),
        "tokenizer": str(folder),
        "end_of_text": train.tokenizer.end_of_text,
        "encoder": starting_shape(config.model, start),
        "tokens_per_sample": round(train.mean_tokens),
        "train_samples": train.num_samples,
    }
    validation, test = (data.open_split(folder, split, config.data) for split in SPLITS[1:])
    return DataSplits(train, validation, facts, test)


def build_model(config: SummarizeConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the encoder and its head."""
    return build(config, facts, initialize)


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the windows."""
    return len(batch["places"])


def loss(model: Any, batch: Batch) -> Loss:
    """Sum the loss over the windows."""
    return _loss(model, model(**{name: batch[name] for name in INPUTS}), batch)


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the loss and the score of each sentence, minus infinity beyond the last."""
    logits = model(**{name: batch[name] for name in INPUTS})
    scores = logits.float().masked_fill(batch["places"] < 0, -torch.inf)
    scores = F.pad(scores, (0, model.window_sentences - scores.shape[1]), value=-torch.inf)
    arrays = {"scores": scores, **{name: batch[name] for name in ("splits", "rows", "begins")}}
    return Outputs(_loss(model, logits, batch), arrays)


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: the loss alone says little here."""
    return {}


def figures(
    config: SummarizeConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Compare each document's best sentences with its summaries.

    When thorough also those of two baselines, the first sentences and TextRank's, and of the oracle; with intervals.
    """
    documents = Examples(Path(facts["tokenizer"]), SPLITS[arrays["splits"][0]])
    rows, firsts = np.unique(arrays["rows"], return_index=True)
    scores = [window[window > -np.inf] for window in arrays["scores"]]
    scores = [np.concatenate(scores[first:last]) for first, last in pairwise([*firsts.tolist(), len(scores)])]
    oracles = documents.lists("oracle", rows)
    rouge, section, found = Rouge(), config.summary, {}
    named: dict[str, list[np.ndarray]] = {}
    texts = zip(documents.texts("text", rows), documents.texts("references", rows), strict=True)
    for number, (text, references) in enumerate(texts):
        sentences = text.split(data.BETWEEN_SENTENCES)
        choices = {"": _choose(sentences, scores[number], config, rouge.words)}
        if thorough:
            choices["lead_"] = lead(len(sentences), section.sentences)
            choices["textrank_"] = text_rank(sentences, rouge.words, section.sentences)
            choices["oracle_"] = oracles[number].tolist()
        for name, chosen in choices.items():
            summary = data.BETWEEN_SENTENCES.join(sentences[place] for place in chosen)
            named.setdefault(name, []).append(rouge.score(summary, references.split(data.BETWEEN_REFERENCES)))
    for name, values in named.items():
        found |= {name + kind: float(mean) for kind, mean in zip(KINDS, np.mean(values, 0), strict=True)}
    if thorough:
        around = intervals(np.array(named[""]), BOOTSTRAP_SAMPLES)
        found |= {"num_documents": len(rows), "details": {"intervals": around, "confidence": CONFIDENCE}}
    return found


def figure_names(config: SummarizeConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures of a validation split."""
    return list(KINDS)


def learning_rate_scales(config: SummarizeConfig, model: nn.Module) -> dict[str, float]:
    """Let lower layers learn more slowly (`model.layer_decay`)."""
    if config.model.layer_decay == 1:
        return {}
    return encoder_scales(config.model.layer_decay, [name for name, _ in model.named_parameters()])


def flops_per_sample(config: SummarizeConfig, facts: dict[str, Any]) -> float:
    """Count 6 operations a token for each weight but the embeddings' (arXiv 2001.08361, section 2.1)."""
    with torch.device("meta"):
        model = build(config, facts, initialize=False)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = sum(parameter.numel() for parameter in model.encoder.parameters() if id(parameter) not in tables)
    return 6.0 * weights * facts["tokens_per_sample"]


def samples_of_text(config: SummarizeConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return nothing: the model writes no text."""
    return []


def predictor(
    config: SummarizeConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return a function from objects with a document to their summaries, {"summary", "sentences"}.

    A document is a text or a list of sentences. The sentences are those chosen, in their order, each with its place in
    the document, counted from 0, and its score: its probability with a binary loss, its share with a listwise one.
    """
    tokenizer, words = load_given_tokenizer(Path(facts["tokenizer"])), Words()
    model.eval()

    def predict(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            documents = [data.sentences_of(item.get("document")) for item in items]
        except ValueError as error:
            raise UserError("document", str(error)) from None
        if not all(documents):
            raise UserError("document", "has no sentence: there is nothing to summarize")
        found = zip(documents, _score(model, config, tokenizer, documents), strict=True)
        return [_summary(sentences, scores, config, words) for sentences, scores in found]

    return predict


def hugging_face(config: SummarizeConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers' BertForTokenClassification does.

    Its one label is the score of a sentence, at the [CLS] before it.
    """
    if config.model.sentence_layers:
        found = (
            f"is {config.model.sentence_layers}, for which transformers has no class; bigbatch predict takes the run"
        )
        raise UserError("model.sentence_layers", found)
    section, size = EncoderSection.model_validate(facts["encoder"]), facts["vocabulary_size"]
    tensors = encoder_tensors(section, size, "encoder.")
    tensors |= {f"head.{kind}": [Piece(f"{THEIR_HEAD}.{kind}", 0, 1)] for kind in ("weight", "bias")}
    settings = hugging_face_config(section, size, "BertForTokenClassification")
    settings |= {"id2label": {"0": "summary"}, "label2id": {"summary": 0}}
    return HuggingFaceExport(settings, tensors, auto_class="AutoModelForTokenClassification")


def open_folder(folder: Path) -> tuple[SummarizeConfig, dict[str, Any], nn.Module]:
    """Open a Hugging Face folder that `bigbatch convert` has written, to predict with."""
    start = _native(find_start(str(folder)))
    record = read_json(folder / RECORD_FILE)["run"]
    document = {
        "version": 1,
        "model": {"initialize_from": str(folder), "keep_head": True},
        "batch": {"global_size": 1},
        "optimizer": {"learning_rate": 1.0},
        "schedule": {"total_steps": 1},
    }
    document |= {key: record[key] for key in ("data", "objective", "summary")}
    config = SummarizeConfig.model_validate_json(json.dumps(document))
    facts = {"vocabulary_size": start.vocabulary_size, "tokenizer": str(folder), "encoder": start.encoder}
    return config, facts, build(config, facts, initialize=True).eval()


def _loss(model: Any, logits: torch.Tensor, batch: Batch) -> Loss:
    places = batch["places"]
    return Loss(sentence_loss(logits, places, batch["labels"], batch["worths"], model.objective), len(places))


def _start(config: SummarizeConfig) -> Start | None:
    return _native(find_start(config.model.initialize_from)) if config.model.initialize_from else None


def _native(start: Start) -> Start:
    if start.hugging_face:
        raise UserError(WHERE, f"{start.path} is a {start.hugging_face.get('model_type')}; right is a BERT")
    return start


def _choose(sentences: list[str], scores: np.ndarray, config: SummarizeConfig, words: Words) -> list[int]:
    section = config.summary
    found = [words.tokenize(sentence) if section.block_trigrams else [] for sentence in sentences]
    return choose(scores.tolist(), found, section.sentences, section.block_trigrams)


def _score(
    model: nn.Module, config: SummarizeConfig, tokenizer: TextTokenizer, documents: list[list[str]]
) -> list[np.ndarray]:
    """Return the logits of each document's sentences."""
    device = next(model.parameters()).device
    windows, scores, owners = [], [], []
    for number, sentences in enumerate(documents):
        tokens = data.encode_sentences(tokenizer, sentences)
        cuts = data.cut_document(np.array(list(map(len, tokens))), config.data)
        windows += [tokens[begin:end] for begin, end in cuts]
        owners += [number] * len(sentences)
    for begin in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = data.collate(windows[begin : begin + WINDOWS_AT_ONCE], config.data, tokenizer)
        with torch.inference_mode():
            logits = model(**{name: torch.from_numpy(batch[name]).to(device) for name in INPUTS})
        scores.append(logits.float().cpu().numpy()[batch["places"] >= 0])
    return np.split(np.concatenate(scores), np.cumsum(np.bincount(owners))[:-1])


def _summary(sentences: list[str], scores: np.ndarray, config: SummarizeConfig, words: Words) -> dict[str, Any]:
    logits = torch.from_numpy(scores)
    shares = (logits.sigmoid() if config.objective.loss == "binary" else logits.softmax(0)).tolist()
    chosen = _choose(sentences, scores, config, words)
    listed = [{"place": place, "sentence": sentences[place], "score": round(shares[place], 6)} for place in chosen]
    return {"summary": " ".join(sentences[place] for place in chosen), "sentences": listed}

"""Tell how well texts match: sentences alike, documents for queries, items for users."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core import start as starting
from bigbatch.recipes.core.checkpoint import MANIFEST, fill, open_checkpoint
from bigbatch.recipes.core.data.examples import Examples
from bigbatch.recipes.core.data.identity import fingerprint
from bigbatch.recipes.core.data.splits import SPLITS, prepared_splits
from bigbatch.recipes.core.data.tokenizing import load_given_tokenizer, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import ForeignEncoder, Session
from bigbatch.recipes.core.models.config import EncoderSection
from bigbatch.recipes.core.models.encoder import encoder_export, encoder_tensors, hugging_face_config
from bigbatch.recipes.core.models.hugging_face import conversion_record, own_export, read_json, untrained_document
from bigbatch.recipes.core.operations import operations_of_tokens
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.match import data, samples
from bigbatch.recipes.match.config import MatchConfig
from bigbatch.recipes.match.model import THEIR_HEAD, loss_of_logits, loss_of_vectors
from bigbatch.recipes.match.model import build_model as build
from bigbatch.recipes.match.ranking import Ranked, fuse, judge, top, without

ARCHITECTURE = "BertModel"
"""How the name of transformers' class of a bi-encoder ends."""
FIELDS = ("left", "right")
"""What an input of the predictor consists of."""
TEXTS_AT_ONCE = 64
WHOLE_SPLIT = True
MAIN_FIGURES = ("spearman", "ndcg@10")
learning_rate_scales = starting.learning_rate_scales


def prepare(config: MatchConfig) -> Path:
    """Split and tokenize the pairs, rank what is ranked, and mine negatives."""
    start = starting.find_native_start(config.model)
    miner = None
    if config.data.mining and config.data.mining.by != "bm25":
        path = Path(config.data.mining.by).expanduser()
        identity = fingerprint(open_checkpoint(path).folder / MANIFEST)
        miner = (encoder_of(*open_run(path, "data.mining.by")), identity)
    return data.prepare(config.data, start.tokenizer if start else None, miner)


def open_data(config: MatchConfig) -> DataSplits:
    """Map the prepared pairs into memory."""
    start = starting.find_native_start(config.model)
    folder = prepared_splits(config.data, start.tokenizer if start else None)
    tokenizer = load_tokenizer(folder)
    if config.model.kind == "cross" and tokenizer.begin_of_text is None:
        raise UserError("data.tokenizer", "has no token that begins a text; kind 'wordpiece' has, and BERT's own")
    train = samples.PairSamples(folder, "train", config, is_training=True)
    facts = {
        "vocabulary_size": starting.starting_vocabulary(folder, start),
        "tokenizer": str(folder),
        "end_of_text": tokenizer.end_of_text,
        "encoder": starting.starting_shape(config.model, start),
        "tokens_per_sample": round(train.mean_tokens),
        "train_samples": train.num_samples,
    }
    validation, test = (samples.open_split(folder, split, config) for split in SPLITS[1:])
    most = config.evaluate.max_samples
    if most and validation and not config.data.score_column and validation.num_samples > most:
        found = f"is {most}, but the ranking is of {validation.num_samples} texts or pairs; leave it out"
        raise UserError("evaluate.max_samples", found)
    return DataSplits(train, validation, facts, test)


def build_model(config: MatchConfig, facts: dict[str, Any], initialize: bool = True) -> nn.Module:
    """Build the bi-encoder or the cross-encoder."""
    rarities = None
    if config.model.backbone == "words" and initialize:
        rarities = torch.from_numpy(data.rarities(Path(facts["tokenizer"]), facts["vocabulary_size"])).float()
    model = build(config.model, facts, initialize, rarities)
    model.objective = config.objective  # type: ignore[assignment]
    return model


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the pairs."""
    return len(batch["scores"])


def loss(model: Any, batch: Batch) -> Loss:
    """Sum the objective over the pairs."""
    found = model(**_inputs(batch))
    if "targets" in batch:
        return Loss(loss_of_logits(found.squeeze(-1).float(), batch), len(batch["scores"]))
    return Loss(loss_of_vectors(found, batch, model.objective), len(batch["scores"]))


def outputs(model: Any, batch: Batch) -> Outputs:
    """Return the scores of pairs; where a bi-encoder ranks, the vectors of texts, of which `figures` makes the loss."""
    found = model(**_inputs(batch))
    if "rows" in batch:
        nothing = torch.zeros((), device=found.device)
        return Outputs(
            Loss(nothing, len(found)), {name: batch[name] for name in ("rows", "splits")} | {"vectors": found}
        )
    arrays = {name: batch[name] for name in ("lefts", "rights", "splits", "scores") if name in batch}
    if "targets" in batch:
        logits = found.squeeze(-1).float()
        return Outputs(Loss(loss_of_logits(logits, batch), len(logits)), arrays | {"found": logits.sigmoid()})
    count = len(batch["scores"])
    cosines = (found[:count] * found[count:]).sum(-1)
    return Outputs(Loss((cosines - batch["scores"]).square().sum(), count), arrays | {"found": cosines})


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: the loss alone says little here."""
    return {}


def figures(
    config: MatchConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Judge scores by their correlation with those given, or rankings; when thorough also BM25's, and both together."""
    if "splits" not in arrays:
        return correlations(arrays["found"], arrays["scores"])
    folder, split = Path(facts["tokenizer"]), SPLITS[arrays["splits"][0]]
    grades = data.read_grades(Examples(folder, split))
    lexical = data.read_found(folder, split)
    rows = list(grades)
    found: dict[str, Any] = {}
    if config.model.kind == "cross":
        numbers, scores = arrays["rights"], arrays["found"].astype(np.float64)
        own = {row: np.flatnonzero(arrays["lefts"] == row) for row in rows}
        rankings = [top(scores[own[row]], len(own[row])) for row in rows]
        rankings = [
            one._replace(documents=numbers[own[row]][one.documents]) for row, one in zip(rows, rankings, strict=True)
        ]
    else:
        vectors = arrays["vectors"].astype(np.float32)
        begin = int((Examples(folder, split + data.TEXTS).numbers("is_right") == 0).sum())
        scores = vectors[rows] @ vectors[begin:].T
        found["loss"] = _softmax_loss(scores / config.objective.temperature, rows, grades, begin)
        ranked = (top(row, len(row)) for row in scores)
        ranked = (one._replace(documents=one.documents + begin) for one in ranked)
        rankings = [without(one, lexical[row][1]) for row, one in zip(rows, ranked, strict=True)]
    right = [grades[row] for row in rows]
    found |= judge(rankings, right)
    if not thorough:
        return found
    by_words = [lexical[row][0] for row in rows]
    found |= {f"bm25_{name}": value for name, value in judge(by_words, right).items()}
    if config.model.kind == "bi":
        depth, both = config.data.depth, zip(by_words, rankings, strict=True)
        cut = ((words, one._replace(documents=one.documents[:depth], scores=one.scores[:depth])) for words, one in both)
        fused = judge([fuse(words, one, config.search) for words, one in cut], right)
        found |= {f"hybrid_{name}": value for name, value in fused.items()}
    return found | {"num_queries": len(rows)}


def figure_names(config: MatchConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures of a validation split."""
    one, right = Ranked(np.zeros(1, np.int64), np.zeros(1)), {0: 1.0}
    return list(correlations(np.arange(3.0), np.arange(3.0)) if config.data.score_column else judge([one], [right]))


def correlations(found: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation; 0 where all scores are the same."""
    import scipy.stats  # noqa: PLC0415 - a second, and not needed to train

    if len(set(found.tolist())) < 2 or len(set(right.tolist())) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    library: Any = scipy.stats
    computed = {"pearson": library.pearsonr(found, right), "spearman": library.spearmanr(found, right)}
    return {name: float(result.statistic) for name, result in computed.items()}


def flops_per_sample(config: MatchConfig, facts: dict[str, Any]) -> float:
    """Count the operations of the weights that tokens meet."""
    return operations_of_tokens(lambda: build(config.model, facts, initialize=False), facts["tokens_per_sample"])


def samples_of_text(config: MatchConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return nothing: the model writes no text."""
    return []


def predictor(
    config: MatchConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return a function from objects with FIELDS to {"score"}: where scores were learned, in their range.

    Else the cosine of a bi-encoder, or a cross-encoder's probability.
    """
    score = scorer_of(config, facts, model)
    low, high = config.data.score_range if config.objective.loss in ("cosine", "binary") else (0.0, 1.0)

    def predict(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for item in items:
            for name in FIELDS:
                checked(item.get(name), name)
        found = score([item["left"] for item in items], [item["right"] for item in items])
        return [{"score": low + (high - low) * value} for value in found.tolist()]

    return predict


def checked(text: Any, where: str) -> str:
    """Return a text; raise UserError for what is none."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(where, "is empty, or no text: there is nothing to match")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(where, "is not Unicode: it holds half a character") from None
    return text


def scorer_of(config: MatchConfig, facts: dict[str, Any], model: Any) -> Callable[[list[str], list[str]], np.ndarray]:
    """Return a function from left and right texts to their scores [P]."""
    if config.model.kind == "bi":
        embed = encoder_of(config, facts, model)
        return lambda lefts, rights: (embed(lefts) * embed(rights)).sum(-1)
    tokenizer = load_given_tokenizer(Path(facts["tokenizer"]))
    run = _runner(model)

    def score(lefts: list[str], rights: list[str]) -> np.ndarray:
        left, right = (samples.encode(texts, config.data, tokenizer) for texts in (lefts, rights))
        batch = samples.paired(left, right, config.data, tokenizer)
        return 1 / (1 + np.exp(-run(batch)[:, 0].astype(np.float64)))

    return _in_parts(score)


def encoder_of(config: MatchConfig, facts: dict[str, Any], model: Any) -> data.Embed:
    """Return a function from texts to vectors [N, D] of length 1; raise UserError for a cross-encoder."""
    if config.model.kind == "cross":
        raise UserError("model.kind", "is 'cross', which gives texts no vectors of their own; right is a bi-encoder")
    tokenizer = load_given_tokenizer(Path(facts["tokenizer"]))
    run = _runner(model)
    return _in_parts(lambda texts: run(samples.laid_out(samples.encode(texts, config.data, tokenizer), config.data)))


def open_run(path: Path, where: str) -> tuple[MatchConfig, dict[str, Any], nn.Module]:
    """Open a run or checkpoint of this recipe; raise UserError for another."""
    reader = open_checkpoint(path)
    document, facts = reader.manifest["run"], reader.manifest["facts"]
    if document["recipe"] != "match":
        raise UserError(where, f"{path} is a model of the recipe {document['recipe']!r}; right is match")
    config = MatchConfig.model_validate_json(json.dumps(document))
    model = build_model(config, facts, initialize=False)
    fill(reader, model)
    return config, facts, model.eval()


def hugging_face(config: MatchConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers' BertModel or BertForSequenceClassification does.

    A bi-encoder's folder is one that sentence-transformers opens, too; that of a bag of words this project alone opens.
    """
    if config.model.backbone == "words":
        return own_export(config.recipe, lambda: build_model(config, facts, initialize=False))
    if config.model.kind == "cross":
        return encoder_export(facts, "ForSequenceClassification", THEIR_HEAD, 1, ["score"], has_pooler=True)
    section, size = EncoderSection.model_validate(facts["encoder"]), facts["vocabulary_size"]
    settings = hugging_face_config(section, size, "BertModel")
    plain = {
        name: [piece._replace(name=piece.name.removeprefix("bert.")) for piece in pieces]
        for name, pieces in encoder_tensors(section, size, "encoder.").items()
    }
    return HuggingFaceExport(settings, plain, auto_class="AutoModel", files=_sentence_transformers(config, section))


def _sentence_transformers(config: MatchConfig, section: EncoderSection) -> dict[str, Any]:
    """Return the files by which sentence-transformers knows what follows the encoder."""
    modules = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    pooling = {"word_embedding_dimension": section.hidden_size}
    pooling |= {"pooling_mode_cls_token": config.model.pooling == "first"}
    pooling |= {"pooling_mode_mean_tokens": config.model.pooling == "mean"}
    return {
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (kind, path) in enumerate(modules)
        ],
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": config.data.sequence_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }


def describe_folder(folder: Path) -> tuple[MatchConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of a BERT: one of this project's, or else to give texts vectors.

    Pooled as 1_Pooling of sentence-transformers says, by default by the mean.
    """
    start = starting.native_start(starting.find_start(str(folder)))
    run = conversion_record(folder)["run"]
    pooling = folder / "1_Pooling" / "config.json"
    is_first = pooling.exists() and read_json(pooling).get("pooling_mode_cls_token")
    length = min(512, (start.encoder or {})["max_positions"])
    document = untrained_document(data={"train": [str(folder)], "sequence_length": length, "group_size": 2})
    document |= {key: run[key] for key in ("data", "objective", "search") if key in run}
    is_cross = run.get("model", {}).get("kind") == "cross"
    pooled = {"kind": "cross", "keep_head": True} if is_cross else {"pooling": "first" if is_first else "mean"}
    document["model"] = {"initialize_from": str(folder), **pooled}
    config = MatchConfig.model_validate_json(json.dumps(document))
    facts = {"vocabulary_size": start.vocabulary_size, "tokenizer": str(folder), "encoder": start.encoder}
    return config, facts


def foreign(config: MatchConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the model where a session gives the hidden states of texts, or the logits of pairs."""
    with torch.device("meta"):
        model: Any = build(config.model, facts, initialize=False)
    is_cross = config.model.kind == "cross"
    model.encoder = ForeignEncoder(session, "logits" if is_cross else "last_hidden_state")
    if is_cross:
        model.pooler, model.head = nn.Identity(), nn.Identity()
    model.objective = config.objective
    return model


def _inputs(batch: Batch) -> Batch:
    """Return what the model takes: a cross-encoder, which needs no lengths, segments."""
    last = "segments" if "segments" in batch else "lengths"
    return {name: batch[name] for name in ("tokens", "documents", "firsts", last)}


def _runner(model: Any) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    device = next(model.parameters()).device
    model.eval()

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return (
                model(**_inputs({name: torch.from_numpy(array).to(device) for name, array in batch.items()}))
                .float()
                .cpu()
                .numpy()
            )

    return run


def _in_parts(compute: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Let a function of lists see a few of them at a time."""

    def run(*lists: list[str]) -> np.ndarray:
        begins = range(0, len(lists[0]), TEXTS_AT_ONCE)
        return np.concatenate([compute(*(one[begin : begin + TEXTS_AT_ONCE] for one in lists)) for begin in begins])

    return run


def _softmax_loss(logits: np.ndarray, rows: list[int], grades: dict[int, dict[int, float]], begin: int) -> float:
    """Return the mean over relevant documents of minus the log of their chance among all candidates."""
    logits = logits.astype(np.float64) - logits.max(1, keepdims=True)
    chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-np.mean([chances[place, right - begin] for place, row in enumerate(rows) for right in grades[row]]))

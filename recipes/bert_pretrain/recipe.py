"""Pretrain a BERT: fill in masked tokens, and, if asked to, tell which segments belong together."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig
from bigbatch.recipes.bert_pretrain.data import MaskedSamples, read_vocabulary
from bigbatch.recipes.bert_pretrain.pairs import PairSamples
from bigbatch.recipes.core.data.prepare import prepare_tokens, prepared_folder
from bigbatch.recipes.core.data.shards import IGNORED_LABEL, TokenSamples
from bigbatch.recipes.core.data.tokenizing import MASK, encode_prompt, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.encoder import (
    MaskedLanguageModel,
    hugging_face_config,
    hugging_face_tensors,
    load_hugging_face,
)
from bigbatch.recipes.core.parallel import ALONE, Axis, Mesh
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs
from bigbatch.recipes.core.train import Run


def prepare(config: BertPretrainConfig) -> Path:
    """Tokenize the texts into shards."""
    return prepare_tokens(config.data)


def open_data(config: BertPretrainConfig) -> DataSplits:
    """Map the token shards into memory; there is no validation or test split where the document names none.

    Their samples are masked as in epoch 0, whenever they are looked at.
    """
    data = config.data
    folder = prepared_folder(data)
    vocabulary = read_vocabulary(folder, config.masking.whole_words)

    def masked(split: str) -> MaskedSamples | PairSamples:
        if config.sentence_task == "none":
            samples = TokenSamples(folder, split, data.sequence_length, data.packing)
            return MaskedSamples(samples, vocabulary, config.masking, config.seed)
        samples = TokenSamples(folder, split, data.sequence_length)
        return PairSamples(samples, split, config.sentence_task, vocabulary, config.masking, config.seed)

    train = masked("train")
    facts = {
        "vocabulary_size": train.samples.vocabulary_size,
        "tokenizer": str(folder),
        "end_of_text": train.samples.end_of_text,
        "mask": vocabulary.mask,
        "tokens_per_sample": round(train.mean_tokens),
        "train_samples": train.num_samples,
    }
    _prompts(config, load_tokenizer(folder).tokenizer, vocabulary.mask)  # a useless prompt is told now, not hours later
    validation = masked("validation") if data.validation or data.validation_fraction else None
    return DataSplits(train, validation, facts, masked("test") if data.test else None)


def build_model(
    config: BertPretrainConfig,
    facts: dict[str, Any],
    initialize: bool = True,
    tensor: Axis = ALONE,
    sequence: Axis = ALONE,
) -> MaskedLanguageModel:
    """Build the encoder and its heads: first weights, or those of a Hugging Face folder."""
    has_pairs = config.sentence_task != "none"
    spreads = config.parallel.tensor_sequence
    model = MaskedLanguageModel(config.model, facts["vocabulary_size"], has_pairs, tensor, sequence, spreads)
    if initialize and config.model.initialize_from:
        load_hugging_face(model, Path(config.model.initialize_from))
    return model


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the tokens to fill in."""
    return int((batch["labels"] != IGNORED_LABEL).sum())


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy of the tokens to fill in, and that of each row's pair as often as the row has targets.

    Divided by the number of targets this is the mean over tokens plus the mean over pairs, as in BERT (appendix A.2),
    where a pair counts by its row's k targets: sum_r (masked_r + k_r pair_r) / sum_r k_r. With equal k it is BERT's.
    """
    return outputs(model, batch).loss


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    """Run the forward pass on one micro-batch; with pairs, also tell what each task's figures are made of."""
    tokens, targets, labels = batch["tokens"], batch["targets"], batch["labels"]
    num_targets = (labels != IGNORED_LABEL).sum(1)
    if "pair_labels" not in batch:
        masked = model(tokens, targets, labels, batch.get("positions"), batch.get("documents"))
        return Outputs(Loss(masked, int(num_targets.sum())), {})
    apart = {"documents": batch["documents"], "segments": batch["segments"]}
    masked, logits = model(tokens, targets, labels, **apart, with_pairs=True)
    pairs = F.cross_entropy(logits.float(), batch["pair_labels"], reduction="none")
    arrays = {
        "masked_loss": (masked / len(tokens)).expand(len(tokens)),  # the rows' sum is what counts
        "num_targets": num_targets,
        "pair_loss": pairs,
        "pair_is_right": (logits.argmax(1) == batch["pair_labels"]).float(),
    }
    return Outputs(Loss(masked + (num_targets * pairs).sum(), int(num_targets.sum())), arrays)


def figures(
    config: BertPretrainConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, float]:
    """Return each task's mean loss, the perplexity of a masked token, and how many pairs are told right."""
    masked_loss = float(arrays["masked_loss"].sum(dtype=np.float64) / arrays["num_targets"].sum())
    return {
        **metrics(masked_loss),
        "masked_loss": masked_loss,
        "pair_loss": float(arrays["pair_loss"].mean(dtype=np.float64)),
        "pair_accuracy": float(arrays["pair_is_right"].mean()),
    }


def figure_names(config: BertPretrainConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures that a second task adds."""
    return [] if config.sentence_task == "none" else ["masked_loss", "pair_loss", "pair_accuracy"]


def metrics(loss: float) -> dict[str, float]:
    """Return the perplexity of a masked token."""
    return {"perplexity": math.exp(min(loss, 700.0))}


def flops_per_sample(config: BertPretrainConfig, facts: dict[str, Any]) -> float:
    """Count 6 P + 12 L D T operations a token, P the weights of the layers, and 6 for each weight of the head a target.

    The formula is PaLM's (arXiv 2204.02311, appendix B); attention is counted in full, whatever the packing hides.
    """
    section, length = config.model, config.data.sequence_length
    with torch.device("meta"):
        model = build_model(config, facts, initialize=False)
    layers = sum(parameter.numel() for parameter in model.encoder.blocks.parameters())
    head = sum(parameter.numel() for parameter in model.head.parameters())
    attention = 12.0 * section.num_layers * section.hidden_size * length
    return length * (6.0 * layers + attention + 6.0 * config.masking.fraction * head)


def hugging_face(config: BertPretrainConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does."""
    section, size, has_pairs = config.model, facts["vocabulary_size"], config.sentence_task != "none"
    settings = hugging_face_config(section, size, "BertForPreTraining" if has_pairs else "BertForMaskedLM")
    tensors = hugging_face_tensors(section, size, has_pairs)
    return HuggingFaceExport(settings, tensors, auto_class="AutoModelForMaskedLM")


def contestants(run: Run, mesh: Mesh) -> list[Any]:
    """Return who trains the same model, for `bigbatch bench train`."""
    from bigbatch.recipes.bert_pretrain import contestants as module  # noqa: PLC0415 - transformers takes seconds

    return module.contestants(run, mesh)


def samples_of_text(
    config: BertPretrainConfig, model: MaskedLanguageModel, facts: dict[str, Any]
) -> list[dict[str, str]]:
    """Fill in each prompt of the document: the likeliest tokens. Collective: every rank must call it."""
    tokenizer = load_tokenizer(Path(facts["tokenizer"])).tokenizer
    device = next(model.parameters()).device
    was_training, texts = model.training, []
    model.eval()
    with torch.no_grad():
        for tokens in _prompts(config, tokenizer, facts["mask"]):
            row = torch.tensor([tokens], device=device)
            places = [[place for place, token in enumerate(tokens) if token == facts["mask"]]]
            logits = model(row, torch.tensor(places, device=device))  # [1, K, V]
            best = logits[0].float().softmax(-1).topk(config.sample.candidates)
            each = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            texts.append("; ".join(_candidates(tokenizer, *found) for found in each))
    model.train(was_training)
    return [{"prompt": prompt, "text": text} for prompt, text in zip(config.sample.prompts, texts, strict=True)]


def _candidates(tokenizer: Tokenizer, probabilities: list[float], tokens: list[int]) -> str:
    return ", ".join(f"{tokenizer.id_to_token(t)} {p:.0%}" for p, t in zip(probabilities, tokens, strict=True))


def _prompts(config: BertPretrainConfig, tokenizer: Tokenizer, mask: int) -> list[list[int]]:
    """Encode the prompts; raise UserError for one with nothing to fill in or without room."""
    encoded = []
    for index, prompt in enumerate(config.sample.prompts):
        where = f"sample.prompts[{index}]"
        encoded.append(encode_prompt(tokenizer, prompt, where))
        if mask not in encoded[-1]:
            raise UserError(where, f"{prompt!r} has nothing to fill in; write {MASK} where a token is wanted")
        if len(encoded[-1]) > config.model.max_positions:
            room = config.model.max_positions
            raise UserError(where, f"{prompt!r} has {len(encoded[-1])} tokens; at most {room} would be right")
    return encoded

"""Who pretrains the same BERT on the same text: this project, and transformers' run_mlm in its two ways."""

from typing import Any, cast

import numpy as np
import torch
import transformers

from bigbatch.recipes.bert_pretrain import recipe
from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig
from bigbatch.recipes.bert_pretrain.data import MaskedSamples, mask_tokens
from bigbatch.recipes.core.contestants import Bigbatch, SampleRows, TransformersTrainer, as_transformers
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.encoder import hugging_face_config, hugging_face_state
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.train import Run

MOST_DOCUMENTS = 4096


def contestants(run: Run, mesh: Mesh) -> list[Any]:
    """Set up all three with the same first weights; a step has equally many rows of the same length for each.

    run_mlm's default concatenates the texts and cuts; its other way (--line_by_line --pad_to_max_length) pads each
    document to the sequence length. Both make the logits of all positions.
    """
    config = cast(BertPretrainConfig, run.config)
    if config.sentence_task != "none":
        raise UserError("sentence_task", f"is {config.sentence_task!r}; run_mlm has none: --set sentence_task=none")
    data = recipe.open_data(config)
    train = cast(MaskedSamples, data.train)
    torch.manual_seed(run.config.seed)
    model = recipe.build_model(config, data.facts)
    transformers.logging.set_verbosity_error()
    settings = hugging_face_config(model.section, model.vocabulary_size)
    rivals = [as_transformers(transformers.AutoModelForMaskedLM, settings, hugging_face_state(model)) for _ in range(2)]
    lines = PaddedDocuments(train)
    useful = lines.mean_tokens * config.batch.global_size
    return [
        Bigbatch(run, mesh, model, train),
        TransformersTrainer(run, rivals[0], SampleRows(train, _row), "run_mlm, texts cut"),
        TransformersTrainer(run, rivals[1], SampleRows(lines, _row), "run_mlm, line by line", useful),
    ]


class PaddedDocuments:
    """The documents of a split one a row, cut or padded to the sequence length, masked as the others are."""

    def __init__(self, train: MaskedSamples) -> None:
        self.train = train
        tokens = train.samples
        ids = np.arange(min(tokens.num_samples, MOST_DOCUMENTS))
        stream = tokens.batch(ids, np.zeros_like(ids))["tokens"].ravel()
        ends = np.flatnonzero(stream == tokens.end_of_text) + 1
        documents = np.split(stream, ends)[1:-1][:MOST_DOCUMENTS]  # the first and the last may be torn
        self.lengths = np.array([len(document) for document in documents]).clip(max=tokens.sequence_length)
        self.rows = np.full((len(documents), tokens.sequence_length), tokens.end_of_text, np.int64)
        for row, length, document in zip(self.rows, self.lengths, documents, strict=True):
            row[:length] = document[:length]
        self.num_samples, self.fingerprint = len(documents), train.fingerprint
        self.mean_tokens = float(self.lengths.mean())

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return tokens, targets and labels as `MaskedSamples` does, and which tokens are not padding."""
        train, order = self.train, Order(sample_ids, epochs)
        masked = mask_tokens(self.rows[sample_ids], order, train.vocabulary, train.section, train.seed)
        useful = np.arange(self.rows.shape[1]) < self.lengths[sample_ids, None]
        return {**masked._asdict(), "useful": useful}


def _row(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return what transformers' collator would: labels at every position."""
    tokens, is_target = torch.from_numpy(batch["tokens"][0]), batch["labels"][0] != IGNORED_LABEL
    labels = torch.full_like(tokens, IGNORED_LABEL)
    labels[batch["targets"][0][is_target]] = torch.from_numpy(batch["labels"][0][is_target])
    useful = torch.from_numpy(batch["useful"][0]).long() if "useful" in batch else torch.ones_like(tokens)
    return {"input_ids": tokens, "labels": labels, "attention_mask": useful}

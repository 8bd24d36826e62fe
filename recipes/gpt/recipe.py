"""Train a GPT-2 or Llama decoder to predict the next token."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bigbatch.recipes.core import language_model
from bigbatch.recipes.core.data.prepare import prepare_tokens, prepared_folder
from bigbatch.recipes.core.data.shards import TokenSamples
from bigbatch.recipes.core.data.tokenizing import encode_prompt, load_given_tokenizer, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import generate
from bigbatch.recipes.core.models.decoder import Decoder, load_hugging_face
from bigbatch.recipes.core.models.hugging_face import conversion_record, untrained_document
from bigbatch.recipes.core.parallel import ALONE, Axis, Mesh
from bigbatch.recipes.core.recipe import DataSplits
from bigbatch.recipes.core.start_decoder import find_decoder
from bigbatch.recipes.core.train import Run
from bigbatch.recipes.gpt.config import GptConfig

count_targets, loss, metrics = language_model.count_targets, language_model.loss, language_model.metrics
flops_per_sample, hugging_face = language_model.flops_per_sample, language_model.hugging_face
foreign = language_model.foreign
ARCHITECTURE = ("LMHeadModel", "ForCausalLM")
"""How the names of transformers' classes of this kind end."""


def prepare(config: GptConfig) -> Path:
    """Tokenize the texts into shards."""
    return prepare_tokens(config.data)


def open_data(config: GptConfig) -> DataSplits:
    """Map the token shards into memory; there is no validation or test split where the document names none."""
    data = config.data
    folder = prepared_folder(data)
    train = TokenSamples(folder, "train", data.sequence_length, data.packing)

    def judged(split: str) -> TokenSamples:
        return TokenSamples(folder, split, data.sequence_length, data.packing)

    facts = {
        "vocabulary_size": train.vocabulary_size,
        "tokenizer": str(train.tokenizer_folder),
        "end_of_text": train.end_of_text,
        "tokens_per_sample": data.sequence_length,
        "train_samples": train.num_samples,
    }
    _prompts(config, load_tokenizer(folder).tokenizer)  # a prompt that cannot be used is told now, not hours later
    validation = judged("validation") if data.validation or data.validation_fraction else None
    return DataSplits(train, validation, facts, judged("test") if data.test else None)


def build_model(
    config: GptConfig,
    facts: dict[str, Any],
    initialize: bool = True,
    tensor: Axis = ALONE,
    sequence: Axis = ALONE,
    expert: Axis = ALONE,
) -> Decoder:
    """Build the decoder: first weights, or those of a Hugging Face folder."""
    model = Decoder(config.model, facts["vocabulary_size"], tensor, sequence, expert, config.parallel.tensor_sequence)
    if initialize and config.model.initialize_from:
        load_hugging_face(model, Path(config.model.initialize_from))
    return model


def contestants(run: Run, mesh: Mesh) -> list[Any]:
    """Return who trains the same model, for `bigbatch bench train`."""
    from bigbatch.recipes.gpt import contestants as module  # noqa: PLC0415 - transformers' Trainer takes seconds

    return module.contestants(run, mesh)


def samples_of_text(config: GptConfig, model: Decoder, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Go on with each prompt of the document. Collective: every rank must call it."""
    tokenizer = load_tokenizer(Path(facts["tokenizer"])).tokenizer
    sampling = language_model.sampling_of(config.sample, config.seed, (facts["end_of_text"],))
    rows = generate(model, _prompts(config, tokenizer), sampling)
    texts = [tokenizer.decode(completions[0].tokens) for completions in rows]
    return [{"prompt": prompt, "text": text} for prompt, text in zip(config.sample.prompts, texts, strict=True)]


def describe_folder(folder: Path) -> tuple[GptConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of a decoder, to generate with."""
    start, run = find_decoder(str(folder)), conversion_record(folder)["run"]
    section = {**start.section.model_dump(mode="json"), "initialize_from": str(folder)}
    data = {"train": [str(folder)], "sequence_length": start.section.max_positions}
    document = untrained_document(model=section, data=data)
    document |= {key: run[key] for key in ("data", "sample") if run.get("recipe") == "gpt"}
    facts = {"vocabulary_size": start.vocabulary_size, "tokenizer": str(folder)}
    facts["end_of_text"] = load_given_tokenizer(folder).end_of_text
    return GptConfig.model_validate_json(json.dumps(document)), facts


def _prompts(config: GptConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Encode the prompts; raise UserError for one that cannot be gone on with."""
    encoded = []
    for index, prompt in enumerate(config.sample.prompts):
        where = f"sample.prompts[{index}]"
        encoded.append(encode_prompt(tokenizer, prompt, where))
        if not 0 < len(encoded[-1]) < config.model.max_positions:
            room = config.model.max_positions - 1
            raise UserError(where, f"{prompt!r} has {len(encoded[-1])} tokens; 1 to {room} would be right")
    return encoded

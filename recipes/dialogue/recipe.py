"""Train a GPT-2 or Llama decoder to reply: the loss is on the assistant's messages alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bigbatch.recipes.core import language_model
from bigbatch.recipes.core.data.chat import Chat, check_messages, fit_request, open_chat
from bigbatch.recipes.core.data.splits import SPLITS, prepared_splits
from bigbatch.recipes.core.data.tokenizing import read_settings
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Completion, Sampling, generate
from bigbatch.recipes.core.models.decoder import Decoder
from bigbatch.recipes.core.models.hugging_face import conversion_record, untrained_document
from bigbatch.recipes.core.parallel import ALONE, Axis
from bigbatch.recipes.core.recipe import DataSplits
from bigbatch.recipes.core.start_decoder import DecoderStart, find_decoder, load_decoder
from bigbatch.recipes.dialogue import data
from bigbatch.recipes.dialogue.config import DialogueConfig
from bigbatch.recipes.dialogue.scores import most_similar_replies, reply_figures

ARCHITECTURE = ("LMHeadModel", "ForCausalLM")
"""How the names of transformers' classes of this kind end."""
FIELDS = ("messages",)
"""What an input of the predictor consists of; a plain text stands for one message of the user."""
REPLIES_AT_ONCE = 16

count_targets, loss, metrics = language_model.count_targets, language_model.loss, language_model.metrics
flops_per_sample, hugging_face = language_model.flops_per_sample, language_model.hugging_face
foreign = language_model.foreign


def prepare(config: DialogueConfig) -> Path:
    """Split the dialogues and tokenize them by the chat template."""
    start = _start(config)
    return data.prepare(config.data, start.tokenizer if start else None)


def open_data(config: DialogueConfig) -> DataSplits:
    """Map the prepared dialogues into memory."""
    start = _start(config)
    folder = prepared_splits(config.data, start.tokenizer if start else None)
    train = data.DialogueSamples(folder, "train", config.data)
    chat = open_chat(folder)
    facts = {
        "vocabulary_size": max(chat.tokenizer.vocabulary_size, start.vocabulary_size if start else 0),
        "tokenizer": str(folder),
        "end_of_text": chat.tokenizer.end_of_text,
        "tokens_per_sample": config.data.sequence_length,
        "train_samples": train.num_samples,
    }
    _requests(config, chat, config.sample.prompts, "sample.prompts")  # what is wrong is told now, not hours later
    validation, test = (data.open_split(folder, split, config.data) for split in SPLITS[1:])
    return DataSplits(train, validation, facts, test)


def build_model(
    config: DialogueConfig,
    facts: dict[str, Any],
    initialize: bool = True,
    tensor: Axis = ALONE,
    sequence: Axis = ALONE,
    expert: Axis = ALONE,
) -> Decoder:
    """Build the decoder with first weights, or those that it starts from."""
    model = Decoder(config.model, facts["vocabulary_size"], tensor, sequence, expert, config.parallel.tensor_sequence)
    if initialize and (start := _start(config)):
        load_decoder(model, start)
    return model


def generated_figures(
    config: DialogueConfig, facts: dict[str, Any], model: Decoder, samples: data.DialogueSamples
) -> dict[str, Any]:
    """Compare replies, the likeliest token by token, with what was said; and the baseline's on the same dialogues."""
    folder = Path(facts["tokenizer"])
    chat = open_chat(folder)
    asked = data.replies_of(samples.examples, config.sample.evaluated_replies)
    requests = [reply.request.tolist()[-_room(config) :] for reply in asked]
    sampling = Sampling(config.sample.max_new_tokens, temperature=0.0, stop_tokens=(facts["end_of_text"],))
    written = [completion for completion, _ in _reply(chat, model, requests, sampling)]
    references = [reply.content for reply in asked]
    known = data.replies_of(data.DialogueSamples(folder, "train", config.data).examples)
    similar = most_similar_replies(known, [reply.before for reply in asked])
    return {
        "num_replies": len(asked),
        **reply_figures(written, references),
        "of_most_similar_dialogue": reply_figures(similar, references),
        "of_references": reply_figures(references, references),
    }


def samples_of_text(config: DialogueConfig, model: Decoder, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Reply to each prompt of the document. Collective: every rank must call it."""
    answers = predictor(config, facts, model)([{"messages": prompt} for prompt in config.sample.prompts])
    return [
        {"prompt": prompt, "text": answer["reply"]}
        for prompt, answer in zip(config.sample.prompts, answers, strict=True)
    ]


def predictor(
    config: DialogueConfig, facts: dict[str, Any], model: Decoder
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return a function from objects with messages to {"reply", "stopped"}; `stopped` as `generate.Completion` has it.

    Of a dialogue that is too long the oldest turns are left out; "left_out" says how many messages.
    """
    chat = open_chat(Path(facts["tokenizer"]))
    sampling = language_model.sampling_of(config.sample, config.seed, (facts["end_of_text"],))

    def predict(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        requests = _requests(config, chat, [item["messages"] for item in items])
        replies = _reply(chat, model, [tokens for tokens, _ in requests], sampling)
        return [
            {"reply": text, "stopped": completion.stopped, **({"left_out": dropped} if dropped else {})}
            for (text, completion), (_, dropped) in zip(replies, requests, strict=True)
        ]

    return predict


def describes(folder: Path) -> bool:
    """Tell whether a folder's tokenizer has a chat template."""
    return bool(read_settings(folder).get("chat_template"))


def describe_folder(folder: Path) -> tuple[DialogueConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of a model with a chat template, to predict with."""
    start = find_decoder(str(folder))
    run = conversion_record(folder)["run"]
    document = untrained_document(
        model={**start.section.model_dump(mode="json"), "initialize_from": str(folder)},
        data={"train": [str(folder)], "sequence_length": start.section.max_positions},
    )
    document |= {"sample": run["sample"]} if run.get("recipe") == "dialogue" else {}
    config = DialogueConfig.model_validate_json(json.dumps(document))
    facts = {"vocabulary_size": start.vocabulary_size, "tokenizer": str(folder)}
    return config, facts | {"end_of_text": open_chat(folder).tokenizer.end_of_text}


def _start(config: DialogueConfig) -> DecoderStart | None:
    return find_decoder(config.model.initialize_from) if config.model.initialize_from else None


def _requests(
    config: DialogueConfig, chat: Chat, dialogues: Sequence[Any], where: str = "messages"
) -> list[tuple[list[int], int]]:
    """Return what asks for a reply to each, and how many messages were left out; raise UserError for what is wrong.

    A dialogue is a list of messages, or what a user says.
    """
    given = [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in dialogues]
    try:
        return [fit_request(chat, check_messages(messages, chat), _room(config)) for messages in given]
    except ValueError as error:
        raise UserError(where, str(error)) from None


def _room(config: DialogueConfig) -> int:
    """Return how many tokens may ask for a reply: it is given half of the positions at most."""
    positions = config.model.max_positions
    return positions - min(config.sample.max_new_tokens, positions // 2)


def _reply(chat: Chat, model: Decoder, requests: list[list[int]], sampling: Sampling) -> list[tuple[str, Completion]]:
    """Return the reply to each request, those of like lengths written at once."""
    order = sorted(range(len(requests)), key=lambda number: len(requests[number]))
    found: dict[int, tuple[str, Completion]] = {}
    for begin in range(0, len(order), REPLIES_AT_ONCE):
        numbers = order[begin : begin + REPLIES_AT_ONCE]
        rows = generate(model, [requests[number] for number in numbers], sampling)
        for number, (completion, *_) in zip(numbers, rows, strict=True):
            found[number] = chat.tokenizer.tokenizer.decode(completion.tokens).strip(), completion
    return [found[number] for number in range(len(requests))]

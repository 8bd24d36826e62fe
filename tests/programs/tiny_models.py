"""Run folders of tiny models with first weights: `write_run(folder, kind)`, or `tiny_models.py KIND FOLDER`.

Nothing is trained: weights are drawn large, so that answers differ.
"""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.tensor_file import Entry, write_tensors

RECIPES = Path(__file__).parents[1] / "recipes"
PAIRS_TO_SUMMARIZE = {"sequence_length": 64, "summary_tokens": 12}
WRITER = {"family": "mbart", "num_encoder_layers": 1, "num_decoder_layers": 1, "hidden_size": 32, "num_heads": 4}


def write_run(folder: Path, kind: str, **changes: dict[str, Any]) -> Path:
    """Prepare data and write a run folder with a checkpoint of first weights; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    make, *told = KINDS[kind]
    document = make(folder, *told)
    for section, settings in changes.items():
        document[section] = {**document.get(section, {}), **settings}
    config = recipes.find_config(document["recipe"]).model_validate_json(json.dumps(document))
    recipe = recipes.find(document["recipe"])
    recipe.prepare(config)
    facts = recipe.open_data(config).facts
    torch.manual_seed(5)
    model = recipe.build_model(config, facts).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    state = {"run": config.model_dump(mode="json"), "facts": facts, "content_id": "c" * 12, "consumed_samples": 0}
    save(folder / "checkpoints" / "step_00000001", model, state | {"data_fingerprint": "d"})
    (folder / "run.json").write_text(config.model_dump_json())
    (folder / "deepspeed.json").write_text("{}")
    (folder / "environment.json").write_text(json.dumps({"content_id": "c" * 12}))
    return folder


def save(folder: Path, model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Write a checkpoint as one rank does."""
    folder.mkdir(parents=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    entries = [Entry(f"master/{name}", tensor.dtype, (tensor.numel(),)) for name, tensor in tensors.items()]
    file = write_tensors(folder / "a.safetensors", entries, (tensor.flatten() for tensor in tensors.values()))
    pieces = [[name, list(t.shape), ["a.safetensors", "master", 0, t.numel()]] for name, t in tensors.items()]
    (folder / "rank_00000.json").write_text(json.dumps({"file": file, "pieces": pieces}))
    checkpoint._commit(folder, 1, {"step": 1, **state})


def _conftest(recipe: str) -> Any:
    specification = importlib.util.spec_from_file_location(f"{recipe}_conftest", RECIPES / recipe / "conftest.py")
    assert specification
    module = importlib.util.module_from_spec(specification)
    assert specification.loader
    specification.loader.exec_module(module)
    return module


def _of(folder: Path, recipe: str, *told: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return what the function that a recipe's fixture make_document gives returns."""
    return _conftest(recipe).make_document._get_wrapped_function()()(folder, *told, **changes)


def _cross(folder: Path) -> dict[str, Any]:
    module = _conftest("match")
    return module.make_cross._get_wrapped_function()(module.make_document._get_wrapped_function()())(folder)


def _writer(folder: Path) -> dict[str, Any]:
    document = _of(folder, "summarize", search={"max_new_tokens": 16, "num_beams": 2})
    del document["summary"], document["data"]["oracle_sentences"]
    document["data"] |= PAIRS_TO_SUMMARIZE
    return document | {"model": {"backbone": "seq2seq", "shape": {**WRITER, "max_positions": 64, "dropout": 0.0}}}


def _judge(folder: Path) -> dict[str, Any]:
    rows = [{"source": f"a{n} a{n}", "translation": f"a{n} " * (1 + n % 3), "score": n % 3 / 2} for n in range(60)]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(folder / "rated.jsonl")], "target_column": "translation", "score_column": "score"}
    document = _of(folder, "translate", model={"head": "quality"}, data=data)
    del document["search"]
    return document


def _gpt(folder: Path, family: str) -> dict[str, Any]:
    texts = _conftest("gpt").made_documents._get_wrapped_function()()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 64}
    return {
        "version": 1,
        "recipe": "gpt",
        "model": {"family": family, **shape, **({"num_key_value_heads": 2} if family == "llama" else {})},
        "data": {
            "train": [str(folder / "texts.jsonl")],
            "validation_fraction": 0.2,
            "sequence_length": 48,
            "packing": "isolate",
            "tokenizer": {"kind": "bpe", "vocabulary_size": 300},
            "prepared_dir": str(folder / "prepared"),
        },
        "batch": {"global_size": 4},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"total_steps": 1},
        "sample": {"prompts": [], "max_new_tokens": 12},
    }


KINDS: dict[str, tuple[Any, ...]] = {
    "classify": (_of, "classify"),
    "question_answering": (_of, "question_answering"),
    "entities": (_of, "extract", "entities", "encoder"),
    "relations": (_of, "extract", "relations", "encoder"),
    "match_bi": (_of, "match"),
    "match_cross": (_cross,),
    "translate": (_of, "translate"),
    "summarize": (_of, "summarize"),
    "summarize_written": (_writer,),
    "classify_images": (_of, "classify_images"),
    "dialogue": (_of, "dialogue"),
    "gpt_llama": (_gpt, "llama"),
    "gpt_gpt2": (_gpt, "gpt2"),
    "transcribe": (_of, "transcribe"),
} | {
    # transformers has no class for these
    "classify_attention": (_of, "classify", "attention"),
    "classify_rnn": (_of, "classify", "rnn"),
    "classify_mean": (partial(_of, model={"pooling": "mean"}), "classify"),
    "entities_words": (_of, "extract", "entities"),
    "entities_crf": (partial(_of, model={"crf": True}), "extract", "entities", "encoder"),
    "relations_words": (_of, "extract", "relations"),
    "match_words": (partial(_of, model={"encoder": None, "backbone": "words", "embedding_size": 32}), "match"),
    "next_word": (_of, "next_word", "lstm"),
    "next_word_ngram": (_of, "next_word", "ngram"),
    "summarize_layers": (partial(_of, model={"sentence_layers": 1}), "summarize"),
    "translate_quality": (_judge,),
}
"""What makes a run document in a folder, and what it is told."""

if __name__ == "__main__":
    print(write_run(Path(sys.argv[2]), sys.argv[1]))

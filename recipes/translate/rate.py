"""`python -m bigbatch.recipes.translate.rate RUN_DIR`: translate pairs and tell how near each comes to its reference.

A JSON line a pair with source, translation, reference and score, the chrF of the translation: what a run with
`model.head` quality learns from, with `data.target_column` translation and `data.score_column` score.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.checkpoint import fill, open_checkpoint
from bigbatch.recipes.core.config import ParallelSource
from bigbatch.recipes.core.data.rows import read_rows
from bigbatch.recipes.core.data.sources import list_files
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from bigbatch.recipes.core.precision import place
from bigbatch.recipes.core.run_home import enter_home
from bigbatch.recipes.translate import recipe
from bigbatch.recipes.translate.config import TranslateConfig
from bigbatch.recipes.translate.translating import judge_each, open_translator, translate

PAIRS_AT_ONCE = 512


def main(argv: list[str]) -> int:
    """Rate the pairs of a split, or of two files."""
    arguments = _parser().parse_args(argv)
    if (arguments.source is None) != (arguments.target is None):
        raise UserError("--source", "and --target name two files of lines; both are right, or neither")
    files = None
    if arguments.source:
        files = ParallelSource(path=str(arguments.source.absolute()), target=str(arguments.target.absolute()))
    reader = open_checkpoint(enter_home(arguments.run_dir))
    config = TranslateConfig.model_validate_json(json.dumps(reader.manifest["run"]))
    if config.model.head == "quality":
        raise UserError(str(arguments.run_dir), "tells how good translations are; right is a run that translates")
    facts = reader.manifest["facts"]
    model: Any = recipe.build_model(config, facts, initialize=False)
    fill(reader, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = place(model, device, config.precision.dtype).eval()  # as evaluate does
    parts = open_translator(facts, model, config.search)
    pairs = _pairs_of_files(files) if files else _pairs_of_split(config, arguments.split)
    pairs = pairs[: arguments.max_pairs]
    for begin in range(0, len(pairs), PAIRS_AT_ONCE):
        sources, references = zip(*pairs[begin : begin + PAIRS_AT_ONCE], strict=True)
        found = [one.text for one in translate(parts, sources)]
        for source, text, reference, score in zip(
            sources, found, references, judge_each(found, references), strict=True
        ):
            row = {"source": source, "translation": text, "reference": reference, "score": score}
            print(json.dumps(row, ensure_ascii=False))
    return EXIT_DONE


def _pairs_of_split(config: TranslateConfig, split: str) -> list[tuple[str, str]]:
    data = recipe.open_data(config)
    samples = {"train": data.train, "validation": data.validation, "test": data.test}[split]
    if samples is None:
        raise UserError(f"data.{split}", "is empty and nothing is cut from the training data")
    numbers = np.arange(samples.examples.num_rows)
    sources, targets = (samples.examples.texts(side, numbers) for side in ("source", "target"))
    return list(zip(sources, targets, strict=True))


def _pairs_of_files(files: ParallelSource) -> list[tuple[str, str]]:
    found = []
    for row in read_rows(list_files([files], "--")[0], {"source": "--source", "target": "--target"}):
        pair = (row.values["source"] or "").strip(), (row.values["target"] or "").strip()
        if not all(pair):
            raise UserError(row.origin, "has no partner, or is empty")
        found.append(pair)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bigbatch.recipes.translate.rate", description="Translate pairs and rate each.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run that translates, or its checkpoint")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="validation", help="of the run")
    parser.add_argument("--source", type=Path, metavar="FILE", help="lines to translate instead, also .gz")
    parser.add_argument("--target", type=Path, metavar="FILE", help="their references, line by line")
    parser.add_argument("--max-pairs", type=int, metavar="N", help="no more than the first so many")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)

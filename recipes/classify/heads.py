"""The heads of text classifiers: kept from a model to start from, and those of families that are not native."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bigbatch.recipes.core.checkpoint import open_checkpoint
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.recipes.core.start import CONFIG_FILE, WHERE


def read_labels(path: Path) -> list[str]:
    """Return the labels of the head in a folder or checkpoint; none where it has no head."""
    if (path / CONFIG_FILE).is_file():
        table = read_json(path / CONFIG_FILE).get("id2label") or {}
        return [table[key] for key in sorted(table, key=int)]
    return open_checkpoint(path).manifest["facts"].get("labels", [])


def build_other(
    config: dict[str, Any], folder: Path | None, labels: list[str], multi_label: bool, keep_head: bool
) -> nn.Module:
    """Build transformers' classifier of another family: first weights, or those of the folder, safetensors alone."""
    import transformers  # noqa: PLC0415 - takes seconds, and native models do without

    named = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    settings = transformers.AutoConfig.for_model(**named)
    settings.id2label, settings.label2id = label_tables(labels)
    settings.problem_type = problem_type(multi_label)
    if settings.pad_token_id is None:  # a decoder classifies by its last token that is not padding
        settings.pad_token_id = settings.eos_token_id
    auto_class = transformers.AutoModelForSequenceClassification
    try:
        if folder is None:
            return auto_class.from_config(settings, dtype=torch.float32)
        model = auto_class.from_pretrained(
            folder,
            config=settings,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other labels is drawn anew
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise UserError(WHERE, f"{folder or config.get('model_type')} is no text classifier: {error}") from None
    if keep_head:
        check_labels(list((config.get("id2label") or {}).values()), labels, folder)
        return model
    for name, module in model.named_modules():
        if not name.startswith(model.base_model_prefix) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def check_labels(theirs: list[str], labels: list[str], folder: Path) -> None:
    """Raise UserError unless a head that is to be kept is for the labels at hand."""
    if theirs != labels:
        shown = ", ".join(theirs[:5]) or "none"
        raise UserError("model.keep_head", f"the head in {folder} is for other labels ({shown}, ...); right is false")


def label_tables(labels: list[str]) -> tuple[dict[int, str], dict[str, int]]:
    """Return id2label and label2id as config.json has them."""
    return dict(enumerate(labels)), {label: index for index, label in enumerate(labels)}


def problem_type(multi_label: bool) -> Literal["multi_label_classification", "single_label_classification"]:
    """Return how transformers calls the loss."""
    return "multi_label_classification" if multi_label else "single_label_classification"

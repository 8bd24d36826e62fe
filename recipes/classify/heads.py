"""The heads of text classifiers: kept from a model to start from, and those of families that are not native."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import label_tables
from bigbatch.recipes.core.start import WHERE, check_labels


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


def problem_type(multi_label: bool) -> Literal["multi_label_classification", "single_label_classification"]:
    """Return how transformers calls the loss."""
    return "multi_label_classification" if multi_label else "single_label_classification"

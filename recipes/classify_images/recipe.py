"""Tell of which kind an image is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.classify_images import data
from bigbatch.recipes.classify_images.config import ClassifyImagesConfig
from bigbatch.recipes.classify_images.images import open_image
from bigbatch.recipes.core.data.splits import prepared_splits
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.foreign import ForeignVision, Session
from bigbatch.recipes.core.metrics import classification_figures
from bigbatch.recipes.core.models.hugging_face import conversion_record, read_json, untrained_document
from bigbatch.recipes.core.models.vision import (
    VisionTransformer,
    load_vision,
    section_from_hugging_face,
    stored_labels,
    vision_config,
    vision_tensors,
)
from bigbatch.recipes.core.recipe import Batch, DataSplits, HuggingFaceExport, Loss, Outputs

PROCESSOR_FILE = "preprocessor_config.json"
ARCHITECTURE = "ForImageClassification"
"""How the names of transformers' classes of this kind end."""
READS_FILES = True
"""An input of `predictor` is the path of a file."""


def prepare(config: ClassifyImagesConfig) -> Path:
    """Read the images and bring them into one form."""
    return data.prepare(config.data)


def open_data(config: ClassifyImagesConfig) -> DataSplits:
    """Map the prepared images into memory."""
    folder = prepared_splits(config.data)
    train, validation, test = (
        data.open_split(folder, split, config.data, config.augment, config.seed) for split in data.SPLITS
    )
    assert train is not None  # prepare refuses data without training images
    facts = {
        "labels": train.labels,
        "train_samples": train.num_samples,
        "label_smoothing": config.objective.label_smoothing,
    }
    return DataSplits(train, validation, facts, test)


def build_model(config: ClassifyImagesConfig, facts: dict[str, Any], initialize: bool = True) -> "ImageClassifier":
    """Build the Vision Transformer, where asked from a Hugging Face folder's weights."""
    shape, labels = config.data, facts["labels"]
    model = VisionTransformer(config.model, shape.image_size, shape.num_channels, len(labels))
    if initialize and config.model.initialize_from:
        load_vision(model, Path(config.model.initialize_from).expanduser(), labels)
    return ImageClassifier(model, config.objective.label_smoothing)


class ImageClassifier(nn.Module):
    """A model and its loss."""

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(
        self,
        pixels: torch.Tensor,  # [B, C, S, S]
        labels: torch.Tensor | None = None,  # [B]
        other_labels: torch.Tensor | None = None,  # [B], of what is mixed in
        shares: torch.Tensor | None = None,  # [B], what is left of each image's own
    ) -> Any:
        """Return the logits [B, K], with labels the cross-entropy summed over the images, and the logits."""
        logits = self.model(pixels)
        if labels is None:
            return logits
        smoothing = self.label_smoothing if self.training else 0.0
        losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        if other_labels is not None and shares is not None:
            others = F.cross_entropy(logits.float(), other_labels, reduction="none", label_smoothing=smoothing)
            losses = shares * losses + (1 - shares) * others
        return losses.sum(), logits


def count_targets(batch: dict[str, np.ndarray]) -> int:
    """Count the images."""
    return len(batch["labels"])


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum the cross-entropy over the images."""
    total, _ = model(**batch)
    return Loss(total, len(batch["labels"]))


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    """Return the loss, and the probability of each label beside what is right."""
    total, logits = model(**batch)
    found = {"probabilities": logits.float().softmax(-1), "labels": batch["labels"]}
    return Outputs(Loss(total, len(batch["labels"])), found)


def metrics(loss: float) -> dict[str, float]:
    """Return nothing: the loss alone says little here."""
    return {}


def figures(
    config: ClassifyImagesConfig, facts: dict[str, Any], arrays: dict[str, np.ndarray], thorough: bool
) -> dict[str, Any]:
    """Judge the probabilities; when thorough with intervals, all labels and the confusion matrix."""
    samples = 1000 if thorough else 0
    found = classification_figures(
        arrays["probabilities"], arrays["labels"], facts["labels"], bootstrap_samples=samples
    )
    return {**found.scalars, **({"details": found._asdict()} if thorough else {})}


def figure_names(config: ClassifyImagesConfig, facts: dict[str, Any]) -> list[str]:
    """Name the figures that a validation split with all labels has."""
    num_labels = len(facts["labels"])
    arrays = {"probabilities": np.eye(num_labels), "labels": np.arange(num_labels)}
    return list(figures(config, facts, arrays, thorough=False))


def flops_per_sample(config: ClassifyImagesConfig, facts: dict[str, Any]) -> float:
    """Count 6 operations a token for each weight, and 12 T D for its attention (arXiv 2001.08361, section 2.1)."""
    with torch.device("meta"):
        model: Any = build_model(config, facts, initialize=False)
    num_tokens = model.model.embed.positions.shape[1]
    weights = sum(parameter.numel() for parameter in model.parameters()) - model.model.embed.positions.numel()
    attention = 12 * config.model.num_layers * num_tokens * config.model.hidden_size
    return float((6 * weights + attention) * num_tokens)


def samples_of_text(config: ClassifyImagesConfig, model: nn.Module, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return nothing: a classifier writes no text."""
    return []


def predictor(
    config: ClassifyImagesConfig, facts: dict[str, Any], model: nn.Module
) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Return a function from paths of images to {"label", "probability", "probabilities"}."""
    labels, device = facts["labels"], next(model.parameters()).device
    model.eval()

    def predict(paths: list[str]) -> list[dict[str, Any]]:
        images = np.stack([open_image(Path(path).expanduser(), config.data, path) for path in paths])
        with torch.inference_mode():
            logits = model(torch.from_numpy(data.normalized(images)).to(device)).float()
        answers = []
        for row in logits.softmax(-1).tolist():
            chances = dict(zip(labels, row, strict=True))
            best = max(chances, key=lambda label: chances[label])
            answers.append({"label": best, "probability": chances[best], "probabilities": chances})
        return answers

    return predict


def foreign(config: ClassifyImagesConfig, facts: dict[str, Any], session: Session) -> nn.Module:
    """Return what stands in for the model where a session gives the logits of images."""
    return ImageClassifier(ForeignVision(session), config.objective.label_smoothing)


def hugging_face(config: ClassifyImagesConfig, facts: dict[str, Any]) -> HuggingFaceExport:
    """Name the model's tensors and settings as transformers does; raise UserError where it has no such class."""
    labels, shape = facts["labels"], config.data
    settings = vision_config(config.model, shape.image_size, shape.num_channels)
    settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    size = {"height": shape.image_size, "width": shape.image_size}
    half = [0.5] * shape.num_channels
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": size,
        "do_resize": True,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
        "do_convert_rgb": shape.num_channels == 3,
    }
    tensors = {f"model.{name}": pieces for name, pieces in vision_tensors(config.model, len(labels)).items()}
    return HuggingFaceExport(settings, tensors, auto_class=f"AutoModel{ARCHITECTURE}", processor=processor)


def describe_folder(folder: Path) -> tuple[ClassifyImagesConfig, dict[str, Any]]:
    """Describe a Hugging Face folder of a ViT for image classification, to predict with."""
    settings = read_json(folder / "config.json")
    section = section_from_hugging_face(settings)
    processor = read_json(folder / PROCESSOR_FILE) if (folder / PROCESSOR_FILE).exists() else {}
    for name in ("image_mean", "image_std"):
        if set(processor.get(name) or [0.5]) != {0.5}:
            raise UserError(str(folder / PROCESSOR_FILE), f"{name} is {processor[name]}; right is 0.5 for each")
    if settings["num_channels"] not in (1, 3):
        raise UserError(str(folder), f"is for images of {settings['num_channels']} channels; right is 1 or 3")
    data_section = {
        "train": [{"path": str(folder)}],
        "image_size": settings["image_size"],
        "channels": "grey" if settings["num_channels"] == 1 else "color",
        "resize": "stretch",
    }
    document = untrained_document(
        model={**section.model_dump(), "initialize_from": str(folder)},
        data=conversion_record(folder)["run"].get("data", data_section),
    )
    config = ClassifyImagesConfig.model_validate_json(json.dumps(document))
    return config, {"labels": stored_labels(settings)}

"""The run document of image classification."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.recipes.core.config import (
    Fraction,
    ImageSource,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    RunConfig,
    Section,
    SplitSection,
)
from bigbatch.recipes.core.models.config import VisionSection

Operation = Literal[
    "identity",
    "auto_contrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
]
OPERATIONS: tuple[Operation, ...] = Operation.__args__


class ImageDataSection(SplitSection):
    """Images with one label each, and the form that all get."""

    train: Annotated[tuple[ImageSource, ...], Field(min_length=1)]
    validation: tuple[ImageSource, ...] = ()
    test: tuple[ImageSource, ...] = ()
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Cut from the training images, of each label the same share, when there are no validation sources."""
    split_seed: NonNegativeInt = 0
    """Which images are cut is a function of this and of their pixels, not of the run's seed."""
    image_key: str = "image"
    """Column of the images in Hugging Face data, their array in an .npz, or the column of paths in a file of labels."""
    label_key: str = "label"
    """The same of the labels."""
    labels: tuple[str, ...] = ()
    """All labels, in the order of the model's outputs; by default those of the training images, sorted."""
    image_size: PositiveInt
    """Pixels along each side, whatever the files have."""
    channels: Literal["grey", "color"] = "color"
    """What every image becomes."""
    resize: Literal["crop", "stretch"] = "crop"
    """An image that is no square: its middle counts, or all of it, out of proportion."""
    on_error: Literal["fail", "skip"] = "fail"
    """A file that is no image, is cut off, or is not there although a file of labels names it; a label of a validation
    or test image that no training image has. Told, or left out and counted. `--on-error` sets it."""
    on_leak: Literal["report", "drop", "fail"] = "report"
    """Images of validation and test that are in an earlier split too, pixel by pixel; `drop` leaves them out there."""

    @property
    def num_channels(self) -> int:
        """Numbers a pixel."""
        return 1 if self.channels == "grey" else 3


class AugmentSection(Section):
    """What is done to a training image, drawn anew in every epoch from the seed and the image's number alone."""

    flip: bool = False
    """Mirror every other image, left for right."""
    least_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A square of this part of the image's area or more is cut out and enlarged; 1: all of it stays."""
    random_operations: NonNegativeInt = 0
    """RandAugment (https://arxiv.org/abs/1909.13719): so many of `operations`, one behind the other."""
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """How strong they are: at 10 30 degrees, a shear of 0.3, a shift by 0.45 of the side, and so on."""
    operations: Annotated[tuple[Operation, ...], Field(min_length=1)] = OPERATIONS
    mixup: NonNegativeFloat = 0.0
    """mixup (https://arxiv.org/abs/1710.09412): the alpha of the Beta distribution that says how much of another
    training image, and of its label, is in each; 0: none."""


class ImageObjectiveSection(Section):
    """What is minimized while training; validation has the plain cross-entropy."""

    label_smoothing: Fraction = 0.0


class ClassifyImagesConfig(RunConfig):
    """Tell of which kind an image is."""

    recipe: Literal["classify_images"] = "classify_images"
    model: VisionSection
    data: ImageDataSection
    augment: AugmentSection = AugmentSection()
    objective: ImageObjectiveSection = ImageObjectiveSection()

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Self:
        if self.data.image_size % self.model.patch_size:
            found = f"data.image_size {self.data.image_size}"
            raise ValueError(f"{found} is not a multiple of model.patch_size {self.model.patch_size}")
        return self


Config = ClassifyImagesConfig

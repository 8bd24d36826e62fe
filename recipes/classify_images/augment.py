"""Training images made anew in every epoch: pure functions of pixels and random numbers, by Pillow.

RandAugment (https://arxiv.org/abs/1909.13719, section 3): operations are drawn with equal chances, all of one
magnitude; those with a direction go either way.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from bigbatch.recipes.classify_images.config import AugmentSection

Picture = Image.Image
MOST_DEGREES, MOST_SHEAR, MOST_SHIFT, MOST_ENHANCED, MOST_BITS = 30.0, 0.3, 0.45, 0.9, 4


def augmented(pixels: np.ndarray, section: AugmentSection, generator: np.random.Generator) -> np.ndarray:
    """Return an image uint8 [S, S, C] cut, mirrored and changed, as the generator's next numbers say."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    size = image.width
    if section.least_area < 1:
        side = size * generator.uniform(section.least_area, 1.0) ** 0.5
        left, top = generator.uniform(0, size - side, 2)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    if section.flip and generator.random() < 0.5:
        image = ImageOps.mirror(image)
    for _ in range(section.random_operations):
        name = section.operations[int(generator.integers(len(section.operations)))]
        strength = section.magnitude / 10 * (1 if generator.random() < 0.5 else -1)
        image = _OPERATIONS[name](image, strength)
    return np.asarray(image).reshape(pixels.shape)


def _affine(image: Picture, *numbers: float) -> Picture:
    return image.transform(image.size, Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)


def _enhance(kind: Callable[[Picture], ImageEnhance._Enhance]) -> Callable[[Picture, float], Picture]:
    return lambda image, strength: kind(image).enhance(1 + MOST_ENHANCED * strength)


_OPERATIONS: dict[str, Callable[[Picture, float], Picture]] = {
    "identity": lambda image, _: image,
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": lambda image, strength: image.rotate(MOST_DEGREES * strength, Image.Resampling.BILINEAR),
    "solarize": lambda image, strength: ImageOps.solarize(image, round(255 * (1 - abs(strength)))),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda image, strength: ImageOps.posterize(image, 8 - round(MOST_BITS * abs(strength))),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength: _affine(
        image, 1, MOST_SHEAR * strength, -MOST_SHEAR * strength * image.height / 2, 0, 1, 0
    ),
    "shear_y": lambda image, strength: _affine(
        image, 1, 0, 0, MOST_SHEAR * strength, 1, -MOST_SHEAR * strength * image.width / 2
    ),
    "translate_x": lambda image, strength: _affine(image, 1, 0, MOST_SHIFT * strength * image.width, 0, 1, 0),
    "translate_y": lambda image, strength: _affine(image, 1, 0, 0, 0, 1, MOST_SHIFT * strength * image.height),
}

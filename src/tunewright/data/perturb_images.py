"""Messy pictures: eight common corruptions in five strengths. Pure functions of (picture, strength, rng).

Knows Pillow pictures, no file and no task. Sizes are shares of the shorter side, so that a thumbnail and a photograph
suffer alike. The kinds follow Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261; strengths are our own.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Rng = np.random.Generator
Pixels = npt.NDArray[np.float64]  # (H, W, 3), 0 to 255

SEVERITIES = (1, 2, 3, 4, 5)


def perturb(picture: Image, kind: str, severity: int, rng: Rng) -> Image:
    """The RGB picture, corrupted; severity 0 is the picture itself. Size and mode stay."""
    return picture if severity == 0 else KINDS[kind](picture.convert("RGB"), severity - 1, rng)


def _pixels(picture: Image) -> Pixels:
    return np.asarray(picture, dtype=np.float64)


def _picture(pixels: Pixels) -> Image:
    from PIL import Image

    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def noise(picture: Image, strength: int, rng: Rng) -> Image:
    """Grain, as from a sensor in the dark."""
    pixels = _pixels(picture)
    return _picture(pixels + rng.normal(0, (8, 14, 22, 34, 50)[strength], pixels.shape))


def specks(picture: Image, strength: int, rng: Rng) -> Image:
    """Single pixels that are black or white."""
    pixels = _pixels(picture).copy()
    hit = rng.random(pixels.shape[:2]) < (0.005, 0.015, 0.03, 0.06, 0.12)[strength]
    pixels[hit] = 255.0 * rng.integers(0, 2, size=(int(hit.sum()), 1))
    return _picture(pixels)


def blur(picture: Image, strength: int, rng: Rng) -> Image:
    """Out of focus."""
    from PIL import ImageFilter

    radius = (0.004, 0.008, 0.014, 0.022, 0.032)[strength] * min(picture.size)
    return picture.filter(ImageFilter.GaussianBlur(max(radius, 0.3)))


def motion(picture: Image, strength: int, rng: Rng) -> Image:
    """A hand that moved: the mean of the picture shifted along a line."""
    reach = max(1, round((0.01, 0.02, 0.035, 0.05, 0.07)[strength] * min(picture.size)))
    angle = rng.random() * np.pi
    steps = [(reach + round(k * np.sin(angle)), reach + round(k * np.cos(angle))) for k in range(-reach, reach + 1)]
    pixels = _pixels(picture)
    height, width = pixels.shape[:2]
    wide = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    shifted = [wide[down : down + height, right : right + width] for down, right in steps]
    return _picture(np.mean(shifted, axis=0))


def pixelated(picture: Image, strength: int, rng: Rng) -> Image:
    """Made small and large again."""
    from PIL import Image

    share = (0.7, 0.5, 0.38, 0.28, 0.2)[strength]
    small = picture.resize([max(1, round(share * side)) for side in picture.size], Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def jpeg(picture: Image, strength: int, rng: Rng) -> Image:
    """Saved too small."""
    from PIL import Image

    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=(40, 25, 15, 10, 6)[strength])
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def dark(picture: Image, strength: int, rng: Rng) -> Image:
    """Too little light."""
    return _picture(_pixels(picture) * (0.8, 0.65, 0.5, 0.36, 0.24)[strength])


def pale(picture: Image, strength: int, rng: Rng) -> Image:
    """Little contrast, as through fog."""
    pixels = _pixels(picture)
    veil = (0.15, 0.3, 0.45, 0.6, 0.72)[strength]
    return _picture(pixels * (1 - veil) + 200.0 * veil)


KINDS: dict[str, Callable[[Image, int, Rng], Image]] = {
    "noise": noise,
    "specks": specks,
    "blur": blur,
    "motion": motion,
    "pixelated": pixelated,
    "jpeg": jpeg,
    "dark": dark,
    "pale": pale,
}

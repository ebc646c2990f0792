"""One image file as RGB pixels: each of Pillow's modes with its own range, or refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from deq.records.errors import UserError, first_line

Pixels: TypeAlias = NDArray[np.uint8]

_EIGHT_BIT = {"1", "L", "La", "LA", "P", "PA", "RGB", "RGBa", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"}
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
_NUMBERS = {"I": "32-bit integers", "F": "floating-point numbers"}

_SCALES = {"L;2": 85, "L;4": 17}
"""How a PNG packs grey pixels of fewer than 8 bits → what Pillow multiplies them with, but not the key."""

# TIFF's tags.
_BITS, _PHOTOMETRIC, _CHANNELS, _SAMPLE_FORMAT = 258, 262, 277, 339
_WHITE_IS_ZERO = 0
_SAMPLE_FORMATS = {2: "signed integers", 3: "floating-point numbers"}


def read(path: Path, size: int | None, greatest: list[int] | None = None) -> Pixels:
    """The image in a file, upright, black 0 and white 255: (H, W, 3) uint8.

    Args:
        size: scale the shorter side to this many pixels and cut out the centre square; None leaves the image as it is.
        greatest: takes the greatest value of an image of 16 bits a pixel.

    Raises:
        UserError: not a readable image, or one of which RGB pixels would be a guess.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(_fitted(_rgb(image, path, greatest), size))
    except UserError:
        raise
    except Exception as error:  # Pillow's formats raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"{path} is not a readable image ({_reason(path, error)}); mend it or take it away") from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose text is the path once more
        return "it has 0 bytes" if path.stat().st_size == 0 else "its content is of no kind that Pillow knows"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _rgb(image: Image.Image, path: Path, greatest: list[int] | None = None) -> Image.Image:
    """The opened image in mode RGB, turned as its camera was held."""
    _refuse_a_guess(image, path)
    image.load()
    with contextlib.suppress(Exception):  # a note on the camera that is broken, beside pixels that are not
        ImageOps.exif_transpose(image, in_place=True)
    white = _white(image)
    if white is not None:
        values = np.asarray(image).astype(np.uint32)
        if greatest is not None and white == 65535:
            greatest.append(int(values.max()))
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    return (_with_alpha(image) if image.has_transparency_data else image).convert("RGB")


def _white(image: Image.Image) -> int | None:
    """The greatest value of an image with more than 8 bits a pixel; None where Pillow has scaled it to 8 bits.

    Pillow's own conversion would cut such values off at 255.
    """
    if image.mode in _SIXTEEN_BIT and isinstance(image, TiffImageFile):
        return int(2 ** _tag(image, _BITS, 16)) - 1  # 12 bits are among them
    # Pillow stretches a PGM of any depth to 16 bits, and in its older versions a PNG is in this mode as well.
    return 65535 if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")) else None


def _refuse_a_guess(image: Image.Image, path: Path) -> None:
    """Raises: UserError where RGB pixels would depend on what the file does not tell, or on what Pillow leaves out."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG, with previews behind the picture itself
        raise UserError(f"{path} holds {frames} frames and must hold 1; save each that is meant as a file of its own")
    white = _white(image)
    numbers = _NUMBERS.get(image.mode) if white is None else None
    if isinstance(image, TiffImageFile):
        numbers = _SAMPLE_FORMATS.get(_tag(image, _SAMPLE_FORMAT, 1), numbers)
    if numbers is not None:
        raise UserError(
            f"{path} holds {numbers}, and no file tells which of them are black and white; save it with 8 or 16 "
            f"unsigned bits a channel"
        )
    if white is None and image.mode not in _EIGHT_BIT:
        raise UserError(f"{path} has Pillow's mode {image.mode}, which is not read; save it as 8-bit RGB")
    if isinstance(image, TiffImageFile):
        channels = _tag(image, _CHANNELS, 1)
        if channels > len(image.getbands()):
            raise UserError(
                f"{path} holds {channels} channels, of which {len(image.getbands())} would be read; save it as 8-bit "
                f"RGB"
            )
        if white is not None and _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:  # Pillow leaves these as they are
            raise UserError(f"{path} holds 16-bit values of which 0 is white; save it with 0 as black")
    if _transparent(image):
        raise UserError(
            f"{path} is transparent in places, and no file tells what is behind it; put it on a background of one "
            f"colour and save it without transparency"
        )


def _transparent(image: Image.Image) -> bool:
    """Whether any pixel is not opaque. An alpha channel that is opaque everywhere says nothing and is dropped."""
    if not image.has_transparency_data:
        return False
    scale = (
        _SCALES.get(str(image.tile[0][3]), 1) if isinstance(image, PngImageFile) and image.tile else 1
    )  # gone when loaded
    image.load()
    key = image.info.get("transparency")  # the value or colour that stands for nothing, or each palette entry's alpha
    if image.mode in ("1", "L") and isinstance(key, int):
        return bool((np.asarray(image.convert("L")) == (key * scale if image.mode == "L" else bool(key) * 255)).any())
    if _white(image) is not None:
        return bool((np.asarray(image) == key).any())  # Pillow compares only 8 of the 16 bits
    if isinstance(key, tuple) and max(key) > 255:
        return True  # the key has 16 bits and Pillow has dropped half of each pixel's: it may well be met
    return bool(np.asarray(_with_alpha(image).getchannel("A")).min() < 255)


def _with_alpha(image: Image.Image) -> Image.Image:
    return image.convert("LA" if image.mode == "La" else "RGBA")  # from "La" Pillow knows no other way


def _tag(image: TiffImageFile, number: int, default: int) -> int:
    """The greatest value of a tag, which has one value for each channel or one for all."""
    value: Any = image.tag_v2.get(number, default)
    return int(max(value)) if isinstance(value, tuple) else int(value)


def _fitted(image: Image.Image, size: int | None) -> Image.Image:
    if size is None:
        return image
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

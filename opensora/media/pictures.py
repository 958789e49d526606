"""Pictures as people see them: the right way up, in the colours of a screen, nothing hidden shining through.

Whatever a picture is made of becomes 8-bit RGB: greys of 16 bits are scaled, embedded colour profiles converted to
sRGB, transparency laid on white. What was done that a user may not expect is said in notes.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from opensora.errors import OpenSoraError

BACKGROUND = 255
"""What transparent parts are laid on: white, as pages show them."""

LAID_ON_WHITE = "its transparent parts are laid on white"

_TIFF_PHOTOMETRIC, _TIFF_SUBFILE, _TIFF_SMALLEST, _TIFF_LARGEST, _DNG_VERSION = 262, 254, 340, 341, 50706
# The properties of a HEIC stand at its beginning.
_HEIF_HEAD_BYTES = 2**18
# Profiles that differ from sRGB by no more are sRGB, rounded.
_SAME_COLOUR = 3


def upright_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A picture, RGB, the right way up; and what was done to it.

    Raises:
        OpenSoraError: greys whose black and white nobody states, or the preview inside a camera's raw file.
    """
    _check_no_raw_photo(image)
    image.load()
    notes: list[str] = []
    # What a program made of a picture may still carry the note of how the camera was held.
    as_opened = isinstance(image, ImageFile.ImageFile)
    turned = ImageOps.exif_transpose(_with_orientation(image)) if as_opened else image
    grey = _eight_bit_grey(image, turned)
    profile = image.info.get("icc_profile")
    picture = turned if grey is None else grey
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            notes.append(LAID_ON_WHITE)
        alpha = rgba.getchannel("A")
        picture = Image.composite(rgba.convert("RGB"), Image.new("RGB", rgba.size, (BACKGROUND,) * 3), alpha)
    if profile or picture.mode == "LAB":
        picture = picture if picture.mode in ("L", "RGB", "CMYK", "LAB") else picture.convert("RGB")
        picture, described = _to_srgb(picture, profile)
        notes += [f"its colours are converted from {described} to sRGB"] if described else []
    return picture.convert("RGB"), notes


def lay_on_background(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """uint8 (H, W, 4) -> (H, W, 3) without transparency; and whether there was any."""
    alpha = pixels[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return pixels[..., :3], False
    mixed = (pixels[..., :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8), True


def _eight_bit_grey(image: Image.Image, turned: Image.Image) -> Image.Image | None:
    """Greys of more than 8 bits as 8 bits; None for other pictures."""
    if not (turned.mode == "F" or turned.mode.startswith("I")):
        return None
    values = np.asarray(turned).astype(np.float64)
    tags: Any = getattr(image, "tag_v2", {})
    if turned.mode.startswith("I;16") or (turned.mode == "I" and image.format in ("PNG", "PPM")):
        low, high = 0.0, 65535.0
    else:
        low, high = _stated_range(tags, values, is_float=turned.mode == "F")
    scaled = np.clip((values - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero
        scaled = 255 - scaled
    if isinstance(clear := image.info.get("transparency"), int):
        return Image.merge("LA", [Image.fromarray(scaled), Image.fromarray(np.uint8(255) * (values != clear))])
    return Image.fromarray(scaled)


def _stated_range(tags: Any, values: np.ndarray, is_float: bool) -> tuple[float, float]:
    """Black and white of greys that are no 16-bit ones."""
    stated = [tags.get(tag) for tag in (_TIFF_SMALLEST, _TIFF_LARGEST)]
    low, high = (float(np.ravel(value)[0]) if value is not None else np.nan for value in stated)
    if np.isfinite([low, high]).all() and low < high:
        return low, high
    if is_float and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        return 0.0, 1.0
    found = f"from {values.min():g} to {values.max():g}" if np.isfinite(values).all() else "some of them not finite"
    raise OpenSoraError(
        f"greys of 32 bits {found}, and it does not say which are black and white; save it with 8 or 16 bits, or with "
        "numbers from 0 to 1"
    )


def _to_srgb(picture: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """The picture in sRGB, and what its own colours are called; as it is if they are sRGB or cannot be understood."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        own = ImageCms.createProfile("LAB") if profile is None else ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(own, srgb, picture.mode, "RGB")
    except (ImageCms.PyCMSError, ValueError, TypeError, OSError):
        return picture, None  # such as one for pictures of another kind; viewers ignore it, too
    if profile is not None:
        levels, bands = np.linspace(0, 255, 6).round().astype(np.uint8), len(picture.getbands())
        cube = np.stack(np.meshgrid(*[levels] * bands), axis=-1).reshape(-1, bands)
        sample = Image.frombytes(picture.mode, (len(cube), 1), cube.tobytes())
        converted = ImageCms.applyTransform(sample, transform)
        plain = np.asarray(sample.convert("RGB")).astype(int)
        if converted is None or np.abs(np.asarray(converted) - plain).max() <= _SAME_COLOUR:
            return picture, None
    described = "Lab" if profile is None else " ".join(ImageCms.getProfileDescription(own).split())
    converted = ImageCms.applyTransform(picture, transform)
    return (picture, None) if converted is None else (converted, described or "its own profile")


def _with_orientation(image: Image.Image) -> Image.Image:
    """A HEIC is turned by its own properties, and Pillow's plugin hides its EXIF, which counts where there are none."""
    orientation = image.info.get("original_orientation")
    if image.format != "HEIF" or orientation is None:
        return image
    with Path(getattr(image, "filename", "")).open("rb") as file:
        head = file.read(_HEIF_HEAD_BYTES)
    if b"irot" not in head and b"imir" not in head:
        image.getexif()[ExifTags.Base.Orientation] = orientation
    return image


def _check_no_raw_photo(image: Image.Image) -> None:
    """A raw photo is a TIFF whose first picture is a small preview."""
    tags: Any = getattr(image, "tag_v2", {})
    if _DNG_VERSION in tags or int(tags.get(_TIFF_SUBFILE, 0)) & 1:
        raise OpenSoraError("a raw photo of a camera, of which only a preview can be seen; save it as JPEG or PNG")

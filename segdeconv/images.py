"""Picture files: listing, reading, resizing, painting and writing. Numpy and Pillow only.

Training, evaluation and the deployed runtime read pictures through here, so that they see the same pixels.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from numbers import Integral
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdeconv.errors import UserError, first_line
from segdeconv.files import write_atomically

Picture = NDArray[np.uint8]
Color = tuple[int, int, int]
Palette = tuple[Color, ...]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")  # by content; for others Pillow may run programs

_ORIENTATION = 0x0112  # EXIF's tag; below, what turns a picture of each value upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip these to 8 bits


def list_images(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures in a folder, sorted by name, and what is wrong with them, a sentence each: there is none,
    or a picture left out because another has its name but for the suffix.
    """
    with os.scandir(folder) as there:  # whose is_dir rarely asks the disk
        names = [entry.name for entry in there if not entry.name.startswith(".") and not entry.is_dir()]
    found = sorted(folder / name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES)
    problems = []
    if not found:
        inner = folder_of_pictures(folder)
        below = f"; {inner.name} in it does, which is not looked into" if inner is not None else ""
        problems.append(f"{folder}: holds no picture ({', '.join(SUFFIXES)}){below}")
    by_stem: dict[str, Path] = {}
    for path in found:
        first = by_stem.setdefault(path.stem, path)
        if first is not path:
            problems.append(f"{path}: there is a second picture of that name, {first.name}")
    return list(by_stem.values()), problems


def folder_of_pictures(folder: Path) -> Path | None:
    """The first folder in a folder that holds pictures, if there is one."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        with contextlib.suppress(OSError):  # what may not be looked into
            if any(path.suffix.lower() in SUFFIXES for path in inner.iterdir()):
                return inner
    return None


def images_in(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name.

    Raises:
        UserError: there is none, or two share a name but for the suffix.
    """
    found, problems = list_images(folder)
    if problems:
        raise UserError(problems[0])
    return found


def open_image(path: Path) -> Image.Image:
    """A picture file, its header read and its pixels not yet.

    Raises:
        UserError: there is no such file, or it is no picture.
    """
    try:
        return Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # Pillow's parsers raise all sorts of things
        kinds = ", ".join(FORMATS)
        raise UserError(f"{path}: not a readable picture; expected {kinds} ({first_line(error)})") from None


def load_pixels(image: Image.Image, path: Path) -> Image.Image:
    """Read the pixels of an opened picture.

    Raises:
        UserError: the file is damaged.
    """
    try:
        image.load()
    except Exception as error:  # as above
        raise UserError(f"{path}: a damaged picture ({first_line(error)})") from None
    return image


def read_rgb(path: Path) -> Picture:
    """A picture file as RGB (H, W, 3) uint8, turned upright as its EXIF data says.

    Raises:
        UserError: there is no such file, it is no 8-bit picture, or it is damaged.
    """
    with open_image(path) as image:
        return to_rgb(image, path)


def exif_turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an opened picture upright, by its EXIF data; None where nothing need be done."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data say nothing
        return None


def to_rgb(image: Image.Image, path: Path) -> Picture:
    """An opened picture as RGB (H, W, 3) uint8, turned upright as its EXIF data says.

    Raises:
        UserError: it has no 8-bit pixels, or the file is damaged.
    """
    load_pixels(image, path)
    if image.mode in _DEEP:
        raise UserError(f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:  # Pillow would warn, with a path of its own
        image = image.convert("RGBA")
    turn = exif_turn(image)
    return np.asarray((image if turn is None else image.transpose(turn)).convert("RGB"))


def resize_image(image: Picture, size: tuple[int, int] | None) -> Picture:
    """RGB (H, W, 3) at ``size`` (height, width), bilinear with antialiasing; None changes nothing."""
    return _resize(image, size, Image.Resampling.BILINEAR)


def resize_labels(labels: Picture, size: tuple[int, int] | None) -> Picture:
    """Labels (H, W) at ``size`` (height, width), nearest neighbour; None changes nothing."""
    return _resize(labels, size, Image.Resampling.NEAREST)


def central_crop(image: Picture, shorter_side: int, crop: tuple[int, int]) -> Picture:
    """The middle ``crop`` (height, width) of RGB (H, W, 3), its shorter side resized to ``shorter_side``."""
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = (shorter_side * side // short for side in (height, width))
    image = resize_image(image, (height, width))
    top, left = round((height - crop[0]) / 2), round((width - crop[1]) / 2)
    return image[top : top + crop[0], left : left + crop[1]]


def _resize(array: Picture, size: tuple[int, int] | None, how: Image.Resampling) -> Picture:
    if size is None or array.shape[:2] == tuple(size):
        return array
    return np.asarray(Image.fromarray(array).resize((size[1], size[0]), how))


def check_windows(window: tuple[int, int] | None, overlap: float) -> None:
    """Raise UserError unless these are sizes in pixels and a share that windows can have in common."""
    if window is not None and (
        len(window) != 2 or not all(isinstance(side, Integral) and side > 0 for side in window)
    ):
        raise UserError(f"--window {','.join(map(str, window))}: expected pixels, such as 512,1024")
    if not 0 <= overlap < 1:
        raise UserError(f"--overlap {overlap}: expected a share from 0 to below 1, such as 0.25")


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly from 0 to ``size - window``, in as few steps as will do."""
    step = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [round(i * (size - window) / max(count - 1, 1)) for i in range(count)]


def colored(labels: Picture, palette: Palette) -> Picture:
    """Labels (H, W) as RGB (H, W, 3); what is outside the palette is black."""
    table = np.zeros((max(256, len(palette)), 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def overlay(image: Picture, labels: Picture, palette: Palette, alpha: float = 0.55) -> Picture:
    """The picture with its labels painted over it at strength ``alpha``; ignored pixels stay as they are."""
    painted = np.empty(image.shape, np.uint8)
    for top in range(0, len(image), 256):  # floating-point numbers of all of a large picture are gigabytes
        rows = slice(top, top + 256)
        mixed = (1 - alpha) * image[rows] + alpha * colored(labels[rows], palette)
        counts = (labels[rows] < len(palette))[..., None]
        painted[rows] = np.where(counts, np.round(mixed), image[rows])
    return painted


def label_png(labels: Picture, palette: Palette) -> Image.Image:
    """Class numbers as a palette PNG: any reader gets the numbers, any viewer shows the colours."""
    png = Image.fromarray(labels)
    png.putpalette([channel for color in palette for channel in color])
    return png


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    file = io.BytesIO()  # Pillow raises nothing where a full disk cuts off a JPEG
    image.save(file, Image.registered_extensions()[path.suffix.lower()], quality=92)
    write_atomically(path, lambda temporary: temporary.write_bytes(file.getvalue()))

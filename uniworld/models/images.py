"""Pictures from users and to users: any file that Pillow reads becomes 8-bit RGB, or a one-line error says why not."""

import contextlib
import io
import os
import secrets
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error: half a GiB as RGB
SIDEWAYS = range(5, 9)  # EXIF orientations that exchange height and width

FORMATS = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"quality": 95}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}

ImageSource = str | os.PathLike | bytes | BinaryIO | Image.Image


def read_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB.

    The EXIF orientation is applied, alpha is laid on white, 16-bit grey is scaled to 8 bits, CMYK and palettes are
    converted, and of an animation the first frame is taken (with a warning). Colour profiles are ignored.

    Args:
        source: path of a file, the bytes of one, an open binary file, or a PIL image (which is left as it is).
        name: what to call it in errors; by default the path, or what is known of it.

    Returns:
        A new RGB image without metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a picture, truncated, empty, or over 178 million pixels by its header; one line that names
            the path and the reason.
    """
    if isinstance(source, Image.Image):
        return _decode(source, name or "image")
    with _opened(source, name) as (file, num_bytes, name), _header(file, num_bytes, name) as image:
        return _decode(image, name)


def image_size(source: str | os.PathLike | bytes | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """(height, width) of the picture that `read_image` would give, from the file's header alone.

    Only as true as the header. Of a PNG, EXIF data behind the pixels is not seen. Raises as `read_image` does.
    """
    with _opened(source, name) as (file, num_bytes, name), _header(file, num_bytes, name) as image:
        width, height = image.size
        # A PNG's `getexif` would decode the pixels to look behind them.
        orientation = 1
        if image.format != "PNG" or "exif" in image.info:
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            except Exception:  # broken metadata is no reason to refuse a picture; `read_image` warns of it
                orientation = 1
        return (width, height) if orientation in SIDEWAYS else (height, width)


@contextlib.contextmanager
def _opened(source: str | os.PathLike | bytes | BinaryIO, name: str | None):
    """The file, its number of bytes and its name in errors."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), len(source), name or f"image of {len(source)} bytes"
        return
    if isinstance(source, io.IOBase):
        num_bytes = source.seek(0, io.SEEK_END)
        source.seek(0)
        yield source, num_bytes, name or "image file"
        return
    path = Path(source)
    name = name or str(path)
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file")
    if path.is_dir():
        raise ValueError(f"{name}: is a directory, must be an image file")
    try:
        with path.open("rb") as file:
            yield file, path.stat().st_size, name
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({_one_line(error)})") from error


def _header(file: BinaryIO, num_bytes: int, name: str) -> Image.Image:
    """The picture with its header read, pixels not yet."""
    if num_bytes == 0:
        raise ValueError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_decode` has its own limit
            return Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: over {MAX_PIXELS} pixels by its header") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image in a format that Pillow reads") from error
    except Exception as error:  # each of Pillow's readers has its own way to fail on a broken file
        raise ValueError(f"{name}: broken image file ({_one_line(error)})") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: {width}x{height} is over {MAX_PIXELS} pixels")
    if width * height == 0:
        raise ValueError(f"{name}: {width}x{height} has no pixels")
    try:
        # Some cameras store further views behind the picture (MPO); that is no animation.
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if num_frames > 1:
            image.seek(0)
        image.load()
    except Exception as error:  # as above
        raise ValueError(f"{name}: broken image file ({_one_line(error)})") from error
    if num_frames > 1:
        warnings.warn(f"{name}: has {num_frames} frames, only the first is used", stacklevel=3)
    upright = _upright(image, name)
    try:
        rgb = _to_rgb(upright)
    except ValueError as error:
        raise ValueError(f"{name}: cannot be converted to RGB ({_one_line(error)})") from error
    rgb.info = {}
    return rgb


def _upright(image: Image.Image, name: str) -> Image.Image:
    """A copy turned as its EXIF orientation says; broken metadata is no reason to refuse a picture."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        warnings.warn(f"{name}: EXIF data ignored ({_one_line(error)})", stacklevel=4)
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8bit(grey: np.ndarray, mode: str) -> np.ndarray:
    """uint8 [H, W] from 16-bit integers (0 to 65535, also in 32-bit storage) or floats from 0 to 1."""
    full_scale = 1 if mode == "F" else 65535
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= full_scale):
        raise ValueError(f"mode {mode} has values from {low} to {high}, must lie in 0 to {full_scale}")
    return np.rint(grey.astype(np.float32) * (255 / full_scale)).astype(np.uint8)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_writable(path: str | os.PathLike) -> Path:
    """Check, before anything is computed, that `write_image` will be able to write to `path`.

    Returns:
        The path. Nothing is left on the disk.

    Raises:
        ValueError: unknown suffix, missing directory, no permission, or the path is a directory; one line.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, must be a file name")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: suffix {path.suffix!r}, must be one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the directory {path.parent} does not exist")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{path}: exists and is write-protected")
    probe = _beside(path)
    try:
        # Creating a file is the only test that also sees read-only and virtual file systems.
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({_one_line(error)})") from error
    return path


def write_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture in the format of the path's suffix: whole, or not at all.

    It is written beside its place and then renamed, so that a crash leaves no half file and an older one stands.
    Raises ValueError as `check_writable` does, or when the disk refuses.
    """
    path = check_writable(path)
    target = path.resolve()  # a link stays one
    temporary = _beside(target)
    image_format, options = FORMATS[path.suffix.lower()]
    try:
        with open(temporary, "xb") as file:
            image.save(file, format=image_format, **options)
        os.replace(temporary, target)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({_one_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(6)}.partial")

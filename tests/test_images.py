"""Reading and writing pictures: every kind of good file, and every kind of bad one."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from uniworld.models.images import FORMATS, MAX_PIXELS, check_writable, read_image, write_image

ORIENTATION = 0x0112


@pytest.fixture
def picture() -> Image.Image:
    """A 24x16 RGB gradient in which every pixel differs."""
    y, x = np.mgrid[:16, :24]
    return Image.fromarray(np.stack([x * 10, y * 15, (x + y) * 6], -1).astype(np.uint8))


def saved(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def assert_pixels(image: Image.Image, expected, atol: int = 0) -> None:
    assert image.mode == "RGB" and image.info == {}
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= atol


def test_path_bytes_and_pil_agree(tmp_path, picture):
    path = tmp_path / "a.png"
    picture.save(path)
    for source in (path, str(path), path.read_bytes(), picture):
        assert_pixels(read_image(source), picture)


def test_pil_input_is_left_alone(picture):
    read_image(picture).putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) == (0, 0, 0)


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(picture, orientation, image_format):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(picture, image_format, exif=exif.tobytes(), **({"lossless": True} if image_format == "WEBP" else {}))
    assert_pixels(read_image(data), picture.transpose(TURNS[orientation]))


def test_exif_orientation_of_a_jpeg(picture):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = read_image(saved(picture, "JPEG", exif=exif.tobytes(), quality=100, subsampling=0))
    assert image.size == (16, 24)
    assert_pixels(image, picture.transpose(Image.Transpose.ROTATE_270), atol=6)


def test_broken_exif_is_ignored_with_a_warning(picture, monkeypatch):
    def fail(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.warns(UserWarning, match="EXIF data ignored"):
        assert_pixels(read_image(picture), picture)


@pytest.mark.parametrize("mode", ["1", "L", "P", "HSV", "YCbCr", "RGBX"])
def test_plain_modes(picture, mode):
    assert_pixels(read_image(picture.convert(mode)), picture.convert(mode).convert("RGB"))


def test_cmyk_jpeg():
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)):
        data = saved(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=100)
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert_pixels(read_image(data), Image.new("RGB", (16, 16), colour), atol=3)


def test_16_bit_grey_is_scaled():
    grey = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 0, 1, 1, 128, 254, 255, 255]])[..., None], 3, -1)  # rint(grey / 257)
    image = Image.fromarray(grey)
    assert image.mode == "I;16"
    big_endian = Image.frombytes("I;16B", (8, 1), grey.astype(">u2").tobytes())
    for source in (image, saved(image), saved(image, "TIFF"), big_endian, Image.fromarray(grey.astype(np.int32))):
        assert_pixels(read_image(source), expected)


def test_16_bit_colour_png():
    """Pillow keeps the high bytes; the file is written by hand, since Pillow writes no such PNG."""
    pixels = np.array([[[0x1234, 0xFFFF, 0x0000], [0x80FF, 0x0100, 0xABCD]]], ">u2")
    image = read_image(png_bytes(2, 1, 16, 2, b"\0" + pixels.tobytes()))
    assert_pixels(image, pixels >> 8)


def test_float_images():
    assert_pixels(read_image(Image.fromarray(np.array([[0, 0.5, 1]], np.float32))), [[[0] * 3, [128] * 3, [255] * 3]])
    with pytest.raises(ValueError, match="image: cannot be converted to RGB .mode F has values from 0.0 to 2.0"):
        read_image(Image.fromarray(np.array([[0, 2]], np.float32)))
    with pytest.raises(ValueError, match="mode I has values from -1 to 4"):
        read_image(Image.fromarray(np.array([[-1, 4]], np.int32)))


def test_alpha_is_laid_on_white(picture):
    rgba = picture.convert("RGBA")
    alpha = np.linspace(0, 255, 24, dtype=np.uint8)[None].repeat(16, 0)
    rgba.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = np.asarray(picture) * share + 255 * (1 - share)
    assert_pixels(read_image(saved(rgba)), expected, atol=1)
    grey = rgba.convert("LA")
    expected = np.asarray(grey)[..., :1] * share + 255 * (1 - share)
    assert_pixels(read_image(saved(grey)), np.repeat(expected, 3, -1), atol=1)


def test_transparent_palette_and_colour_key(picture):
    palette = Image.new("P", (4, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((3, 0), 1)
    expected = [[[255, 255, 255]] * 3 + [[0, 255, 0]]]
    assert_pixels(read_image(saved(palette, transparency=0)), expected)
    assert_pixels(read_image(saved(palette, "GIF", transparency=0)), expected)
    keyed = Image.new("RGB", (4, 1), (9, 9, 9))
    keyed.putpixel((3, 0), (0, 255, 0))
    assert_pixels(read_image(saved(keyed, transparency=(9, 9, 9))), expected)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame_and_a_warning(tmp_path, image_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if image_format == "WEBP" else {}
    path = tmp_path / f"animated.{image_format.lower()}"
    path.write_bytes(saved(frames[0], image_format, save_all=True, append_images=frames[1:], **options))
    with pytest.warns(UserWarning, match=r"animated\.\w+: has 3 frames, only the first is used"):
        assert_pixels(read_image(path), frames[0])


def test_still_pictures_give_no_warning(picture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image_format in ("PNG", "GIF", "WEBP", "JPEG", "TIFF", "BMP"):
            read_image(saved(picture, image_format))


# Bad files


def png_bytes(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refusal(source) -> str:
    with pytest.raises(ValueError) as error:
        read_image(source)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_missing_file(tmp_path):
    path = tmp_path / "nowhere.png"
    with pytest.raises(FileNotFoundError) as error:
        read_image(path)
    assert str(error.value) == f"{path}: no such file"


def test_empty_file_text_and_directory(tmp_path):
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.touch()
    text.write_text("This is not a picture.\n" * 10)
    assert refusal(empty) == f"{empty}: the file is empty"
    assert refusal(text) == f"{text}: not an image in a format that Pillow reads"
    assert refusal(tmp_path) == f"{tmp_path}: is a directory, must be an image file"
    assert refusal(b"") == "image of 0 bytes: the file is empty"
    assert refusal(b"abc") == "image of 3 bytes: not an image in a format that Pillow reads"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_file(tmp_path, image_format, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), image_format)
    path = tmp_path / f"cut.{image_format.lower()}"
    path.write_bytes(data[: int(len(data) * share)])
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "broken image file" in message or "not an image" in message


def test_corrupt_data(tmp_path, picture):
    data = bytearray(saved(picture))
    middle = data.index(b"IDAT") + 12
    data[middle : middle + 8] = b"\xff" * 8
    assert "broken image file" in refusal(bytes(data))


@pytest.mark.parametrize("width, height", [(20_000, 10_000), (MAX_PIXELS + 1, 1), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch, width, height):
    def decoded(*_):
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bytes(width, height, 8, 2, b""))
    assert refusal(path) == f"{path}: over {MAX_PIXELS} pixels by its header"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some programs switch Pillow's own check off
    assert refusal(path) == f"{path}: {width}x{height} is over {MAX_PIXELS} pixels"


def test_large_picture_below_the_limit_gives_no_warning(tmp_path):
    path = tmp_path / "large.png"
    width, height = 10_000, 9_000  # Pillow itself warns from 89 million pixels on
    Image.new("1", (width, height)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).size == (width, height)


def test_no_pixels():
    assert refusal(Image.new("RGB", (0, 5))) == "image: 0x5 has no pixels"


# Writing


@pytest.mark.parametrize("suffix", FORMATS)
def test_write_and_read_back(tmp_path, picture, suffix):
    path = tmp_path / f"out{suffix.upper()}"
    write_image(picture, path)
    assert list(tmp_path.iterdir()) == [path]
    lossless = suffix in (".png", ".bmp", ".tif", ".tiff")
    assert Image.open(path).format == FORMATS[suffix][0]
    assert_pixels(read_image(path), picture, atol=0 if lossless else 40)


def test_failed_write_keeps_the_old_file(tmp_path, picture, monkeypatch):
    path = tmp_path / "out.png"
    write_image(picture, path)
    before = path.read_bytes()

    def disk_full(self, file, **_):
        file.write(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(ValueError, match=r"out\.png: cannot be written .*No space left on device"):
        write_image(Image.new("RGB", (8, 8)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_written_file_has_the_usual_permissions(tmp_path, picture):
    path, plain = tmp_path / "out.png", tmp_path / "plain"
    write_image(picture, path)
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_writing_through_a_link_keeps_it(tmp_path, picture):
    (tmp_path / "real.png").touch()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "real.png")
    write_image(picture, link)
    assert link.is_symlink()
    assert_pixels(read_image(tmp_path / "real.png"), picture)


def test_check_writable(tmp_path):
    good = tmp_path / "out.png"
    assert check_writable(str(good)) == good
    assert list(tmp_path.iterdir()) == []
    bad = {
        tmp_path / "out.xyz": r"suffix '\.xyz', must be one of \.png, ",
        tmp_path / "out": r"suffix '', must be one of",
        tmp_path / "no" / "out.png": "the directory .*no does not exist",
        tmp_path: "is a directory, must be a file name",
    }
    for path, reason in bad.items():
        with pytest.raises(ValueError, match=reason) as error:
            check_writable(path)
        assert str(error.value).startswith(f"{path}: ")
        with pytest.raises(ValueError, match=reason):
            write_image(Image.new("RGB", (8, 8)), path)


def test_check_writable_without_permission(tmp_path, monkeypatch):
    """The refusal is made up, since a test that runs as root may write everywhere."""

    def refuse(path, flags, mode=0o777):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r"out\.png: cannot be written .*Permission denied"):
        check_writable(tmp_path / "out.png")


def test_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="exists and is write-protected"):
        check_writable(path)

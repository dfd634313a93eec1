"""Opening an image: what cameras, scanners and editors write, with its right values, and what is refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from image_files import (
    ADOBE_RGB,
    DISPLAY_P3,
    GREY_GAMMA_18,
    SRGB,
    cmyk_profile,
    linear_to_srgb,
    png,
    srgb_to_linear,
    tiff,
)
from PIL import Image

from mamba_ginr.images import open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = np.array([0, 255, 256, 1000, 32768, 40000, 65279, 65535], np.uint16)


def opened(content, folder, name="x.png"):
    """The file's pixels as integers (H, W, 3)."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert not image.info
    return np.asarray(image).astype(int)


def stored(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Pixels of more, or fewer, than 8 bits

NO_RANGE = "its pixels are floats, signed or of 32 bits, and so have no defined black and white"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "j2k", "array"])
def test_grey_of_16_bits_keeps_its_upper_eight(tmp_path, kind, order):
    files = {
        "png": png(8, 1, 16, 0, [DEEP.astype(">u2").tobytes()]),
        "tiff": tiff(8, 1, 16, DEEP.astype(f"{order}u2").tobytes(), order),
        "pgm": b"P5 8 1 65535\n" + DEEP.astype(">u2").tobytes(),
        "j2k": stored(Image.fromarray(DEEP[None]), "JPEG2000", irreversible=False),
    }
    if kind == "array":
        found = np.asarray(open_image(Image.fromarray(DEEP.astype(f"{order}u2")[None])))
    else:
        found = opened(files[kind], tmp_path, f"x.{kind}")
    assert (found[0] == (DEEP // 256)[:, None]).all()
    assert np.abs(found[0, :, 0] - DEEP / 257).max() < 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_of_16_bits_keep_their_upper_eight(tmp_path, order):
    deep = DEEP[[0, 2, 4, 6, 7, 1, 3, 5, 6]]
    assert (opened(png(3, 1, 16, 2, [deep.astype(">u2").tobytes()]), tmp_path).ravel() == deep // 256).all()
    content = tiff(3, 1, 16, deep.astype(f"{order}u2").tobytes(), order, SamplesPerPixel=3)
    assert (opened(content, tmp_path, "x.tif").ravel() == deep // 256).all()


def test_grey_of_12_bits_reaches_white(tmp_path):
    values = np.array([0, 15, 16, 4095])
    packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in values.reshape(2, 2))
    assert opened(tiff(4, 1, 12, packed), tmp_path, "x.tif")[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_zero(tmp_path, bits):
    values = np.array([0, 2**bits - 1], f"<u{bits // 8}")
    assert opened(tiff(2, 1, bits, values.tobytes(), Photometric=0), tmp_path, "x.tif")[0, :, 0].tolist() == [255, 0]


def test_one_bit_palette_and_grey(tmp_path):
    assert opened(Image.fromarray(np.array([[True, False]])), tmp_path)[0].tolist() == [[255] * 3, [0] * 3]
    palette = Image.fromarray(PIXELS).quantize(54)
    assert (opened(palette, tmp_path) == np.asarray(palette.convert("RGB"))).all()
    assert (opened(Image.fromarray(PIXELS[..., 0]), tmp_path) == PIXELS[..., :1]).all()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (Image.fromarray(np.ones((2, 2), np.float32)), NO_RANGE),
        (Image.fromarray(np.ones((2, 2), np.int32)), NO_RANGE),
        (tiff(2, 1, 16, bytes(4), SampleFormat=2), NO_RANGE),
        (tiff(2, 1, 32, bytes(8)), NO_RANGE),
        (tiff(2, 1, 8, bytes(2), SampleFormat=2), NO_RANGE),
        (b"Pf\n2 1\n-1.0\n" + bytes(8), NO_RANGE),
    ],
)
def test_pixels_without_a_range_are_refused(tmp_path, content, why):
    with pytest.raises(ValueError, match=f"x.tif cannot be read as an image .{why}.*scale it to 0 … 255 and save"):
        opened(content, tmp_path, "x.tif")
    if not isinstance(content, bytes):
        with pytest.raises(ValueError, match=f"The image cannot be read as an image .{why}"):
            open_image(content)


def test_colours_of_floats_are_refused(tmp_path):
    content = tiff(2, 1, 32, np.ones(6, np.float32).tobytes(), SamplesPerPixel=3, SampleFormat=3)
    with pytest.raises(ValueError, match=r"x\.tif cannot be read as an image"):
        opened(content, tmp_path, "x.tif")


def test_channels_of_16_bits_one_after_another_are_refused(tmp_path):
    content = tiff(3, 1, 16, bytes(18), SamplesPerPixel=3, PlanarConfiguration=2)
    with pytest.raises(ValueError, match=r"x\.tif cannot be read .*one after another\): save it interleaved or comp"):
        opened(content, tmp_path, "x.tif")


# Orientation

UPRIGHT = {  # EXIF 2.3, 4.6.4: where the stored first row and first column belong
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    "kind", ["png", "webp", "tiff", "tiff, 16 bits", "jpeg", "palette", "xmp", "in memory", "opened TIFF"]
)
def test_photographs_stand_upright(tmp_path, kind, orientation, capsys):
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = orientation
    expected, tolerance = UPRIGHT[orientation](PIXELS), 0
    if kind == "tiff, 16 bits":
        grey = PIXELS[..., 0]
        content = tiff(9, 6, 16, (grey.astype("<u2") * 257).tobytes(), Orientation=orientation)
        found, expected = opened(content, tmp_path, "x.tif"), UPRIGHT[orientation](grey)[..., None]
    elif kind == "jpeg":
        smooth = np.linspace(0, 255, 54).reshape(6, 9, 1).repeat(3, 2).astype(np.uint8)
        content = stored(Image.fromarray(smooth), "JPEG", quality=100, subsampling=0, exif=exif)
        found, expected, tolerance = opened(content, tmp_path, "x.jpg"), UPRIGHT[orientation](smooth), 4
    elif kind == "palette":
        image = image.quantize(54)
        found = opened(stored(image, "PNG", exif=exif), tmp_path)
        expected = UPRIGHT[orientation](np.asarray(image.convert("RGB")))
    elif kind == "xmp":
        found = opened(stored(image, "WEBP", lossless=True, xmp=b'<x tiff:Orientation="%d"/>' % orientation), tmp_path)
    elif kind == "opened TIFF":
        image.getchannel(0).save(tmp_path / "x.tif", exif=exif)
        found, expected = np.asarray(open_image(Image.open(tmp_path / "x.tif"))), expected[..., :1]
    elif kind == "in memory":
        found = np.asarray(open_image(Image.open(io.BytesIO(stored(image, "PNG", exif=exif))).convert("RGB")))
    else:
        found = opened(stored(image, kind, exif=exif, **({"lossless": True} if kind == "webp" else {})), tmp_path)
    assert found.shape == (*expected.shape[:2], 3)
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    assert not capsys.readouterr().out


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (opened(stored(Image.fromarray(PIXELS), "PNG", exif=exif), tmp_path) == PIXELS).all()


def test_broken_exif_is_told(tmp_path, capsys):
    content = stored(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0no TIFF header")
    assert (opened(content, tmp_path) == PIXELS).all()
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}: EXIF data that cannot be read, taken as upright.\n"


# Colour profiles

P3_TO_SRGB = [[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]  # of linear light
ADOBE_TO_SRGB = [[1.3984, -0.3984, 0], [0, 1, 0], [0, -0.0429, 1.0429]]


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "in memory"])
def test_display_p3_and_adobe_rgb_become_srgb(tmp_path, kind):
    options = {"lossless": True} if kind == "webp" else {}
    light = {"p3": srgb_to_linear(PIXELS / 255) @ np.transpose(P3_TO_SRGB)}
    light["adobe"] = (PIXELS / 255) ** 2.19921875 @ np.transpose(ADOBE_TO_SRGB)
    for name, icc in {"p3": DISPLAY_P3, "adobe": ADOBE_RGB}.items():
        content = stored(Image.fromarray(PIXELS), "PNG" if kind == "in memory" else kind, icc_profile=icc, **options)
        if kind == "in memory":
            found = np.asarray(open_image(Image.open(io.BytesIO(content)).convert("RGB"))).astype(int)
        else:
            found = opened(content, tmp_path, f"x.{kind}")
        expected = 255 * linear_to_srgb(light[name])
        assert np.abs(found - expected).max() < 2.5
        assert np.abs(expected - PIXELS).max() > 20  # and much was to do


def test_a_camera_s_mark_of_adobe_rgb_stands_for_its_profile(tmp_path):
    interoperability, colour_space = {1: "R03", 2: b"0100"}, 65535
    exif = Image.Exif()
    exif[0x8769] = {0xA001: colour_space, 0xA005: interoperability}
    found = opened(stored(Image.fromarray(PIXELS), "PNG", exif=exif), tmp_path)
    expected = 255 * linear_to_srgb((PIXELS / 255) ** 2.19921875 @ np.transpose(ADOBE_TO_SRGB))
    assert np.abs(found - expected).max() < 2.5
    exif[0x8769][0xA005][1] = "R98"  # sRGB
    assert (opened(stored(Image.fromarray(PIXELS), "PNG", exif=exif), tmp_path) == PIXELS).all()


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8, 0.45455])
@pytest.mark.parametrize("colour_type", [0, 2])
def test_the_gamma_of_a_png(tmp_path, gamma, colour_type):
    pixels = PIXELS if colour_type else PIXELS[..., :1]
    chunk = struct.pack(">I", round(100_000 * gamma))
    rows = [row.tobytes() for row in pixels]
    found = opened(png(9, 6, 8, colour_type, rows, gAMA=chunk), tmp_path)
    expected = pixels if gamma == 0.45455 else 255 * linear_to_srgb((pixels / 255) ** (1 / gamma))  # that of sRGB
    assert np.abs(found - expected).max() <= 0.51
    assert (opened(png(9, 6, 8, colour_type, rows, sRGB=b"\0", gAMA=chunk), tmp_path) == pixels).all()


def test_an_srgb_profile_changes_no_bit(tmp_path, capsys):
    assert (opened(stored(Image.fromarray(PIXELS), "PNG", icc_profile=SRGB), tmp_path) == PIXELS).all()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "with alpha", "16 bits with alpha"])
def test_grey_with_a_profile(tmp_path, kind, capsys):
    grey = np.arange(256, dtype=np.uint8)
    deep = (grey.astype(np.uint16) * 257).astype(">u2")
    opaque = np.stack([deep, np.full_like(deep, 65535)], -1)
    icc = b"x\0\0" + zlib.compress(GREY_GAMMA_18)
    content = {
        "8 bits": png(256, 1, 8, 0, [grey.tobytes()], iCCP=icc),
        "16 bits": png(256, 1, 16, 0, [deep.tobytes()], iCCP=icc),
        "with alpha": png(256, 1, 8, 4, [np.stack([grey, 0 * grey + 255], -1).tobytes()], iCCP=icc),
        "16 bits with alpha": png(256, 1, 16, 4, [opaque.tobytes()], iCCP=icc),
    }[kind]
    found = opened(content, tmp_path)
    assert np.abs(found[0, :, 0] - 255 * linear_to_srgb((grey / 255) ** 1.8)).max() < 1.5
    assert not capsys.readouterr().out


def test_grey_saved_from_a_colour_photograph_keeps_its_profile_of_colours(tmp_path, capsys):
    grey = np.arange(256, dtype=np.uint8)[None]
    found = opened(stored(Image.fromarray(grey), "PNG", icc_profile=ADOBE_RGB), tmp_path)
    assert np.abs(found[0, :, 1] - 255 * linear_to_srgb((grey[0] / 255) ** 2.19921875)).max() < 1.5
    assert not capsys.readouterr().out


def test_cmyk_with_and_without_a_profile(tmp_path, capsys):
    inks = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    found = opened(stored(inks, "TIFF", icc_profile=cmyk_profile()), tmp_path, "x.tif")
    assert np.abs(found[0] - [[255, 255, 255], [255, 0, 0], [0, 0, 0]]).max() <= 3  # the profile's own colours
    assert not capsys.readouterr().out
    found = opened(stored(inks, "TIFF"), tmp_path, "x.tif")
    assert found[0].tolist() == [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    assert "x.tif: CMYK colours without a profile, converted approximately." in capsys.readouterr().out


def test_cielab_and_ycbcr(tmp_path):
    lab = Image.frombytes("LAB", (2, 1), bytes([round(54.29 * 2.55), 81, 70, 255, 0, 0]))
    found = opened(lab, tmp_path, "x.tif")
    assert np.abs(found[0] - [[255, 0, 0], [255, 255, 255]]).max() <= 6  # sRGB's red under D50, and white
    ycbcr = Image.fromarray(np.full((2, 2, 3), (76, 85, 255), np.uint8), "YCbCr")  # ITU-T T.871: red
    assert np.abs(np.asarray(open_image(ycbcr)).astype(int) - [254, 0, 0]).max() <= 1


@pytest.mark.parametrize("icc", [b"no profile", DISPLAY_P3[:200], GREY_GAMMA_18, cmyk_profile()])
def test_a_profile_that_is_broken_or_of_other_channels_is_told(tmp_path, icc, capsys):
    assert (opened(stored(Image.fromarray(PIXELS), "PNG", icc_profile=icc), tmp_path) == PIXELS).all()
    told = f"{tmp_path / 'x.png'}: a colour profile that cannot be read or does not fit, taken as sRGB.\n"
    assert capsys.readouterr().out == told


# Transparency


def on_white(colours, alpha):
    return np.asarray(colours) * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "RGBa", "La", "RGBA, 16 bits", "LA, 16 bits", "RGBA, webp", "P3"])
def test_alpha_is_put_on_white(tmp_path, kind, capsys):
    alpha = np.linspace(0, 255, 54).reshape(6, 9).round().astype(np.uint8)
    grey = kind.startswith("L")
    colours = PIXELS[..., :1].repeat(3, 2) if grey else PIXELS
    rgba = Image.fromarray(np.concatenate([colours, alpha[..., None]], -1))
    tolerance = 1
    if kind in ("RGBA", "LA"):
        found = opened(rgba.convert(kind), tmp_path)
    elif kind in ("RGBa", "La"):
        found, tolerance = np.asarray(open_image(rgba.convert(kind.upper()).convert(kind))).astype(int), 2
    elif kind == "PA":
        palette = Image.fromarray(colours).quantize(54).convert("PA")
        palette.putalpha(Image.fromarray(alpha))
        assert palette.mode == "PA"
        found = np.asarray(open_image(palette)).astype(int)
    elif kind.endswith("16 bits"):
        deep = np.asarray(rgba)[..., [0, 3] if grey else [0, 1, 2, 3]].astype(">u2") * 257
        found = opened(png(9, 6, 16, 4 if grey else 6, [row.astype(">u2").tobytes() for row in deep]), tmp_path)
    elif kind == "P3":
        found = opened(stored(rgba, "PNG", icc_profile=DISPLAY_P3), tmp_path)
        colours = 255 * linear_to_srgb(srgb_to_linear(colours / 255) @ np.transpose(P3_TO_SRGB))
        tolerance = 2.5
    else:
        found = opened(stored(rgba, "WEBP", lossless=True, exact=True), tmp_path, "x.webp")
    assert np.abs(found - on_white(colours, alpha[..., None])).max() <= tolerance
    assert "transparent pixels, put on white." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bits", "colour_type", "row", "key", "expected"),
    [
        (1, 0, bytes([0b01000000]), [0], [255, 255]),
        (2, 0, bytes([0b01110000]), [1], [255, 255]),
        (2, 0, bytes([0b10010000]), [1], [170, 255]),
        (4, 0, bytes([0x3C]), [12], [51, 255]),
        (8, 0, bytes([7, 9]), [9], [7, 255]),
        (16, 0, struct.pack(">2H", 300, 301), [301], [1, 255]),
        (8, 2, bytes([7, 7, 7, 9, 9, 9]), [9, 9, 9], [7, 255]),
        (16, 2, struct.pack(">6H", *3 * [300], *3 * [40000]), 3 * [40000], [1, 255]),
    ],
)
def test_a_transparent_value_is_put_on_white(tmp_path, bits, colour_type, row, key, expected, capsys):
    found = opened(png(2, 1, bits, colour_type, [row], tRNS=struct.pack(f">{len(key)}H", *key)), tmp_path)
    assert found[0].tolist() == [[value] * 3 for value in expected]
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}: transparent pixels, put on white.\n"


def test_a_palette_with_transparency_is_put_on_white(tmp_path):
    palette = dict(PLTE=bytes([200, 0, 0, 0, 100, 0]))
    assert opened(png(2, 1, 8, 3, [bytes([0, 1])], **palette, tRNS=bytes([0])), tmp_path)[0].tolist() == [
        [255, 255, 255],
        [0, 100, 0],
    ]
    assert opened(png(2, 1, 8, 3, [bytes([0, 1])], **palette, tRNS=bytes([255, 51])), tmp_path)[0].tolist() == [
        [200, 0, 0],
        [204, 224, 204],
    ]
    gif = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    gif.putpalette([200, 0, 0, 0, 100, 0])
    assert opened(stored(gif, "GIF", transparency=1), tmp_path, "x.gif")[0].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_an_opaque_alpha_channel_changes_nothing_and_is_not_told(tmp_path, capsys):
    assert (opened(Image.fromarray(PIXELS).convert("RGBA"), tmp_path) == PIXELS).all()
    assert not capsys.readouterr().out


# Frames, pages and cameras' raw data


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_several_frames_the_first_is_taken_and_told(tmp_path, kind, capsys):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    content = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert opened(content, tmp_path, f"x.{kind}")[0, 0].tolist() == [255, 0, 0]
    assert f"x.{kind}: several frames or pages, of which the first is taken.\n" in capsys.readouterr().out
    sought = Image.open(tmp_path / f"x.{kind}")
    sought.seek(1)
    assert open_image(sought).getpixel((0, 0)) == (0, 0, 255)
    assert f"x.{kind}: several frames or pages, of which the current one is taken.\n" in capsys.readouterr().out


def test_a_gif_of_one_frame_that_was_loaded_before(tmp_path, capsys):
    image = Image.open(io.BytesIO(stored(Image.new("RGB", (4, 4), "red"), "GIF")))
    image.load()
    assert open_image(image).getpixel((0, 0)) == (255, 0, 0)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("name", "tags"), [("x.nef", {}), ("x.tif", {"NewSubfileType": 1})])
def test_the_preview_of_a_camera_s_raw_data_is_refused(tmp_path, name, tags):
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*only its preview .*: export it as PNG or JPEG"):
        opened(tiff(2, 1, 8, bytes(2), **tags), tmp_path, name)


# What cannot be read


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "TGA"])
def test_a_file_that_was_cut_off_is_named(tmp_path, kind):
    content = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for length in (len(content) // 2, 20):
        with pytest.raises(ValueError, match=r"x\.png cannot be read as an image \(.+\): "):
            opened(content[:length], tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"<html>", "Pillow does not know its format or kind of pixels, or it is broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS holds no picture of pixels"),
        (png(1, 1, 8, 2, [bytes(3)], zTXt=b"k\0\0" + zlib.compress(bytes(2_000_000))), "MAX_TEXT_CHUNK"),
        (png(20_000, 20_000, 8, 2, [b""]), "decompression bomb.*raise PIL.Image.MAX_IMAGE_PIXELS"),
        (png(0, 0, 8, 2, [b""]), "Pillow does not know"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, why):
    with pytest.raises(ValueError, match=rf"x\.png cannot be read as an image \(.*{why}"):
        opened(content, tmp_path)


def test_an_image_without_pixels_and_one_of_one_pixel(tmp_path):
    with pytest.raises(ValueError, match=r"The image cannot be read as an image .it has 0×3 pixels"):
        open_image(Image.new("RGB", (0, 3)))
    assert opened(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path).tolist() == [[[1, 2, 3]]]


def test_missing_files_and_other_things(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        open_image(tmp_path)
    for thing in (None, PIXELS, 3):
        with pytest.raises(ValueError, match=r"it is a \w+\): give a path, a binary file or an image of Pillow"):
            open_image(thing)


def test_names_that_are_no_ascii_or_no_unicode(tmp_path, capsys):
    transparent = stored(Image.new("RGBA", (1, 1)), "PNG")
    assert opened(transparent, tmp_path, "Grün 図.png").tolist() == [[[255] * 3]]
    assert "Grün 図.png: transparent" in capsys.readouterr().out
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write(transparent)
    assert open_image(path).size == (1, 1)
    assert "caf\\udce9.png: transparent" in capsys.readouterr().out


def test_paths_files_and_images_are_the_same_and_stay_as_they_were(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(PIXELS).save(path)
    image = Image.open(path)
    with open(path, "rb") as file:
        results = [open_image(source) for source in (path, str(path), file, image)]
        assert not file.closed
    assert all((np.asarray(result) == PIXELS).all() for result in results)
    results[-1].putpixel((0, 0), (0, 0, 0))
    assert (np.asarray(image) == PIXELS).all()

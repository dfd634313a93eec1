"""One way to open an image, whatever a camera, a scanner or an editor wrote: RGB, 8 bits, sRGB, upright."""

import os
import struct
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

Source = str | os.PathLike | BinaryIO | Image.Image
PATHS = str, bytes, os.PathLike

# What was done to an image that its owner should know of. Each reads after "3 images with".
ON_WHITE = "transparent pixels, put on white"
FIRST_FRAME = "several frames or pages, of which the first is taken"
CURRENT_FRAME = "several frames or pages, of which the current one is taken"
NO_PROFILE = "a colour profile that cannot be read or does not fit, taken as sRGB"
NO_EXIF = "EXIF data that cannot be read, taken as upright"
PLAIN_CMYK = "CMYK colours without a profile, converted approximately"

NOT_READ = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}  # drawings, videos, measurements
CAMERA_RAW = {".arw", ".cr2", ".dng", ".nef", ".pef", ".srw"}  # TIFF inside, with a small preview as the first page
SEVERAL_BY_NATURE = {"MPO", "PSD"}  # a camera's JPEG with its thumbnail or depth map; layers beside their sum
NO_RANGE = "floats, signed or of 32 bits, and so have no defined black and white"
TO_EIGHT_BITS = "scale it to 0 … 255 and save it with 8 bits a channel"
ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Refused(Exception):
    """Why an image is not taken, and what to do."""


def open_image(source: Source) -> Image.Image:
    """Open an image as RGB with 8 bits a channel, in sRGB, upright: a new image of mode RGB, values 0 … 255.

    ``source`` is a path, a binary file, or an image of Pillow; a file stays open. 16 bits a channel are cut to their
    upper eight, the EXIF orientation is applied, and transparent pixels are put on white. Colours are converted to
    sRGB from the embedded profile, a camera's mark of Adobe RGB, or a PNG's gamma. Of several frames or pages the
    current one is taken, which in a file is the first. A line is printed where something was put on white, left out
    or guessed.

    OSError if the file cannot be opened. ValueError, with its name and what to do, if it holds no image that Pillow
    reads, a broken one, or pixels without a defined range (floats, 32-bit integers).
    """
    image, notes = read_image(source)
    for note in notes:
        print(f"{image_name(source)}: {note}.")
    return image


def read_image(source: Source) -> tuple[Image.Image, list[str]]:
    """``open_image`` without printing: the image, and the notes on what was done to it."""
    try:
        if isinstance(source, Image.Image):
            return _convert(source, image_name(source))
        if isinstance(source, PATHS):
            with open(source, "rb") as file, Image.open(file) as image:
                return _convert(image, image_name(source))
        if not hasattr(source, "read"):
            raise _Refused(f"it is a {type(source).__name__}", "give a path, a binary file or an image of Pillow")
        with Image.open(source) as image:
            return _convert(image, image_name(source))
    except _Refused as error:
        why, advice = error.args
    except Image.DecompressionBombError as error:
        why, advice = error, "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    except UnidentifiedImageError:
        empty = isinstance(source, PATHS) and not os.path.getsize(source)
        why = "the file is empty" if empty else "Pillow does not know its format or kind of pixels, or it is broken"
        advice = "convert it to PNG or JPEG with 8 bits a channel, or remove it"
    except Exception as error:  # of a broken file a decoder may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # no such file, a folder, or no permission: the message says which
        why, advice = str(error) or type(error).__name__, "mend or remove it"
    raise ValueError(f"{image_name(source)} cannot be read as an image ({why}): {advice}.")


def readable_suffixes() -> set[str]:
    """Suffixes, in lower case, of the formats that are read: those of Pillow, and of what was registered with it."""
    Image.init()
    known = Image.registered_extensions().items()
    return {suffix for suffix, name in known if name in Image.OPEN and name not in NOT_READ}


def image_name(source: Source) -> str:
    """How messages call an image: its path, with what is no Unicode in it escaped."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    elif not isinstance(source, PATHS):
        source = getattr(source, "name", "")
    name = os.fsdecode(source) if isinstance(source, PATHS) else ""
    return name.encode(errors="backslashreplace").decode() or "The image"


def _convert(image: Image.Image, name: str) -> tuple[Image.Image, list[str]]:
    notes = []
    if image.format in NOT_READ:
        raise _Refused(f"{image.format} holds no picture of pixels", "export it as PNG")
    if (tags := getattr(image, "tag_v2", None)) is not None:
        _check_tiff(tags, name)
    if _is_animated(image) and image.format not in SEVERAL_BY_NATURE:
        notes.append(CURRENT_FRAME if image.tell() else FIRST_FRAME)
    if not min(image.size):
        raise _Refused(f"it has {image.width}×{image.height} pixels", "remove it")
    tiles = getattr(image, "tile", None)
    if tiles and image.format == "TIFF":  # Pillow 13 maps a named file into memory at the size that it has upright
        path, image.filename = image.filename, ""
        image.load()
        image.filename = path
    else:
        image.load()
    if image.mode == "RGB" and not image.info and image.format == "PNG":
        return _bare(image), notes  # most of a data set: nothing to convert

    stored = str(tiles[0][-1]) if tiles else ""  # Pillow's name of the pixels in the file
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # of broken EXIF data Pillow may raise anything
        turn = notes.append(NO_EXIF)
    profile = image.info.get("icc_profile") or (adobe_rgb() if _is_marked_adobe_rgb(image) else None)
    grey = image.mode in ("1", "L", "LA", "La") or "LA;16" in stored
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image, grey = _eight_bits(image), True
    image, alpha = _opaque(image, stored)
    own = "L" if grey else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    gamma = None if profile or "srgb" in image.info else image.info.get("gamma")  # of a PNG: value = light^gamma
    image = _to_srgb(image.convert(own) if image.mode != own else image, profile, notes)
    if gamma and abs(gamma - 1 / 2.2) > 0.02:
        image = image.point(3 * _srgb_of_gamma(gamma))
    if alpha is not None:
        notes.append(ON_WHITE)
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return _bare(image if turn is None else image.transpose(turn)), notes


def _bare(image: Image.Image) -> Image.Image:
    """A copy without the profile and the orientation, which are applied and must not be a second time."""
    image = image.copy()
    image.info = {}
    return image


def _check_tiff(tags, name: str) -> None:
    """Refuse what Pillow reads as something else. Tags by number as in TIFF 6.0, section 8."""
    # 50706 is DNGVersion; bit 0 of 254, NewSubfileType, says that this is a smaller version of another page.
    if Path(name).suffix.lower() in CAMERA_RAW or 50706 in tags or tags.get(254, 0) & 1:
        raise _Refused("it is a camera's raw data, and only its preview would be read", "export it as PNG or JPEG")
    bits, compression, planar, formats = (tags.get(n, (1,)) for n in (258, 259, 284, 339))
    if any(kind in (2, 3, 5, 6) for kind in formats):
        raise _Refused(f"its pixels are {NO_RANGE}", TO_EIGHT_BITS)
    if (compression, planar) == (1, 2) and max(bits) > 8:  # Pillow takes the bytes of each plane for pixels
        raise _Refused("its channels of 16 bits lie one after another", "save it interleaved or compressed")


def _is_marked_adobe_rgb(image: Image.Image) -> bool:
    """As cameras do without embedding a profile: interoperability index R03 (DCF 2.0)."""
    try:
        exif = image.getexif()
        return bool(exif) and exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03"
    except Exception:  # of broken EXIF data Pillow may raise anything
        return False


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # a GIF looks for its second frame, in a file that may be closed or cut off there
        return False


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as L, or LA where one value is transparent: the upper eight bits, as Pillow cuts colours."""
    depth, tags = 16, getattr(image, "tag_v2", None)
    if tags is not None:
        depth = tags.get(258, (1,))[0]  # BitsPerSample: 12 come as 0 … 4095
    sixteen = image.mode.startswith("I;16") or (image.format in ("PNG", "PPM"))  # as older Pillow reads both
    if image.mode == "F" or not sixteen or depth > 16:
        raise _Refused(f"its pixels are {NO_RANGE}", TO_EIGHT_BITS)
    values = np.asarray(image)
    if tags is not None and tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        values = 2**depth - 1 - values
    grey = Image.fromarray((values >> (depth - 8)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _opaque(image: Image.Image, stored: str) -> tuple[Image.Image, Image.Image | None]:
    """Split off the alpha channel, None if all is opaque."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    key = image.info.get("transparency")
    palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    if image.mode not in ("LA", "PA", "RGBA") and key is None and not palette:
        return image, None
    if stored in ("L;2", "L;4", "RGB;16B") and key is not None:  # Pillow scales the pixels, but not the key to them
        image = image.copy()
        scale = {"L;2": 85, "L;4": 17}.get(stored)
        image.info["transparency"] = scale * key if scale else tuple(value >> 8 for value in key)
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    return image.convert("RGB"), None if alpha.getextrema()[0] == 255 else alpha


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """An image of mode L, RGB, CMYK or LAB as RGB, through its profile if it has one that fits."""
    if image.mode == "LAB":
        return _transform(b"", "LAB").apply(image)
    if profile:
        try:
            space = ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()
            if image.mode == "L" and space == "RGB":  # a colour photograph that was saved as grey
                image = image.convert("RGB")
            transform = _transform(profile, image.mode)
            return transform.apply(image) if transform else image.convert("RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append(NO_PROFILE)
    elif image.mode == "CMYK":
        notes.append(PLAIN_CMYK)
    return image.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile (none for LAB) to sRGB; None if no colour moves by more than one level, as from sRGB's own."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = {"L": np.arange(256, dtype=np.uint8)[None], "RGB": np.stack(np.meshgrid(steps, steps, steps), -1)}
    if mode not in colours:
        return transform
    probe = Image.fromarray(colours[mode].reshape(1, -1, 3) if mode == "RGB" else colours[mode])
    moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(moved).max() > 1 else None


def _srgb_of_gamma(gamma: float) -> list[int]:
    """The level in sRGB (IEC 61966-2-1) of each level v that stands for light in proportion to v^(1/gamma)."""
    light = np.linspace(0, 1, 256) ** (1 / gamma)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * levels).round().astype(int).tolist()


@lru_cache(maxsize=1)
def adobe_rgb() -> bytes:
    """An ICC profile of Adobe RGB (1998): its primaries under D50 and its exponent, 563/256."""

    def colour(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * v) for v in values))

    primaries = colour(0.60974, 0.31111, 0.01947), colour(0.20528, 0.62567, 0.06087), colour(0.14919, 0.06322, 0.74457)
    white, tones = colour(0.9642, 1, 0.8249), b"curv" + bytes(4) + struct.pack(">IHH", 1, 563, 0)
    tags = dict(zip((b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ"), (white, *primaries)))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tones)
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table, data = table + name + struct.pack(">II", start + len(data), len(value)), data + value
    size = struct.pack(">IxxxxI", start + len(data), 0x02400000)
    header = size + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + white[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data

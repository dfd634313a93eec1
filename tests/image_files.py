"""Files as cameras, scanners and editors write them: PNG and TIFF by the byte, and colour profiles."""

import struct
import zlib

import numpy as np


def png(width, height, bits, colour_type, rows, **chunks) -> bytes:
    """A PNG of these rows of bytes; ``chunks`` (tRNS=…) stand before the pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def tiff(width, height, bits, pixels: bytes, order="<", **tags) -> bytes:
    """An uncompressed TIFF of one channel, or of ``SamplesPerPixel``; tags by name."""
    ids = {"NewSubfileType": 254, "Photometric": 262, "Orientation": 274, "SamplesPerPixel": 277, "SampleFormat": 339}
    ids["PlanarConfiguration"] = 284
    channels = tags.get("SamplesPerPixel", 1)
    entries = {254: 0, 256: width, 257: height, 259: 1, 262: 1 if channels == 1 else 2, 277: 1, 278: height}
    entries |= {ids[name]: value for name, value in tags.items()}
    entries |= {258: bits, 279: len(pixels), 273: 0}
    start = 8 + 2 + 12 * len(entries) + 4
    of_bits = struct.pack(f"{order}{channels}H", *[bits] * channels)
    entries[273] = start + len(of_bits)
    directory = b""
    for tag, value in sorted(entries.items()):
        if tag == 258 and channels > 2:
            directory += struct.pack(f"{order}HHII", tag, 3, channels, start)
        elif tag in (273, 279, 256, 257, 278, 254):
            directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
        else:
            directory += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(entries)) + directory + struct.pack(f"{order}I", 0) + of_bits + pixels


def profile(space: bytes, kind: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.4."""
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(data), len(value))
        data += value
    white = struct.pack(">3i", *(round(65536 * x) for x in (0.9642, 1, 0.8249)))
    head = struct.pack(">I4sI4s4s4s", offset + len(data), b"", 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def xyz(*values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in values))


def curve(values) -> bytes:
    """A tone curve: of values in [0, 1], or a number, the exponent."""
    if isinstance(values, float):
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * values))
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *(round(65535 * v) for v in values))


def srgb_to_linear(v):
    v = np.asarray(v, float)
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(v):
    v = np.clip(v, 0, 1)
    return np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


def rgb_profile(red, green, blue, tones) -> bytes:
    """Primaries as XYZ under D50."""
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"rXYZ": xyz(*red), b"gXYZ": xyz(*green), b"bXYZ": xyz(*blue)}
    return profile(b"RGB ", b"mntr", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(tones)))


SRGB_TONES = srgb_to_linear(np.linspace(0, 1, 1024))
DISPLAY_P3 = rgb_profile(
    (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), SRGB_TONES
)
ADOBE_RGB = rgb_profile(
    (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 563 / 256
)
SRGB = rgb_profile((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141), SRGB_TONES)
GREY_GAMMA_18 = profile(b"GRAY", b"mntr", b"XYZ ", {b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": curve(1.8)})


def cmyk_profile() -> bytes:
    """A press that prints full cyan as sRGB's red, black as black, and no ink as white; other inks as black, too."""
    corners = []
    for i in range(16):  # C is the slowest to change, K the fastest
        red = (54.29, 80.81, 69.89)  # sRGB's red in CIELAB under D50
        lab = {0: (100, 0, 0), 8: red}.get(i, (0, 0, 0))
        corners += [round(lab[0] * 255 / 100), round(lab[1] + 128), round(lab[2] + 128)]
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * int(i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + bytes(corners) + 3 * ramp
    return profile(b"CMYK", b"prtr", b"Lab ", {b"wtpt": xyz(0.9642, 1, 0.8249), b"A2B0": lut, b"A2B1": lut})

"""Enlarge a picture of one's own with the trained weights, without Jupyter.

usage: python -m mamba_ginr.enlarge IMAGE [--scale 4] [--output FILE] [--weights FILE] [--compare] [--force]

The result lies beside IMAGE, as NAME_x4.png; IMAGE itself stays as it is. Exit status 1 with one line if something
cannot be read or written, 130 if interrupted; a file is written whole or not at all.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Only what starts at once is imported here: a wrong call is told before PyTorch is loaded, which takes seconds, and an
# interrupt meanwhile is heard by main.

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "mamba_ginr_cifar10.ipynb"
WEIGHTS = ROOT / "checkpoints/mamba_ginr_best.pth"


class Refused(Exception):
    """What cannot be done, and what to do instead, in one line."""


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mamba_ginr.enlarge", description="Enlarge a picture with the trained weights."
    )
    parser.add_argument("image", type=_path, help="of any size and format that Pillow reads")
    parser.add_argument("--scale", type=float, default=4.0, help="at least 1; the result has at most 4096 a side")
    parser.add_argument("--output", type=_path, help="where to write; by default NAME_x4.png beside the image")
    parser.add_argument("--weights", type=_path, default=WEIGHTS, help="of another run")
    parser.add_argument("--compare", action="store_true", help="also write NAME_x4_compare.png, with bicubic beside it")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    return parser.parse_args(arguments)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def places(image: Path, output: Path | None, scale: float, compare: bool, force: bool) -> list[Path]:
    """Where the result goes, and the comparison if asked; Refused where it cannot or should not."""
    from PIL import Image

    output = output or image.with_name(f"{image.stem}_x{scale:g}.png")
    files = [output, output.with_name(f"{output.stem}_compare.png")][: 1 + compare]
    Image.init()
    if not keeps_pictures(output.suffix):
        raise Refused(
            f"{output}: Pillow writes no {output.suffix or 'file without a suffix'}, or not for any size and all "
            f"colours. Take .png."
        )
    for file in files:
        if file.exists() and file.samefile(image):
            raise Refused(f"{file} is the image itself, which stays as it is. Give another --output.")
        if file.is_dir():
            raise Refused(f"{file} is a folder. Name a file in it.")
        if file.exists() and not force:
            raise Refused(f"{file} is there already. Move it away, give another --output, or --force (make: FORCE=1).")
    try:  # now, and not after a long computation
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        why = error.strerror or error
        raise Refused(f"{output.parent} cannot be written to ({why}): give --output in another folder.") from None
    return files


def keeps_pictures(suffix: str) -> bool:
    """Whether Pillow writes pictures of any size and colours into files of this suffix: some hold icons or palettes."""
    from PIL import Image, UnidentifiedImageError

    trial, file = Image.new("RGB", (300, 200)), io.BytesIO()
    try:
        trial.save(file, Image.registered_extensions()[suffix.lower()])
    except (KeyError, ValueError, OSError):
        return False
    try:
        found = Image.open(file)
        return found.size == trial.size and found.mode not in ("1", "L", "P")
    except UnidentifiedImageError:  # written but not read, as PDF
        return True


def model_cells(notebook: Path = NOTEBOOK) -> ModuleType:
    """The cells of the notebook that define the model, up to ``load_model`` (cell 7), as a module.

    Refused where the notebook is not there, as after pip install.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except FileNotFoundError:
        raise Refused(
            f"The model's cells are in {notebook.name}, which is not in {notebook.parent}: download the whole "
            f"repository and run this in its folder."
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"{notebook} is not a whole notebook ({error!r}): get a good copy.") from None
    module = ModuleType("mamba_ginr_cells")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for number, source in enumerate(sources, start=1):
        try:
            exec(compile(source, f"{notebook.name}, cell {number}", "exec"), module.__dict__)
        except ImportError:
            raise  # says what is missing
        except Exception as error:
            raise Refused(
                f"Cell {number} of {notebook.name} fails ({type(error).__name__}: {error}). Mend it, or get a good "
                f"copy."
            ) from error
        if hasattr(module, "load_model"):
            return module
    raise Refused(f"{notebook} defines no load_model: get a good copy.")


def comparison(image, result):
    """The image with its pixels repeated, bicubic and the result side by side, each with its name above it."""
    from PIL import Image, ImageDraw, ImageFont

    height = max(16, result.height // 24)
    font = ImageFont.load_default(round(0.7 * height))
    pictures = {  # Pillow's font has no ×
        f"input, {image.width} x {image.height}": image.resize(result.size, Image.Resampling.NEAREST),
        "bicubic": image.resize(result.size, Image.Resampling.BICUBIC),
        "MAMBA-GINR": result,
    }
    gap = max(4, height // 4)
    sheet = Image.new("RGB", (3 * result.width + 2 * gap, height + result.height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(pictures.items()):
        left = i * (result.width + gap)
        draw.text((left + result.width // 2, height // 2), name, fill="black", font=font, anchor="mm")
        sheet.paste(picture, (left, height))
    return sheet


def write(path: Path, picture) -> None:
    """Write a picture, whole or not at all, in the format that the name ends in."""
    from PIL import Image

    from mamba_ginr.checkpoints import save_atomically

    encoded = io.BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    picture.save(encoded, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    save_atomically(path, lambda file: file.write(encoded.getbuffer()), "give --output in another folder")


def enlarge(options: argparse.Namespace, written: Callable[[Path], None]) -> None:
    """Do what the command asks for; ``written`` is told of each file.

    Refused, ValueError, OSError and CheckpointError say in one line what cannot be done.
    """
    start = time.perf_counter()
    from mamba_ginr.images import open_image

    image = open_image(options.image)
    files = places(options.image, options.output, options.scale, options.compare, options.force)
    import torch

    from mamba_ginr.enlarge import check_scale, super_resolve

    check_scale(image, options.scale)
    cells = model_cells()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = cells.load_model(options.weights, device)
    print(f"{options.image}: {image.width}×{image.height} pixels, ×{options.scale:g}, on the {device.upper()}")
    chunk = 65_536 if device == "cuda" else 1024  # which stay in a processor's cache
    result = super_resolve(model, image, options.scale, chunk)
    pictures = [result, comparison(image, result)] if options.compare else [result]
    for file, picture in zip(files, pictures):
        write(file, picture)
        written(file)
        print(f"{file}: {picture.width}×{picture.height} pixels")
    print(f"{time.perf_counter() - start:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    options, done = read_arguments(arguments), []
    # Threads that wait actively stand still where another program has a core: 32×32 took 7 to 8 s in place of 2.9.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from mamba_ginr.report import print_anywhere

        print_anywhere()
        enlarge(options, done.append)
    except KeyboardInterrupt:
        what = f"only {done[0]} was written" if done else "nothing was written"
        print(f"\nInterrupted: {what}.", file=sys.stderr)
        return 130
    except (Refused, ValueError, OSError, RuntimeError, ImportError) as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    return 0

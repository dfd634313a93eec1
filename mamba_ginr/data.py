"""Images: CIFAR-10, a folder of one's own, or photographs that need no network."""

import http.client
import os
import pickle
import socket
import sys
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from torch import Tensor
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm

from mamba_ginr.images import image_name, read_image, readable_suffixes
from mamba_ginr.parallel import check_equal, first_alone
from mamba_ginr.pictures import Pictures, shapes_of

THUMBNAILS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}  # of macOS archives, Synology, Windows, Linux disks


@dataclass
class ImageData:
    """To train on, uint8 images (n, 3, S, S) or larger pictures; held out to choose the checkpoint; and to report on.

    Of larger pictures ``held_out`` and ``test`` are the middle, (n, 3, S, S); ``test_pictures`` are the whole ones.
    """

    name: str
    train: Pictures
    held_out: Tensor
    test_pictures: Pictures
    checksum: str = ""  # of a folder's pictures to train on and held out; the other data are the same everywhere

    @property
    def identity(self) -> str:
        """What a resumed run must find again: the name, and of a folder the checksum of what training sees."""
        return self.name + (f", checksum {self.checksum}" if self.checksum else "")

    @cached_property
    def test(self) -> Tensor:
        return self.test_pictures.crops(torch.arange(len(self.test_pictures), device=self.test_pictures.device))

    def __str__(self) -> str:
        train, held_out, test = (f"{len(images):,}" for images in (self.train, self.held_out, self.test_pictures))
        crops = "images" if self.train.exact else f"crops of {len(self.train.shapes):,} pictures"
        return f"{self.name}, {train} {crops} to train on, {held_out} held out, {test} to test"


# What a cut, stalled or corrupt download raises, in the network, in the archive or in what was unpacked.
DOWNLOAD_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException, tarfile.TarError, zlib.error,
    pickle.UnpicklingError,
)  # fmt: skip
STALLED = 60.0  # seconds without a byte, after which a download counts as cut


def load_cifar10(root: Path) -> tuple[str, Tensor, Tensor]:
    """CIFAR-10 (Krizhevsky 2009) through torchvision, downloaded into ``root`` if it is not there.

    RuntimeError, with the reason, where it is not whole on disk and cannot be downloaded.
    """
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED)
    try:
        splits = [torchvision.datasets.CIFAR10(root, train=train, download=True).data for train in (True, False)]
    except DOWNLOAD_ERRORS as error:
        raise RuntimeError(
            f"CIFAR-10 is not whole in {root} and cannot be downloaded ({str(error) or type(error).__name__}). Set "
            f"DATA_DIR to the folder that holds {torchvision.datasets.CIFAR10.base_folder}/, or DATASET to 'folder' or "
            f"'photos', or run this again for another try."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return "CIFAR-10", *(rearrange(torch.from_numpy(s), "n h w c -> n c h w") for s in splits)


def image_files(split: Path) -> tuple[list[str], dict[str, int]]:
    """Paths of the images in split/<class>/ and in the folders below, sorted, and how many files of which kind are not.

    Hidden files and folders are left out, and so are the thumbnails that systems put beside photographs. A link to a
    folder that it lies in is not followed. FileNotFoundError if there is no folder; ValueError for a broken link or a
    folder that cannot be read.
    """
    readable, folders, left_out = readable_suffixes(), [], Counter()

    def visit(folder: str, way: tuple[str, ...]) -> None:
        names = []
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            why = error.strerror or error
            raise ValueError(
                f"{image_name(folder)} cannot be read ({why}): give permission, or move it out of {image_name(split)}."
            ) from error
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            hidden = entry.name.startswith(".") or entry.name in THUMBNAILS
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                real = os.path.realpath(entry.path)
                if hidden:
                    left_out["hidden"] += 1
                elif any(f"{passed}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}") for passed in way):
                    left_out["links to a folder around them"] += 1
                else:
                    visit(entry.path, (*way, real))
            elif hidden:
                left_out["hidden"] += suffix in readable
            elif suffix not in readable:
                left_out[suffix or "without a suffix"] += 1
            elif not (entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)):
                raise ValueError(f"{image_name(entry.path)} is a broken link or no file: mend or remove it.")
            elif len(way) == 1:
                left_out["outside the class folders"] += 1
            else:
                names.append(entry.name)
        folders.append((folder, sorted(names)))

    def class_of(folder: str) -> str:
        return os.path.relpath(folder, split).split(os.sep)[0]

    visit(str(split), (os.path.realpath(split),))
    folders.sort(key=lambda found: (class_of(found[0]), found[0]))  # the order of torchvision's ImageFolder
    classes, filled = ({class_of(f) for f, names in folders if names or not full} - {"."} for full in (False, True))
    left_out["class folders without images"] = len(classes - filled)
    return [os.path.join(folder, name) for folder, names in folders for name in names], dict(+left_out)


def load_folder(root: Path, size: int = 32) -> tuple[str, Tensor | list[Tensor], Tensor | list[Tensor]]:
    """Images of root/{train,test}/<class>/*, of any size; the folder's name is the data's.

    uint8, (n, 3, size, size) where all are of this size, else a list of (3, H, W). Of pictures with a shorter side the
    middle square is enlarged to ``size``. All are opened by ``images.open_image``. What was enlarged, left out, put on
    white or guessed is printed, with how many.
    """
    root = Path(root).expanduser()
    splits, enlarged, notes, first = [], 0, Counter(), {}
    for split in ("train", "test"):
        paths, left_out = image_files(root / split) if (root / split).is_dir() else ([], {"no such folder": ""})
        listed = ", ".join(f"{count} {kind}".strip() for kind, count in sorted(left_out.items()))
        if not paths:
            raise FileNotFoundError(
                f"DATASET = 'folder' reads DATA_DIR/train/<class>/* and DATA_DIR/test/<class>/*, but {root / split} "
                f"holds no such images ({listed or 'it is empty'}). Set DATA_DIR, or another DATASET."
            )
        if listed:
            print(f"Images: left out of {image_name(root / split)}: {listed}.")
        images = []
        for path in tqdm(paths, desc=f"reading {split}", leave=False):
            try:
                image, done = read_image(path)
            except OSError as error:
                why = error.strerror or error
                raise ValueError(
                    f"{image_name(path)} cannot be read as an image ({why}): mend or remove it."
                ) from error
            for note in done:
                notes[note] += 1
                first.setdefault(note, image_name(path))
            if min(image.size) < size:
                enlarged += 1
                image = TF.resize(TF.center_crop(image, min(image.size)), size, antialias=True)
            images.append(rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").contiguous())
        splits.append(torch.stack(images) if set(shapes_of(images)) == {(size, size)} else images)
    for note, count in notes.items():
        print(f"Images: {count} with {note} (for example {first[note]}).")
    if enlarged:
        print(f"Images: of {enlarged} with a side shorter than {size} pixels the middle square was enlarged.")
    if larger := sum(shape != (size, size) for images in splits for shape in shapes_of(images)):
        print(
            f"Images: of {larger} larger than {size}×{size} crops are taken, at random places, in tests in the middle."
        )
    return f"{image_name(root.resolve().name or root.resolve())} (folder)", *splits


def photographs() -> list[Tensor]:
    """The five colour photographs inside scikit-image's wheel: uint8 (3, H, W) each."""
    from skimage import data

    photos = (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0])
    return [rearrange(torch.tensor(photo), "h w c -> c h w") for photo in photos]


def load_photos(size: int = 32) -> tuple[str, Tensor, Tensor]:
    """Square crops of scikit-image's photographs at 1, 1/2 and 1/4 of their size; the right quarter is for testing."""
    splits = ([], [])
    for photo in photographs():
        photo = photo.unsqueeze(0).float()
        border = photo.shape[3] * 3 // 4
        # Training crops overlap, the smaller ones more, so that each size has about as many: else nearly all would be
        # smooth. No pixel of a test crop lies in a training crop.
        for train, part in [(True, photo[..., :border]), (False, photo[..., border:])]:
            for scale in (1, 2, 4):
                small = F.avg_pool2d(part, scale).round().byte()
                if min(small.shape[2:]) < size:
                    continue  # at 32 the smallest photograph's test quarter, at 1/4
                stride = max(1, size // 2 // scale) if train else size
                tiles = small.unfold(2, size, stride).unfold(3, size, stride)
                splits[not train].append(rearrange(tiles, "1 c y x h w -> (y x) c h w"))
    if not all(splits):
        raise ValueError(
            f"IMAGE_SIZE = {size}: scikit-image's photographs are too small for it, take DATASET = 'folder'"
        )
    return "scikit-image photographs", *(torch.cat(crops) for crops in splits)


def cifar10_within_reach(root: Path) -> bool:
    """True if CIFAR-10 lies in ``root`` or its server answers within ten seconds."""
    cifar10 = torchvision.datasets.CIFAR10
    if (root / cifar10.base_folder).is_dir() or (root / cifar10.filename).is_file():
        return True
    try:
        with urlopen(Request(cifar10.url, method="HEAD"), timeout=10):
            return True
    except (OSError, http.client.HTTPException):
        return False


def load_data(
    dataset: str, root: str, held_out: int, max_train: int, max_test: int, seed: int, device, size: int = 32
) -> ImageData:
    """Load, hold ``held_out`` training images out, and move all to ``device``; max_* = 0 keeps all images.

    "auto" takes the images of root/{train,test}/<class>/* if both are there, else CIFAR-10, else the photographs.
    ``size`` is a side of the images that are trained on. Of a folder of larger pictures at most a tenth is held out,
    and ``max_train`` is the most crops of an epoch.
    Raises ValueError for an unknown dataset, or if too few images are left to train on.
    """
    root, asked = Path(root).expanduser(), dataset
    if dataset != "photos" and root.exists() and not root.is_dir():
        raise NotADirectoryError(
            f"DATA_DIR = {str(root)!r} is a file: name the folder that holds the images, or is to."
        )
    if dataset == "auto":
        own = [split for split in ("train", "test") if (root / split).is_dir() and image_files(root / split)[0]]
        if len(own) == 2:
            dataset = "folder"
            print(f"Images: DATASET = 'auto' takes train/ and test/ of {root}; set 'cifar10' or 'photos' for those.")
        elif own:
            other = {"train": "test", "test": "train"}[own[0]]
            print(
                f"WARNING: {root / own[0]} holds images, but {root / other} does not: DATASET = 'auto' takes none of "
                f"them. DATASET = 'folder' reads {root}/train/<class>/* and {root}/test/<class>/*."
            )
    if dataset == "auto" and size != 32:
        dataset = "photos"
        print(f"Images: CIFAR-10's are 32×32; for IMAGE_SIZE = {size} scikit-image's photographs take its place.")
    if dataset == "cifar10" and size != 32:
        raise ValueError(f"IMAGE_SIZE = {size}: CIFAR-10's images are 32×32; take DATASET = 'folder' or 'photos'")
    if dataset == "auto":
        dataset = "cifar10" if cifar10_within_reach(root) else "photos"
        if dataset == "photos":
            print("WARNING: CIFAR-10 is neither on disk nor reachable; scikit-image's photographs take its place.")
    loaders = {"cifar10": lambda: load_cifar10(root), "folder": lambda: load_folder(root, size)}
    loaders["photos"] = lambda: load_photos(size)
    if dataset not in loaders:
        raise ValueError(f"DATASET = {dataset!r}: choose one of auto, {', '.join(loaders)}")
    try:
        with first_alone():  # where CIFAR-10 is yet to be downloaded, one process does
            name, train, test = loaders[dataset]()
    except RuntimeError as error:
        if not (asked == "auto" and dataset == "cifar10"):
            raise
        print(f"WARNING: {error} Until then scikit-image's photographs take its place.")
        name, train, test = load_photos(size)
    check_equal((name, shapes_of(train), shapes_of(test)), "the images")
    if not torch.is_tensor(train) and held_out > (tenth := max(1, len(train) // 10)):
        print(f"Images: of {len(train)} pictures {tenth} are held out, not HELD_OUT = {held_out}.")
        held_out = tenth
    if held_out < 1 or len(train) <= held_out:
        raise ValueError(
            f"HELD_OUT = {held_out} must lie in 1 … {len(train) - 1}: {name} has {len(train)} training images"
        )
    # A seeded shuffle before any cut, because a folder comes sorted by class.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[:held_out], order[held_out:]
    if torch.is_tensor(train):
        rest = rest[: max_train or None]
    tested = torch.linspace(0, len(test) - 1, min(max_test or len(test), len(test))).long()
    sets = (chosen(train, held_out), False, 0), (chosen(train, rest), True, max_train), (chosen(test, tested), False, 0)
    pictures = [Pictures(images, size, many, most) for images, many, most in sets]
    needed, room = sum(len(each.pixels) for each in pictures), room_for_pictures(torch.device(device))
    if needed > room:
        print(
            f"Images: {needed / 2**30:.3g} GiB of pictures stay in the computer's memory, as they would take over half "
            f"of what the GPU has free. Crops to train on go to it step by step."
        )
    checksum = f"{checksum_of(pictures[:2]):08x}" if dataset == "folder" else ""
    held_out, train, test = (each.to(device, apart=needed > room) for each in pictures)
    held_out = held_out.crops(torch.arange(len(held_out), device=held_out.device))
    return ImageData(name, train, held_out, test, checksum)


def checksum_of(sets: list[Pictures]) -> int:
    """The CRC-32 of the pixels and shapes of all these pictures, which lie in the computer's memory."""
    total = 0
    for each in sets:
        for values in (each.shapes, each.pixels):
            total = zlib.crc32(values.numpy(), total)
    return total


def room_for_pictures(device: torch.device) -> int:
    """Bytes of pictures that may lie on ``device``: half of what a GPU has free, as a model needs room beside them."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else sys.maxsize


def chosen(images: Tensor | list[Tensor], which: Tensor) -> Tensor | list[Tensor]:
    """Those of the images with these numbers, in this order."""
    return images[which] if torch.is_tensor(images) else [images[i] for i in which.tolist()]


def photograph_crops(size: int = 32, limit: int = 0) -> Tensor:
    """Crops of scikit-image's photographs that overlap by half, 8, 4 or 2 times ``size`` pixels a side, at most 256.

    uint8 (33, 3, 256, 256) for a size of 32, or ``limit`` of them. For a size of 256 of twice that, from the one
    photograph that has it; for larger ones (0, 3, size, size).
    """
    size *= next((factor for factor in (8, 4) if factor * size <= 256), 2)
    photos = [photo for photo in photographs() if min(photo.shape[1:]) >= size]
    if not photos:
        return torch.zeros(0, 3, size // 2, size // 2, dtype=torch.uint8)
    tiles = [photo.unfold(1, size, size // 2).unfold(2, size, size // 2) for photo in photos]
    crops = torch.cat([rearrange(t, "c y x h w -> (y x) c h w") for t in tiles])
    return crops[torch.linspace(0, len(crops) - 1, min(limit, len(crops))).long()] if limit else crops

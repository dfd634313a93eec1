"""Data: folders, photographs and CIFAR-10, on disk or out of reach, and the images held out."""

import gzip
import http.client
import http.server
import os
import re
import socket
import tarfile
import threading
import time
import zlib
from math import prod

import numpy as np
import pytest
import torch
from image_files import png
from PIL import Image
from stand_ins import write_images

import mamba_ginr.data as loading


def test_a_folder_of_images_is_read_as_it_is(nb, tmp_path):
    write_images(tmp_path / "mine", {"train/cat": 3, "train/dog": 2, "test/cat": 1})
    name, train, test = loading.load_folder(tmp_path / "mine")
    assert name == "mine (folder)"
    assert (train.shape, test.shape) == ((5, 3, 32, 32), (1, 3, 32, 32))
    first = np.asarray(Image.open(tmp_path / "mine/train/cat/0.png"))
    assert torch.equal(train[0], torch.from_numpy(first.copy()).permute(2, 0, 1))


def test_images_of_other_sizes_and_modes_are_kept_or_enlarged_and_told(nb, tmp_path, capsys):
    write_images(tmp_path, {"train/a": 2}, size=(50, 40), mode="L")
    write_images(tmp_path, {"test/a": 1}, size=(20, 64), mode="RGBA")
    write_images(tmp_path, {"test/b": 1})
    _, train, test = loading.load_folder(tmp_path)
    assert [image.shape for image in (*train, *test)] == [(3, 40, 50), (3, 40, 50), (3, 32, 32), (3, 32, 32)]
    out = capsys.readouterr().out
    assert "Images: of 1 with a side shorter than 32 pixels the middle square was enlarged." in out
    assert "Images: of 2 larger than 32×32 crops are taken, at random places, in tests in the middle." in out


def test_a_folder_of_larger_pictures_is_a_training_set(nb, tmp_path, capsys):
    write_images(tmp_path / "mine", {"train/a": 12, "test/a": 3}, size=(50, 40))
    data = nb.load_data("folder", str(tmp_path / "mine"), 1000, 0, 2, 0, "cpu", 16)
    assert "of 12 pictures 1 are held out, not HELD_OUT = 1000" in capsys.readouterr().out
    assert str(data) == "mine (folder), 66 crops of 11 pictures to train on, 1 held out, 2 to test"
    assert (data.held_out.shape, data.test.shape) == ((1, 3, 16, 16), (2, 3, 16, 16))
    assert len(nb.load_data("folder", str(tmp_path / "mine"), 1, 20, 0, 0, "cpu", 16).train) == 20  # crops
    last = np.asarray(Image.open(tmp_path / "mine/test/a/2.png"))[12:28, 17:33]
    assert torch.equal(data.test[1], torch.from_numpy(last.copy()).permute(2, 0, 1))


def test_pictures_that_a_gpu_has_no_room_for_stay_in_memory(nb, tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "mine", {"train/a": 12, "test/a": 3}, (40, 24))
    whole = nb.load_data("folder", str(tmp_path / "mine"), 1000, 0, 2, 0, "cpu", 16)
    assert "stay in the computer's memory" not in capsys.readouterr().out
    monkeypatch.setattr("mamba_ginr.data.room_for_pictures", lambda device: 14 * 3 * 40 * 24 - 1)  # of all three sets
    apart = nb.load_data("folder", str(tmp_path / "mine"), 1000, 0, 2, 0, "cpu", 16)
    assert "GiB of pictures stay in the computer's memory" in capsys.readouterr().out
    assert (whole.train.apart, apart.train.apart) == (False, True)
    assert torch.equal(whole.held_out, apart.held_out)
    assert torch.equal(whole.test, apart.test)
    batches = [nb.Sampler(data.train, 8, 2, 2, 5, 0)(0, 1) for data in (whole, apart)]
    assert all(torch.equal(*pair) for pair in zip(*batches))


def test_cifar10_has_one_size(nb, fake_cifar10, tmp_path, capsys):
    with pytest.raises(ValueError, match="IMAGE_SIZE = 64: CIFAR-10's images are 32×32"):
        nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 0, "cpu", 64)
    data = nb.load_data("auto", str(tmp_path), 100, 0, 0, 0, "cpu", 64)
    assert data.test.shape[1:] == (3, 64, 64)
    assert "for IMAGE_SIZE = 64 scikit-image's photographs take its place" in capsys.readouterr().out
    with pytest.raises(ValueError, match="IMAGE_SIZE = 256: scikit-image's photographs are too small"):
        nb.load_data("photos", str(tmp_path), 100, 0, 0, 0, "cpu", 256)


def test_a_folder_without_images_is_named(nb, tmp_path):
    with pytest.raises(FileNotFoundError, match="reads DATA_DIR/train/<class>/") as error:
        loading.load_folder(tmp_path / "none")
    assert str(tmp_path / "none") in str(error.value)
    write_images(tmp_path, {"train/a": 1})
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "test")):
        loading.load_folder(tmp_path)


def test_a_broken_image_is_named(nb, tmp_path):
    write_images(tmp_path, {"train/a": 2, "test/a": 1})
    broken = tmp_path / "train/a/1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as an image") as error:
        loading.load_folder(tmp_path)
    assert str(broken) in str(error.value)


def test_photographs_give_training_and_test_crops_apart(nb):
    name, train, test = loading.load_photos()
    assert "scikit-image" in name
    assert (train.dtype, train.shape[1:], test.shape[1:]) == (torch.uint8, (3, 32, 32), (3, 32, 32))
    # As many of each size, within a factor of three: from the widest photograph's left part, 32 pixels every 16, 8, 4.
    counts = [0, 0, 0]
    for photo in loading.photographs():
        height, width = photo.shape[1], photo.shape[2] * 3 // 4
        for i, scale in enumerate((1, 2, 4)):
            counts[i] += prod((n // scale - 32) // (16 // scale) + 1 for n in (height, width))
    assert len(train) == sum(counts)
    assert max(counts) < 3 * min(counts)
    assert len(test) > 200
    # Unflat crops at full size would be found again if a pixel of the test quarter were in a training crop.
    textured = [t for t in test if t.float().std() > 20]
    assert len(textured) > 50
    assert not any((train == t).flatten(1).all(1).any() for t in textured)


def test_auto_without_network_takes_the_photographs_and_warns(nb, monkeypatch, tmp_path, capsys):
    def no_network(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(loading, "urlopen", no_network)
    data = nb.load_data("auto", str(tmp_path), 100, 0, 0, 0, "cpu")
    assert data.name == "scikit-image photographs"
    assert capsys.readouterr().out.startswith("WARNING: CIFAR-10 is neither on disk nor reachable")


@pytest.fixture
def fake_cifar10(nb, monkeypatch):
    """Stands in for torchvision's class, whose files cannot be made up: it checks their MD5."""

    class CIFAR10(loading.torchvision.datasets.CIFAR10):
        def __init__(self, root, train, download):
            rng = np.random.default_rng(int(train))
            self.data = rng.integers(0, 256, (300 if train else 50, 32, 32, 3), dtype=np.uint8)

    monkeypatch.setattr(loading.torchvision.datasets, "CIFAR10", CIFAR10)
    return CIFAR10


def test_auto_takes_cifar10_from_disk_without_asking_the_network(nb, fake_cifar10, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = nb.load_data("auto", str(tmp_path), 100, 0, 0, 0, "cpu")
    assert (data.name, len(data.train), len(data.held_out), len(data.test)) == ("CIFAR-10", 200, 100, 50)


def test_cifar10_out_of_reach_says_what_to_do(nb, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(loading.torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(RuntimeError, match=r"downloaded \(no route\). Set DATA_DIR to the folder that holds cifar"):
        nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 0, "cpu")


def test_held_out_images_are_apart_and_the_same_each_time(nb, fake_cifar10, tmp_path):
    a = nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 3, "cpu")
    b = nb.load_data("cifar10", str(tmp_path), 100, 50, 10, 3, "cpu")
    original = torch.from_numpy(fake_cifar10(tmp_path, True, False).data).permute(0, 3, 1, 2)
    (train, first) = (x.train.crops(torch.arange(len(x.train))) for x in (a, b))
    together = torch.cat([train, a.held_out])
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, original.contiguous().numpy()))
    assert torch.equal(a.held_out, b.held_out)
    assert torch.equal(train[:50], first)
    assert torch.equal(b.test[0], a.test[0])
    assert torch.equal(b.test[-1], a.test[-1])
    assert not torch.equal(a.held_out, nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 4, "cpu").held_out)


def test_an_unknown_dataset_and_too_many_held_out(nb, fake_cifar10, tmp_path):
    with pytest.raises(ValueError, match="choose one of auto, cifar10, folder, photos"):
        nb.load_data("mnist", str(tmp_path), 100, 0, 0, 0, "cpu")
    with pytest.raises(ValueError, match="HELD_OUT = 300 must lie in 1 … 299: CIFAR-10 has 300 training images"):
        nb.load_data("cifar10", str(tmp_path), 300, 0, 0, 0, "cpu")


def test_photographs_are_cropped_for_enlargement(nb):
    crops = nb.photograph_crops()
    assert (crops.shape, crops.dtype) == ((33, 3, 256, 256), torch.uint8)
    assert torch.equal(nb.photograph_crops(limit=2), crops[[0, 32]])
    assert torch.equal(nb.photograph_crops(limit=50), crops)
    # At most 256 pixels, or twice the size, of the photographs that have them.
    sides = {size: tuple(nb.photograph_crops(size).shape[::3]) for size in (64, 96, 128, 256, 300)}
    assert sides == {64: (33, 256), 96: (76, 192), 128: (33, 256), 256: (1, 512), 300: (0, 300)}


CUT = [
    (http.client.IncompleteRead(b"1234", 6), "IncompleteRead(4 bytes read, 6 more expected)"),
    (http.client.BadStatusLine("<html>"), "<html>"),
    (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
    (TimeoutError(), "TimeoutError"),
    (tarfile.ReadError("unexpected end of data"), "unexpected end of data"),
    (zlib.error("Error -3 while decompressing data"), "Error -3"),
    (EOFError("Compressed file ended before the end-of-stream marker was reached"), "Compressed file ended"),
    (gzip.BadGzipFile("Not a gzipped file"), "Not a gzipped file"),
    (OSError(28, "No space left on device"), "No space left on device"),
]


@pytest.mark.parametrize(("error", "reason"), CUT, ids=[type(error).__name__ for error, _ in CUT])
def test_a_cut_download_is_one_clear_error_and_auto_goes_on(nb, error, reason, monkeypatch, tmp_path, capsys):
    def cut(*_, **__):
        raise error

    monkeypatch.setattr(loading.torchvision.datasets.cifar, "download_and_extract_archive", cut)
    monkeypatch.setattr(loading, "cifar10_within_reach", lambda _: True)
    with pytest.raises(RuntimeError, match=r"cannot be downloaded \(.*\)\. Set DATA_DIR to the folder") as told:
        nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 0, "cpu")
    assert reason in str(told.value)
    assert nb.load_data("auto", str(tmp_path), 100, 0, 0, 0, "cpu").name == "scikit-image photographs"
    out = capsys.readouterr().out
    assert out.startswith("WARNING: CIFAR-10 is not whole in ")
    assert reason in out
    assert out.endswith("Until then scikit-image's photographs take its place.\n")


@pytest.mark.parametrize("how", ["cut", "stalls"])
def test_a_server_that_stops_in_the_middle(nb, how, monkeypatch, tmp_path, capsys):
    over = threading.Event()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(bytes(1000))
            self.wfile.flush()
            if how == "stalls":
                over.wait(60)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(loading.torchvision.datasets.CIFAR10, "url", url)
        monkeypatch.setattr(loading, "STALLED", 0.3)
        began = time.monotonic()
        data = nb.load_data("auto", str(tmp_path), 100, 0, 0, 0, "cpu")
        over.set()
        server.shutdown()
    assert time.monotonic() - began < 30
    assert data.name == "scikit-image photographs"
    assert "WARNING: CIFAR-10 is not whole in" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None


def test_a_server_that_talks_nonsense_is_out_of_reach(nb, monkeypatch, tmp_path):
    def nonsense(*_, **__):
        raise http.client.BadStatusLine("<html>")

    monkeypatch.setattr(loading, "urlopen", nonsense)
    assert not loading.cifar10_within_reach(tmp_path)


@pytest.mark.parametrize("dataset", ["auto", "cifar10", "folder"])
def test_a_file_in_place_of_the_data_folder_is_named(nb, dataset, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(NotADirectoryError, match=r"DATA_DIR = '.*data' is a file: name the folder"):
        nb.load_data(dataset, str(tmp_path / "data"), 100, 0, 0, 0, "cpu")


def test_own_images_of_every_kind_are_opened_the_same_way_and_told_once_a_kind(tmp_path, capsys):
    write_images(tmp_path, {"train/a": 1, "test/a": 1})
    wide = Image.new("RGB", (32, 32), (200, 0, 0))
    wide.paste((0, 0, 200), (16, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to turn by 90° clockwise
    wide.save(tmp_path / "train/a/1.png", exif=exif)
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(tmp_path / "train/a/2.tif")
    for i in (3, 4):
        Image.new("RGBA", (32, 32), (10, 20, 30, 0)).save(tmp_path / f"train/a/{i}.png")
    wide.save(tmp_path / "train/a/5.png", icc_profile=b"broken")
    wide.save(tmp_path / "train/a/6.gif", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    train = loading.load_folder(tmp_path)[1]
    assert train[1, :, 0, 0].tolist() == train[1, :, 0, 31].tolist() == [200, 0, 0]  # what was left is above
    assert train[1, :, 31, 0].tolist() == [0, 0, 200]
    assert (train[2] == 40_000 // 256).all()
    assert (train[3:5] == 255).all()
    told = capsys.readouterr().out.splitlines()
    folder = tmp_path / "train/a"
    assert f"Images: 2 with transparent pixels, put on white (for example {folder / '3.png'})." in told
    assert any(line.startswith("Images: 1 with a colour profile that cannot be read") for line in told)
    assert any(line.startswith("Images: 1 with several frames or pages") for line in told)
    assert len(told) == 3


def test_files_that_are_left_out_are_told(tmp_path, capsys):
    write_images(tmp_path, {"train/a": 2, "train/b": 1, "train": 2, "test/a": 1})
    write_images(
        tmp_path, {"train/.ipynb_checkpoints": 3, "train/a/.hidden": 3, "train/a/@eaDir/0.png": 1, "train/c": 0}
    )
    for name in ("a.heic", "B.HEIC", "notes.txt", "README", ".DS_Store", "._0.png"):
        (tmp_path / "train/a" / name).write_bytes(b"none")
    name, train, test = loading.load_folder(tmp_path)
    assert (len(train), len(test)) == (3, 1)
    told = "2 .heic, 1 .txt, 1 class folders without images, 4 hidden, 2 outside the class folders, 1 without a suffix"
    assert capsys.readouterr().out == f"Images: left out of {tmp_path / 'train'}: {told}.\n"


def test_a_folder_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    write_images(tmp_path, {"train/a": 1, "train/b": 1, "train/lost+found": 1, "test/a": 1})
    scan = loading.os.scandir

    def guarded(folder):
        if folder.endswith(("b", "lost+found")):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(loading.os, "scandir", guarded)
    with pytest.raises(
        ValueError, match=r"train/b cannot be read \(Permission denied\): give permission, or move it out"
    ):
        loading.load_folder(tmp_path)
    (tmp_path / "train/b").rename(tmp_path / "b")
    assert len(loading.load_folder(tmp_path)[1]) == 1


def test_other_pictures_in_a_folder_of_the_same_name_are_another_run(nb, tmp_path):
    def identity(folder, seed=0):
        return loading.load_data("folder", folder, 1, 0, 0, seed, "cpu").identity

    for place in ("cats", "dogs", "copy"):
        write_images(tmp_path / place / "images", {"train/a": 3, "test/a": 1})
    changed = tmp_path / "dogs/images/train/a/1.png"
    Image.open(changed).rotate(90).save(changed)
    cats = identity(tmp_path / "cats/images")
    assert re.fullmatch(r"images \(folder\), checksum [0-9a-f]{8}", cats)
    assert identity(tmp_path / "copy/images") == cats
    assert identity(tmp_path / "dogs/images") != cats
    write_images(tmp_path / "copy/images", {"test/b": 2})  # what is tested on may differ
    assert identity(tmp_path / "copy/images") == cats
    assert loading.load_data("photos", tmp_path, 1, 0, 0, 0, "cpu").identity == "scikit-image photographs"


def test_a_name_that_is_no_text_can_be_shown(nb, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_images(folder, {"train/a": 3, "test/a": 1})
    assert loading.load_data("folder", folder, 1, 0, 0, 0, "cpu").name == r"caf\udce9 (folder)"


@pytest.mark.parametrize("suffix", [".avif", ".gif", ".jp2", ".tga", ".qoi", ".JPG", ".jfif", ".pcx"])
def test_whatever_pillow_reads_is_read(tmp_path, suffix):
    write_images(tmp_path, {"train/a": 1, "test/a": 1})
    try:
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"train/a/1{suffix}")
    except (KeyError, OSError, ValueError):
        pytest.skip(f"Pillow does not write {suffix} here")
    assert (loading.load_folder(tmp_path)[1][1].float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 4


def test_folders_come_in_the_order_of_torchvision(tmp_path):
    write_images(
        tmp_path, {"train/b": 2, "train/a-b": 2, "train/a/c/d": 12, "train/a/c-d": 2, "train/a": 1, "train/e/f": 1}
    )
    expected = [path for path, _ in loading.torchvision.datasets.ImageFolder(tmp_path / "train").samples]
    assert loading.image_files(tmp_path / "train") == (expected, {})


def test_links_are_followed_but_not_round_and_round(tmp_path, capsys):
    write_images(tmp_path, {"elsewhere/c": 2, "train/a": 1, "train/b": 1, "test/a": 1})
    (tmp_path / "train/c").symlink_to(tmp_path / "elsewhere/c")
    (tmp_path / "train/a/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/a/here").symlink_to(".")
    (tmp_path / "train/b/a").symlink_to("../d")
    (tmp_path / "train/d").mkdir()
    (tmp_path / "train/d/b").symlink_to("../b")
    paths, left_out = loading.image_files(tmp_path / "train")
    names = sorted(str(path).removeprefix(f"{tmp_path}/train/") for path in paths)
    assert names == ["a/0.png", "b/0.png", "c/0.png", "c/1.png", "d/b/0.png"]
    assert left_out == {"links to a folder around them": 4}


@pytest.mark.parametrize("target", ["nowhere.png", "1.png"])
def test_a_broken_link_is_named(tmp_path, target):
    write_images(tmp_path, {"train/a": 1, "test/a": 1})
    (tmp_path / "train/a/1.png").symlink_to(target)
    with pytest.raises(ValueError, match=rf"{tmp_path}/train/a/1.png is a broken link or no file: mend or remove it"):
        loading.load_folder(tmp_path)


def test_images_beside_the_class_folders_are_told_where_there_are_no_others(tmp_path):
    write_images(tmp_path, {"train": 3, "test/a": 1})
    with pytest.raises(FileNotFoundError, match=r"train holds no such images \(3 outside the class folders\)"):
        loading.load_folder(tmp_path)


@pytest.mark.parametrize("kind", ["bomb", "text", "empty", "float"])
def test_every_image_that_cannot_be_read_is_named(tmp_path, kind):
    write_images(tmp_path, {"train/a": 2, "test/a": 1})
    bad = tmp_path / "train/a/1.png"
    content = {
        "bomb": png(20_000, 20_000, 8, 2, [b""]),
        "text": png(1, 1, 8, 2, [bytes(3)], zTXt=b"k\0\0" + zlib.compress(bytes(2_000_000))),
        "empty": b"",
    }
    if kind == "float":
        Image.fromarray(np.zeros((32, 32), np.float32)).save(bad := tmp_path / "train/a/1.tif")
    else:
        bad.write_bytes(content[kind])
    with pytest.raises(ValueError, match=rf"{bad} cannot be read as an image"):
        loading.load_folder(tmp_path)


def test_a_home_folder_is_found(nb, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_images(tmp_path / "mine", {"train/a": 3, "test/a": 1})
    assert nb.load_data("folder", "~/mine", 1, 0, 0, 0, "cpu").name == "mine (folder)"
    assert loading.load_folder("~/mine")[0] == "mine (folder)"


def test_auto_takes_own_images_and_says_so(nb, fake_cifar10, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loading, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    write_images(tmp_path, {"train/a": 3, "test/a": 1, "cifar-10-batches-py": 0})
    assert nb.load_data("auto", str(tmp_path), 1, 0, 0, 0, "cpu").name == f"{tmp_path.name} (folder)"
    assert f"DATASET = 'auto' takes train/ and test/ of {tmp_path}" in capsys.readouterr().out
    assert nb.load_data("cifar10", str(tmp_path), 1, 0, 0, 0, "cpu").name == "CIFAR-10"


@pytest.mark.parametrize("split", ["train", "test"])
def test_auto_says_that_half_of_ones_own_is_not_enough(nb, fake_cifar10, tmp_path, capsys, split):
    write_images(tmp_path, {f"{split}/a": 3, "cifar-10-batches-py": 0})
    assert nb.load_data("auto", str(tmp_path), 1, 0, 0, 0, "cpu").name == "CIFAR-10"
    told = capsys.readouterr().out
    assert told.startswith(f"WARNING: {tmp_path / split} holds images, but {tmp_path}")
    assert "DATASET = 'auto' takes none of them" in told

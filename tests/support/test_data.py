"""Data: folders, photographs and CIFAR-10, on disk or out of reach, and the images held out."""

import gzip
import http.client
import http.server
import socket
import tarfile
import threading
import time
import zlib

import numpy as np
import pytest
import torch
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


def test_images_of_other_sizes_and_modes_are_fitted_and_told(nb, tmp_path, capsys):
    write_images(tmp_path, {"train/a": 2}, size=(50, 40), mode="L")
    write_images(tmp_path, {"test/a": 1}, size=(20, 64), mode="RGBA")
    _, train, test = loading.load_folder(tmp_path)
    assert (train.shape, test.shape) == ((2, 3, 32, 32), (1, 3, 32, 32))
    assert "3 of other sizes were cropped" in capsys.readouterr().out


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
    assert len(train) > 1700
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
    together = torch.cat([a.train, a.held_out])
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, original.contiguous().numpy()))
    assert torch.equal(a.held_out, b.held_out)
    assert torch.equal(a.train[:50], b.train)
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

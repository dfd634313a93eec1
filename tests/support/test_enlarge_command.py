"""The command that enlarges a picture: what it writes and where, and what it refuses in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_ginr import enlarge, enlarge_command
from mamba_ginr.checkpoints import save_model
from mamba_ginr.images import open_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, tiny):
    """An image and weights; what a command leaves beside them is its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "my photo.bmp")
    model = tiny()
    for weights in (model.head.to_rgb.weight, model.head.to_rgb.bias):  # an untrained head adds nothing
        torch.nn.init.normal_(weights, std=0.1)
    save_model(tmp_path / "weights.pth", model, {}, {})
    return tmp_path


def run(folder, *arguments) -> int:
    return enlarge_command.main([str(folder / "my photo.bmp"), "--weights", str(folder / "weights.pth"), *arguments])


def new_files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"my photo.bmp", "weights.pth"}


def error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.split("\n") if line and "\r" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_the_result_lies_beside_the_image_and_is_that_of_super_resolve(folder, nb, capsys):
    before = (folder / "my photo.bmp").read_bytes()
    assert run(folder, "--scale", "2.5") == 0
    assert new_files(folder) == {"my photo_x2.5.png"}
    assert (folder / "my photo.bmp").read_bytes() == before
    model, _ = nb.load_model(folder / "weights.pth")
    expected = enlarge.super_resolve(model, folder / "my photo.bmp", 2.5)
    assert open_image(folder / "my photo_x2.5.png") == expected
    assert f"{folder / 'my photo_x2.5.png'}: 28×18 pixels" in capsys.readouterr().out


def test_four_times_by_default_to_any_name_and_format(folder):
    (folder / "there").mkdir()
    assert run(folder, "--output", str(folder / "there/larger.jpg")) == 0
    image = Image.open(folder / "there/larger.jpg")
    assert (image.format, image.size) == ("JPEG", (44, 28))
    assert new_files(folder) == {"there"}


def test_the_comparison_has_three_pictures_side_by_side(folder):
    assert run(folder, "--compare") == 0
    assert new_files(folder) == {"my photo_x4.png", "my photo_x4_compare.png"}
    source, result = (open_image(folder / name) for name in ("my photo.bmp", "my photo_x4.png"))
    sheet = open_image(folder / "my photo_x4_compare.png")
    assert sheet.size == (3 * 44 + 2 * 4, 16 + 28)
    columns = [sheet.crop((left, 16, left + 44, 44)) for left in (0, 48, 96)]
    methods = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
    assert columns == [*(source.resize((44, 28), method) for method in methods), result]
    assert all(np.asarray(sheet.crop((left, 0, left + 44, 16))).min() < 128 for left in (0, 48, 96))  # labels


@pytest.mark.parametrize("there", ["my photo_x4.png", "my photo_x4_compare.png"])
def test_nothing_is_overwritten_unless_forced(folder, there, capsys):
    (folder / there).write_bytes(b"precious")
    assert run(folder, "--compare") == 1
    assert f"{there} is there already" in error_line(capsys)
    assert new_files(folder) == {there}
    assert (folder / there).read_bytes() == b"precious"
    assert run(folder, "--compare", "--force") == 0
    assert Image.open(folder / there).format == "PNG"


def test_the_image_itself_is_never_the_output(folder, capsys):
    assert run(folder, "--force", "--output", str(folder / "my photo.bmp")) == 1
    assert "is the image itself" in error_line(capsys)
    assert new_files(folder) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "0.5"], "scale 0.5 of 11×7 pixels: at least 1, and at most 4096 a side"),
        (["--scale", "nan"], "scale nan"),
        (["--scale", "400"], "at most 4096 a side"),
        (["--weights", "none.pth"], "none.pth does not exist: train first"),
        (["--weights", __file__], "is not a whole checkpoint"),
        (["--output", "x.xyz"], "x.xyz: Pillow writes no .xyz, or not for any size and all colours. Take .png."),
        (["--output", "x.ico"], "x.ico: Pillow writes no .ico, or not for any size and all colours. Take .png."),
        (["--output", "x.gif"], "x.gif: Pillow writes no .gif, or not for any size and all colours. Take .png."),
        (["--output", "x.xbm"], "x.xbm: Pillow writes no .xbm, or not for any size and all colours. Take .png."),
        (["--output", "larger"], "larger: Pillow writes no file without a suffix"),
        (["--output", "no/such/x.png"], "no/such cannot be written to (No such file or directory)"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_1(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(folder, *arguments) == 1
    assert message in error_line(capsys)
    assert new_files(folder) == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "the file is empty"), (b"no image", "x.png cannot be read as an image")],
)
def test_bad_images_are_one_line_and_status_1(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    assert enlarge_command.main([str(tmp_path / "x.png")]) == 1
    assert message in error_line(capsys)
    assert len(list(tmp_path.iterdir())) == (content is not None)


def test_without_the_notebook_it_says_what_to_do(folder, capsys, monkeypatch):
    monkeypatch.setattr(enlarge_command.model_cells, "__defaults__", (folder / "mamba_ginr_cifar10.ipynb",))
    assert run(folder) == 1
    assert "download the whole repository and run this in its folder" in error_line(capsys)


@pytest.mark.parametrize("line", ["%load_ext autoreload", "raise KeyError('x')", "undefined_name"])
def test_a_cell_that_fails_is_named(folder, line, capsys, monkeypatch):
    cells = [{"cell_type": "code", "source": [source]} for source in ("import os", f"# Cell 2\n{line}")]
    notebook = folder / "edited.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(enlarge_command.model_cells, "__defaults__", (notebook,))
    assert run(folder) == 1
    assert error_line(capsys).startswith("Cell 2 of edited.ipynb fails (")


@pytest.mark.parametrize("when", ["windows", "write"])
def test_an_interrupt_leaves_nothing_half_written(folder, when, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if when == "windows":
        monkeypatch.setattr(enlarge, "tqdm", interrupt)
    else:
        monkeypatch.setattr(os, "replace", interrupt)
    assert run(folder) == 130
    assert error_line(capsys) == "Interrupted: nothing was written."
    assert new_files(folder) == set()


def test_ctrl_c_ends_the_command_itself(folder):
    command = [sys.executable, "-m", "mamba_ginr.enlarge", str(folder / "large.png"), "--weights", "weights.pth"]
    Image.new("RGB", (400, 400)).save(folder / "large.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        assert "400×400 pixels, ×4" in process.stdout.readline()
        time.sleep(0.5)  # some windows are done, most are not
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("\nInterrupted: nothing was written.\n")
    assert "Traceback" not in errors
    assert new_files(folder) == {"large.png"}


def test_make_says_how_to_call_it():
    process = subprocess.run(["make", "-s", "enlarge"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode
    assert process.stdout == "Which image? make enlarge IMAGE=photo.jpg (SCALE=4 COMPARE=1 FORCE=1)\n"

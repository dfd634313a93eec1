"""The cells run as a program, with settings from the environment."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import notebook_cells
from stand_ins import write_images

from mamba_ginr import checkpoints


def test_the_program_refuses_a_wrong_setting_in_any_terminal(run_script, monkeypatch):
    """Cells 1 to 9 print before, also where the encoding has no × and no −."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = run_script(EPOCH=3)
    assert process.returncode == 1
    assert "MAMBA_GINR_EPOCH is not a setting of this notebook" in process.stderr
    assert "UnicodeEncodeError" not in process.stderr
    assert "Pixel grid: (1024, 2) ? its Fourier features: (1024, 64)" in process.stdout
    assert "A batch: images (40, 3, 32, 32), mosaics (24, 3, 32, 32)" in process.stdout


def test_without_training_the_pretrained_weights_are_shown(nb, tiny, run_script, tmp_path):
    write_images(tmp_path / "mine", {"train/a": 20, "test/a": 8})
    settings = {"SMALL": 1, "TRAIN": 0, "DATASET": "folder", "DATA_DIR": "mine", "HELD_OUT": 4, "PRETRAINED": "its.pth"}
    process = run_script(**settings)
    assert process.returncode == 1
    assert "its.pth does not exist" in process.stderr
    checkpoints.save_model(tmp_path / "its.pth", tiny(image_size=32, patch_size=8), {}, {"epoch": 7})
    process = run_script(**settings)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "runs/pretrained/figures/results.json").read_text())
    assert (results["best_epoch"], results["test_images"]) == (7, 8)
    assert "epochs" not in results
    assert "weights of its.pth" in process.stdout.strip().split("\n")[-1]
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "its.pth", "runs"}
    assert not (tmp_path / "runs/pretrained/checkpoints").exists()


@pytest.mark.parametrize("decoder", ["lainr", "hybrid"])
def test_results_name_their_data_and_decoder(nb, tiny, run_script, decoder, tmp_path):
    """And the committed weights, where they are, stand beside those of a small run."""
    write_images(tmp_path / "my photos", {"train/a": 20, "test/a": 8})
    committed, path = tiny(image_size=32, patch_size=8), tmp_path / "checkpoints/mamba_ginr_best.pth"
    checkpoints.save_model(path, committed, {}, {"epoch": 7})
    if decoder == "hybrid":  # here they do not fit, and the run ends as without
        path.write_bytes(path.read_bytes()[:1000])
    small = {"DIM": 8, "DEPTH": 1, "DECODER_DIM": 16, "BATCH_SIZE": 4, "EPOCHS": 2, "HELD_OUT": 4, "D_STATE": 2}
    small |= {"DECODER": decoder, "SR_FRACTION": 0.25, "HARD_FRACTION": 0.25, "MAX_PHOTOGRAPHS": 1, "HEAD_BLOCKS": 1}
    process = run_script(SMALL=1, DATASET="folder", DATA_DIR="my photos", **small)
    assert process.returncode == 0, process.stderr
    suffix = "" if decoder == "lainr" else "_hybrid"
    written = {p.name for p in (tmp_path / "runs/small").rglob("*") if p.is_file()}
    assert written == {
        *(f"mamba_ginr{suffix}_{name}.pth" for name in ("best", "state")),
        *(f"{name}{suffix}.png" for name in ("mamba_ginr_super_resolution", "psnr_curves", "reconstructions")),
        f"results{suffix}.json",
    }
    results = json.loads((tmp_path / f"runs/small/figures/results{suffix}.json").read_text())
    assert results["decoder"] == decoder
    assert set(results["enlargement"]) == {"my photos (folder) ×2", *(f"photographs ×{k}" for k in (2, 4, 8))}
    assert results["dataset"] == "my photos (folder)"
    assert results["train_images"] == 16
    assert ("committed_weights" in results) == (decoder == "lainr")
    assert ("Only the small run is shown: " in process.stdout) == (decoder == "hybrid")
    if decoder == "lainr":
        beside = results["committed_weights"]
        test = nb.load_data("folder", str(tmp_path / "my photos"), 4, 0, 0, 0, "cpu").test
        assert beside["psnr_mean"] == pytest.approx(nb.evaluate(committed, test, 8)["psnr_mean"], abs=1e-3)
        assert beside["enlargement"].keys() == results["enlargement"].keys()
        assert beside["enlargement"]["photographs ×2"]["bicubic"] == results["enlargement"]["photographs ×2"]["bicubic"]
        assert beside["psnr_mean"] != results["psnr_mean"]
        assert f"test images       8 {beside['psnr_mean']:.2f} dB" in process.stdout
        assert process.stdout.count("  committed weights  ") == len(results["enlargement"])
    last = process.stdout.strip().split("\n")[-1]
    assert re.match(r"my photos \(folder\): 0\.\d M parameters, 2 epochs of 16 images", last), last


def test_the_notebook_alone_says_what_it_needs(script, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    (tmp_path / "alone.py").write_bytes(script.read_bytes())
    command = [sys.executable, "alone.py"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert "The folder mamba_ginr/ lies beside this notebook in its repository and is not here." in process.stderr


def test_an_empty_folder_of_that_name_is_not_the_package(script, tmp_path):
    """Such as git and pip leave with old bytecode in it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    (tmp_path / "alone.py").write_bytes(script.read_bytes())
    (tmp_path / "mamba_ginr/__pycache__").mkdir(parents=True)
    command = [sys.executable, "alone.py"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert "Download the whole repository and open the notebook there" in process.stderr


def test_a_package_that_is_missing_is_named_as_pip_knows_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"^Not installed: scikit-image\. Run: pip install scikit-image$"):
        exec(notebook_cells("code")[0]["source"], {"__name__": "alone"})

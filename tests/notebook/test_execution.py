"""run_notebook.py, in a copy of what it needs: a small run works headless, and a failing cell ends it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import NOTEBOOK, ROOT
from notebook_checks import RESULTS, check_outputs, without_farewell

FILES = (
    *(NOTEBOOK.name, "run_notebook.py"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "mamba_ginr").rglob("*.py"))),
)


@pytest.fixture
def copy(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def execute(folder, **settings):
    environment = {**os.environ, **{f"MAMBA_GINR_{k}": str(v) for k, v in settings.items()}}
    command = [sys.executable, "run_notebook.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_the_whole_notebook_runs_headless_in_its_small_form(copy):
    process = execute(
        copy, SMALL=1, DATASET="photos", EPOCHS=2, MAX_TRAIN_IMAGES=40, MAX_TEST_IMAGES=32, MAX_PHOTOGRAPHS=2
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    executed = copy / "runs" / NOTEBOOK.name
    check_outputs(executed)

    written = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    figures = ("mamba_ginr_super_resolution.png", "psnr_curves.png", "reconstructions.png", "results.json")
    assert written == {
        *(*FILES, f"runs/{NOTEBOOK.name}"),
        *(f"runs/small/figures/{name}" for name in figures),
        *(f"runs/small/checkpoints/mamba_ginr_{name}.pth" for name in ("best", "state")),
    }
    assert (copy / NOTEBOOK.name).read_bytes() == NOTEBOOK.read_bytes()

    results = json.loads((copy / "runs/small/figures/results.json").read_text())
    assert results.keys() >= RESULTS
    assert (results["dataset"], results["train_images"]) == ("scikit-image photographs", 40)
    assert (results["epochs"], results["steps"]) == (2, 8)
    assert results["psnr_worst"] < results["psnr_mean"] < 30
    assert results["others"]["patterns"]["images"] == 64
    assert "SMALL: a reduced model" in process.stdout
    assert "Selective scan: torch (the kernels of Triton and mamba-ssm need a GPU)" in process.stdout
    assert process.stdout.count("── Cell") == 13
    last = process.stdout.strip().split("\n")[-1]
    assert last.startswith("scikit-image photographs: 0.6 M parameters, 2 epochs of 40 images: ")
    assert last.endswith(f"{results['psnr_mean']:.2f} dB mean PSNR on 32 test images. Figures: runs/small/figures")


def test_a_failing_cell_ends_the_run_with_its_message(copy):
    process = execute(copy, DATASET="folder", DATA_DIR="nowhere")
    assert process.returncode == 1
    assert "FileNotFoundError: DATASET = 'folder' reads DATA_DIR/train/<class>/*" in process.stderr
    assert "Traceback" not in without_farewell(process.stderr)

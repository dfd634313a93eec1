"""The notebook as a document: the committed copy is whole and clean, and a small run of it works headless."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT, notebook_cells

TITLES = [
    "Imports", "Helper functions", "BiMamba", "MambaEncoder", "Learnable position tokens", "LAINR decoder", "MambaGINR",
    "Training functions", "Data loading", "Hyperparameters and model", "Training loop", "Super-resolution test",
    "Final analysis",
]  # fmt: skip
RESULTS = {
    "dataset", "train_images", "device", "epochs", "steps", "parameters", "psnr_mean", "psnr_of_mean_mse", "psnr_worst",
    "bit_exact_share", "ms_per_step", "images_per_s", "peak_memory_gib", "minutes",
}  # fmt: skip


def check_outputs(path):
    """Executed once from top to bottom, with nothing in the outputs that a reader should not see."""
    cells = notebook_cells("code", path)
    assert [c["source"].split("\n")[0] for c in cells] == [f"# Cell {i}: {t}" for i, t in enumerate(TITLES, 1)]
    assert [c["execution_count"] for c in cells] == list(range(1, 14))
    outputs = [(i, o) for i, c in enumerate(cells, 1) for o in c["outputs"]]
    assert [i for i, o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    assert [i for i, o in outputs if any("widget" in kind for kind in o.get("data", {}))] == []
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    text = json.dumps([{k: v for k, v in o.items() if k != "data"} for _, o in outputs])
    assert not re.search(r"warning: |Traceback|(?<![\w.])/(home|root|tmp|work|opt|usr|mnt)/", text)
    pictures = [(i, kind) for i, o in outputs for kind in o.get("data", {}) if kind.startswith("image/")]
    assert [i for i, _ in pictures] == [11, 12, 13]
    assert path.stat().st_size < 1_000_000


def test_the_committed_notebook_is_one_clean_run_of_the_full_model():
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    check_outputs(NOTEBOOK)
    results = json.loads((ROOT / "figures/results.json").read_text())
    assert results.keys() >= RESULTS
    assert results["dataset"].startswith("CIFAR-10")
    assert (results["train_images"], results["test_images"]) == (49_000, 10_000)
    summary = "".join(notebook_cells("code")[12]["outputs"][-1]["text"])
    assert f"{results['psnr_mean']:.2f} dB mean PSNR on 10,000 test images" in summary
    log = "".join(t for o in notebook_cells("code")[10]["outputs"] for t in o.get("text", ()))
    assert len(re.findall(r"^ *\d+ ", log, re.MULTILINE)) == results["epochs"]


def test_every_code_cell_has_prose_before_it_and_no_magics():
    kinds = [c["cell_type"] for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]]
    assert kinds == ["markdown"] + ["markdown", "code"] * 13 + ["markdown"]
    for cell in notebook_cells("code"):
        assert not re.search(r"^\s*[%!]", cell["source"], re.MULTILINE)


def test_the_readme_and_the_notebook_quote_the_results():
    readme, results = (ROOT / "README.md").read_text(), json.loads((ROOT / "figures/results.json").read_text())
    reading = notebook_cells("markdown")[-1]["source"]
    for text in ("{psnr_mean:.2f} dB,", "stands at {psnr_worst:.2f} dB", "{bit_exact_share:.0%} of the images"):
        assert text.format(**results) in reading.replace(" %", "%"), text
    for name, digits in [
        ("psnr_mean", 2),
        ("psnr_of_mean_mse", 2),
        ("psnr_worst", 2),
        ("ms_per_step", 1),
        ("minutes", 1),
    ]:
        assert f"{results[name]:.{digits}f}" in readme, name
    for picture in re.findall(r"\]\((figures/[^)]+)\)", readme):
        assert (ROOT / picture).exists(), picture


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
        copy, SMALL=1, DATASET="photos", EPOCHS=2, MAX_TRAIN_IMAGES=160, MAX_TEST_IMAGES=32, MAX_PHOTOGRAPHS=2
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
    assert (results["dataset"], results["train_images"]) == ("scikit-image photographs", 160)
    assert (results["epochs"], results["steps"]) == (2, 10)
    assert results["psnr_worst"] < results["psnr_mean"] < 30
    assert results["others"]["patterns"]["images"] == 64
    assert "SMALL: a reduced model" in process.stdout
    assert "Selective scan: torch (the kernels of Triton and mamba-ssm need a GPU)" in process.stdout
    assert process.stdout.count("── Cell") == 13
    last = process.stdout.strip().split("\n")[-1]
    assert last.startswith("scikit-image photographs: 0.4 M parameters, 2 epochs of 160 images: ")
    assert last.endswith(f"{results['psnr_mean']:.2f} dB mean PSNR on 32 test images. Figures: runs/small/figures")


def test_a_failing_cell_ends_the_run_with_its_message(copy):
    process = execute(copy, DATASET="folder", DATA_DIR="nowhere")
    assert process.returncode == 1
    assert "FileNotFoundError: DATASET = 'folder' reads DATA_DIR/train/<class>/*" in process.stderr
    assert "Traceback" not in process.stderr

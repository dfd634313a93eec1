"""The committed notebook and the README: one clean run, prose before each cell, the results quoted."""

import json
import re

import nbformat
import pytest
from conftest import NOTEBOOK, ROOT, notebook_cells
from notebook_checks import RESULTS, check_outputs


def committed_results() -> dict:
    return json.loads((ROOT / "figures/results.json").read_text())


def test_the_committed_notebook_is_one_clean_run_of_the_full_model():
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    check_outputs(NOTEBOOK)
    results = committed_results()
    assert results.keys() >= RESULTS
    assert results["dataset"].startswith("CIFAR-10")
    assert (results["train_images"], results["test_images"]) == (49_000, 10_000)
    summary = "".join(notebook_cells("code")[12]["outputs"][-1]["text"])
    assert f"{results['psnr_mean']:.2f} dB mean PSNR on 10,000 test images" in summary
    log = "".join(t for o in notebook_cells("code")[10]["outputs"] for t in o.get("text", ()))
    assert len(re.findall(r"^ *\d+ ", log, re.MULTILINE)) == results["epochs"]
    about = results["refined"]
    line = f"Decoder refined in {about['steps']} steps, held out in float32: "
    assert line + f"{about['held_out_before']:.2f} → {about['held_out']:.2f} dB\n" in log


def test_the_committed_weights_are_those_of_this_run(nb):
    checkpoint = nb.load_model(ROOT / "checkpoints/mamba_ginr_best.pth")[1]
    results = committed_results()
    assert checkpoint["config"] == nb.MambaGINR().config
    assert checkpoint["refined"] == results["refined"]
    assert checkpoint["metrics"]["epoch"] == results["best_epoch"]
    assert checkpoint["metrics"]["minutes"] == pytest.approx(results["minutes"], abs=0.01)


def test_every_code_cell_has_prose_before_it_and_no_magics():
    kinds = [c["cell_type"] for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]]
    assert kinds == ["markdown"] + ["markdown", "code"] * 13 + ["markdown"]
    for cell in notebook_cells("code"):
        assert not re.search(r"^\s*[%!]", cell["source"], re.MULTILINE)


def test_the_readme_and_the_notebook_quote_the_results():
    readme, results = (ROOT / "README.md").read_text(), committed_results()
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
    tables = (ROOT / "docs/RESULTS.md").read_text()
    for enlarged, scores in results["enlargement"].items():
        name = enlarged.replace("CIFAR-10 (folder)", "CIFAR-10 test set")
        row = [scores[key] for key in ("nearest", "bicubic", "lanczos")]
        row = " | ".join(f"{psnr:.2f}" for psnr in row) + f" | **{scores['model']:.2f}** | {scores['consistency']:.1f}"
        assert f"| {name} | {row} |" in tables
        if "CIFAR-10" in enlarged:
            assert f"+{scores['model'] - scores['bicubic']:.2f} dB" in readme
    for picture in re.findall(r"\]\((figures/[^)]+)\)", readme):
        assert (ROOT / picture).exists(), picture

"""The committed notebook and the README: one clean run, prose before each cell, the results quoted."""

import json
import re

import nbformat
from conftest import NOTEBOOK, ROOT, notebook_cells
from notebook_checks import RESULTS, check_outputs


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

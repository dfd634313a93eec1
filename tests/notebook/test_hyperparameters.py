"""Cell 10: run again it has the same settings, and counts of zero are named."""

import pytest
from conftest import notebook_cells


def test_cell_10_run_again_has_the_same_settings(nb):
    """Constants of other cells join them neither before nor after; a setting added to the cell does."""
    cell = notebook_cells("code")[9]["source"]
    names = {**vars(nb), "__name__": "again", "MY_NUMBER": 3, "LOG_HEADER": "epoch"}
    exec(cell, names)
    assert names["settings"] == nb.settings
    changed = cell.replace("\nSEED = 0", "\nSEED = 5\nMY_RATE = 0.5")
    exec(changed, names)
    assert names["settings"] == {**nb.settings, "SEED": 5, "MY_RATE": 0.5}
    exec(changed, names)
    assert names["settings"] == {**nb.settings, "SEED": 5, "MY_RATE": 0.5}


@pytest.mark.parametrize("name", ["EPOCHS", "EVAL_BATCH", "QUERY_CHUNK"])
def test_counts_of_zero_are_named_before_anything_begins(nb, monkeypatch, name):
    monkeypatch.setenv(f"MAMBA_GINR_{name}", "0")
    with pytest.raises(ValueError, match=f"{name} = 0: at least 1"):
        exec(notebook_cells("code")[9]["source"], {**vars(nb), "__name__": "again"})


def test_an_output_folder_that_cannot_be_is_told_before_anything_is_loaded(nb, monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for name, value in {
        "SMALL": 1,
        "DATASET": "folder",
        "DATA_DIR": "nowhere",
        "OUTPUT_DIR": tmp_path / "taken",
    }.items():
        monkeypatch.setenv(f"MAMBA_GINR_{name}", str(value))
    with pytest.raises(ValueError, match=r"OUTPUT_DIR = '.*taken': .* cannot be written to \(Not a directory\)"):
        exec(notebook_cells("code")[9]["source"], {**vars(nb), "__name__": "__main__"})

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


@pytest.mark.parametrize(
    ("choice", "position_scale", "refine_steps"),
    [
        ({}, 8, 150),
        ({"DECODER": "gaussian"}, 1, 150),
        ({"DECODER": "scent"}, 1, 150),
        ({"DECODER": "hybrid"}, 1, 150),
        ({"OPTIMIZER": "adamw"}, 1, 150),
        ({"SMALL": "1"}, 1, 0),
    ],
)
def test_only_what_was_measured_with_it_starts_with_a_larger_positional_encoding(
    nb, monkeypatch, choice, position_scale, refine_steps
):
    for name, value in {"SMALL": "0", **choice}.items():
        monkeypatch.setenv(f"MAMBA_GINR_{name}", value)
    names = {**vars(nb), "__name__": "again"}
    exec(notebook_cells("code")[9]["source"], names)
    assert names["model_config"]["position_scale"] == names["settings"]["POSITION_SCALE"] == position_scale
    assert names["settings"]["REFINE_STEPS"] == refine_steps
    if not choice:
        assert nb.MambaGINR(**names["model_config"]).config == nb.MambaGINR().config


@pytest.fixture
def run_cell_10(nb, monkeypatch, tmp_path):
    """Run the cell in an empty folder, with settings from outside."""
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"MAMBA_GINR_{name}", str(value))
        exec(notebook_cells("code")[9]["source"], {**vars(nb), "__name__": "__main__"})

    return run


@pytest.mark.parametrize("settings", [{"SMALL": 1}, {"SMALL": 0, "TRAIN": 0}], ids=["small", "pretrained"])
def test_only_a_full_run_writes_beside_the_notebook(run_cell_10, settings, tmp_path):
    with pytest.raises(ValueError, match="set OUTPUT_DIR to another folder"):
        run_cell_10(**settings, OUTPUT_DIR=".")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_decoder_is_named(run_cell_10):
    with pytest.raises(ValueError, match="DECODER = 'residual': choose one of lainr, gaussian, scent, hybrid"):
        run_cell_10(DECODER="residual")


def test_an_output_folder_that_cannot_be_is_told_before_anything_is_loaded(run_cell_10, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"OUTPUT_DIR = 'taken/out': .* cannot be written to \(Not a directory\)"):
        run_cell_10(SMALL=1, DATASET="folder", DATA_DIR="nowhere", OUTPUT_DIR="taken/out")

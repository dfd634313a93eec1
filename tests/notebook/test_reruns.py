"""Cells run again, in any order that a newcomer may try, in one namespace as Jupyter's."""

import json

import pytest
from conftest import notebook_cells

from mamba_ginr import progress

TINY = {
    "SMALL": 1, "DATASET": "photos", "DIM": 8, "DEPTH": 1, "D_STATE": 2, "DECODER_DIM": 16, "HEAD_BLOCKS": 1,
    "BATCH_SIZE": 4, "EPOCHS": 2, "HELD_OUT": 4, "SR_QUERIES": 16, "MAX_TRAIN_IMAGES": 16, "MAX_TEST_IMAGES": 8,
    "MAX_PHOTOGRAPHS": 1,
}  # fmt: skip


class Kernel:
    """Runs cells by their numbers."""

    def __init__(self):
        self.names = {"__name__": "__main__"}
        self.cells = {i: cell["source"] for i, cell in enumerate(notebook_cells("code"), 1)}

    def run(self, *numbers, edit=lambda source: source):
        for number in numbers:
            exec(compile(edit(self.cells[number]), f"cell {number}", "exec"), self.names)

    def results(self):
        return (
            dict(self.names["settings"]),
            list(self.names["run"].history),
            json.loads((self.names["output"] / "figures/results.json").read_text()),
        )


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in TINY.items():
        monkeypatch.setenv(f"MAMBA_GINR_{name}", str(value))
    return Kernel()


def test_any_cell_run_again_gives_the_same(kernel, monkeypatch):
    kernel.run(*range(1, 14))
    first = kernel.results()
    monkeypatch.setattr(progress, "show", lambda *_: None)  # drawing the curves takes most of the time
    for number in range(1, 11):  # each alone, and the run read back
        kernel.run(number, 11)
        assert kernel.results()[:2] == first[:2], number
    kernel.run(12, 13, 13)
    assert kernel.results() == first
    kernel.run(*range(1, 14))  # and all of them
    assert kernel.results() == first


def test_a_finished_run_is_refined_when_its_cells_are_run_again(kernel, monkeypatch, capsys):
    kernel.run(*range(1, 14))
    unrefined = kernel.results()[2]
    assert unrefined["refined"] is None
    kernel.names["REFINE_STEPS"] = 3
    with pytest.raises(ValueError, match=r"set after cell 10, where it has no effect: REFINE_STEPS = 3 \(not 0\)"):
        kernel.run(11)
    monkeypatch.setenv("MAMBA_GINR_REFINE_STEPS", "3")
    monkeypatch.setenv("MAMBA_GINR_REFINE_RATE", "1e-4")
    kernel.run(*range(1, 14))
    refined = kernel.results()[2]
    assert refined["refined"]["steps"] == 3
    assert refined["refined"]["held_out"] > refined["refined"]["held_out_before"]
    assert refined["psnr_mean"] != unrefined["psnr_mean"]
    for same in ("minutes", "peak_memory_gib", "best_epoch", "epochs"):
        assert refined[same] == unrefined[same]
    capsys.readouterr()
    kernel.run(10, 11)
    assert "The decoder was refined before: 3 steps, rate 0.0001.\n" in capsys.readouterr().out


def test_names_of_ones_own_join_no_settings(kernel):
    kernel.run(*range(1, 11))
    settings = dict(kernel.names["settings"])
    kernel.names |= {"MY_NUMBER": 3, "N": 7, "MY_PATH": "x"}  # a cell between
    kernel.run(10)
    assert kernel.names["settings"] == settings


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_cell_10_mended_after_an_error_has_all_its_settings(kernel, before):
    kernel.run(*range(1, 11) if before else range(1, 10))
    expected = {**kernel.names.get("settings", {}), "MY_RATE": 0.5}

    def new(source):
        return source.replace("\nSEED = 0", "\nSEED = 0\nMY_RATE = 0.5")

    for _ in range(2):
        with pytest.raises(ValueError, match="DECODER = 'mlp': choose one of"):
            kernel.run(10, edit=lambda source: new(source).replace('DECODER = "lainr"', 'DECODER = "mlp"'))
    with pytest.raises(NameError, match="lainr"):
        kernel.run(10, edit=lambda source: new(source).replace('DECODER = "lainr"', "DECODER = lainr"))
    kernel.run(10, edit=new)
    assert kernel.names["settings"].items() >= expected.items()
    assert kernel.names["settings"]["EPOCHS"] == 2
    if before:
        assert kernel.names["settings"] == expected


def test_cell_10_before_the_others_spoils_nothing(kernel):
    for early in ((), (1,)):
        kernel.run(*early)
        with pytest.raises(NameError, match="MambaGINR"):
            kernel.run(10)
    kernel.run(*range(1, 11))
    assert kernel.names["settings"]["EPOCHS"] == 2


def test_a_setting_changed_between_cells_10_and_11_is_named(kernel):
    kernel.run(*range(1, 11))
    kernel.names["EPOCHS"] = 3
    with pytest.raises(ValueError, match=r"no effect: EPOCHS = 3 \(not 2\)\. Set it in cell 10"):
        kernel.run(11)

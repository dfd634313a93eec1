"""Settings: from the environment, from a choice of others, and what a wrong one says."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import mamba_ginr.settings as settings_module

DEFAULTS = {"EPOCHS": 40, "LEARNING_RATE": 5e-4, "DATASET": "auto", "COMPILE": False}


def test_settings_come_from_the_environment(nb):
    environment = {
        "MAMBA_GINR_EPOCHS": "7",
        "MAMBA_GINR_LEARNING_RATE": "1e-3",
        "MAMBA_GINR_DATASET": "folder",
        "MAMBA_GINR_COMPILE": "true",
        "HOME": "/",
    }
    settings = settings_module.settings_from_environment(DEFAULTS, environment)
    assert settings == {"EPOCHS": 7, "LEARNING_RATE": 1e-3, "DATASET": "folder", "COMPILE": True}
    assert settings_module.settings_from_environment(DEFAULTS, {}) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EPOCH", "7", r"MAMBA_GINR_EPOCH is not a setting.*MAMBA_GINR_DATASET, MAMBA_GINR_EPOCHS, MAMBA_GINR_L"),
        ("EPOCHS", "ten", r"MAMBA_GINR_EPOCHS='ten': expected int of at least 0, such as 40"),
        ("EPOCHS", "7.5", "expected int"),
        ("EPOCHS", "-1", "at least 0"),
        ("LEARNING_RATE", "nan", "expected float"),
        ("LEARNING_RATE", "inf", "expected float"),
        ("COMPILE", "maybe", "expected 0, 1, false or true"),
    ],
)
def test_a_wrong_setting_says_what_is_valid(nb, name, value, message):
    with pytest.raises(ValueError, match=message):
        settings_module.settings_from_environment(DEFAULTS, {f"MAMBA_GINR_{name}": value})


def test_a_choice_changes_what_stands_above_and_the_environment_both(nb, capsys):
    column = {
        "EPOCHS": 40,
        "EVAL_BATCH": 8,
        "QUERY_CHUNK": 8,
        "DIM": 256,
        "RATE": 2e-3,
        "OPTIMIZER": "adamw",
        "SMALL": 1,
    }
    choices = {"OPTIMIZER": {"muon": {}, "adamw": {"RATE": 1e-3, "DIM": 128}}, "SMALL": {1: {"DIM": 64, "EPOCHS": 5}}}
    others = {"DECODERS": {}, "lower": 3}  # neither a table nor another name is a setting
    settings = nb.choose_settings({**column, **others}, choices, {"MAMBA_GINR_EPOCHS": "7"})
    assert settings == {**column, "DIM": 64, "RATE": 1e-3, "EPOCHS": 7}
    assert capsys.readouterr().out == (
        "OPTIMIZER = adamw sets RATE = 0.001 (not 0.002).\nSMALL = 1 sets DIM = 64 (not 256).\n"
    )  # what came to be, and in place of what: neither a value of no effect nor one that stands in the column anyway
    with pytest.raises(ValueError, match="OPTIMIZER = 'sgd': choose one of muon, adamw"):
        nb.choose_settings(column, choices, {"MAMBA_GINR_OPTIMIZER": "sgd"})


def test_a_path_is_taken_and_what_is_no_setting_is_named():
    column = {"EPOCHS": 1, "EVAL_BATCH": 8, "QUERY_CHUNK": 8, "OUTPUT_DIR": Path("runs/x")}
    column |= {"DIM": np.int64(64), "RATE": torch.tensor(0.5), "SMALL": True, "Lower": None, "F": torch.nn.functional}
    column |= {"T": torch.Tensor, "SHIFT": -1.0, "GRADIENT_CLIP": float("inf"), "PRECISION": torch.bfloat16}
    settings = settings_module.choose_settings(column, {"SMALL": {True: {"DIM": np.int64(8)}, False: {}}}, {})
    assert settings["OUTPUT_DIR"] == str(Path("runs/x"))
    assert [(v, type(v)) for v in (settings["DIM"], settings["RATE"])] == [(8, int), (0.5, float)]
    assert not {"F", "T"} & settings.keys()
    assert (settings["SHIFT"], settings["GRADIENT_CLIP"], settings["PRECISION"]) == (-1.0, float("inf"), "bfloat16")
    none = "a setting is a number, a text, True or False"
    for name, value, message in (
        ("EPOCHS", None, none),
        ("HEAD_DIM", [64, 32], none),
        ("HEAD_DIM", np.ones(2), none),
        ("EPOCHS", Path("1"), none),
        ("EPOCHS", "8", "at least 1, and a whole number"),
        ("EPOCHS", 8.0, "at least 1, and a whole number"),
        ("MAX_TRAIN_IMAGES", -1, "a number, at least 0"),
        ("REFINE_STEPS", 150.0, "a whole number, at least 0"),
        ("LEARNING_RATE", float("nan"), "a number, at least 0"),
        ("LEARNING_RATE", "1e-3", "a number, at least 0"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} = .*: {message}"):
            settings_module.choose_settings({**column, name: value}, {}, {})
        known = {"HEAD_DIM": 1, "MAX_TRAIN_IMAGES": 1, "LEARNING_RATE": 1.0, "REFINE_STEPS": 0, **column}
        with pytest.raises(ValueError, match=rf"^{name} = .*: {message}"):
            settings_module.choose_settings(known, {"SMALL": {True: {name: value}}}, {})
    with pytest.raises(ValueError, match="SMALL = True sets EPOCS, which is no setting of this notebook"):
        settings_module.choose_settings(column, {"SMALL": {True: {"EPOCS": 1}}}, {})


@pytest.mark.parametrize("blocked", ["out", "out/checkpoints", "out/figures"])
def test_an_output_folder_that_cannot_be_is_named_before_a_run(blocked, monkeypatch, tmp_path):
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file")
    settings = {"TRAIN": True, "SMALL": True, "OUTPUT_DIR": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"OUTPUT_DIR = '.*out': .* cannot be written to \(Not a directory\)"):
        settings_module.announce(settings, {}, torch.device("cpu"))
    (tmp_path / blocked).unlink()
    (tmp_path / blocked).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"cannot be written to \(No such file or directory\)"):
        settings_module.check_output(str(tmp_path / "out"))


def test_a_folder_without_permission_or_on_a_read_only_disk_is_named(monkeypatch, tmp_path):
    def refused(dir):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(
        ValueError, match=r"new/out cannot be written to \(Permission denied\).*Set OUTPUT_DIR to a fold"
    ):
        settings_module.check_output(str(tmp_path / "new/out"))


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path):
    settings_module.check_output(str(tmp_path / "Ein Ordner ü/out"))
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder(nb, monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    column = {"EPOCHS": 1, "EVAL_BATCH": 8, "QUERY_CHUNK": 8, "OUTPUT_DIR": "~/out", "DATA_DIR": "a~b", "DATASET": "~"}
    settings = nb.choose_settings(column, {}, {"MAMBA_GINR_DATA_DIR": "~/data"})
    assert settings == {**column, "OUTPUT_DIR": "/somebody/out", "DATA_DIR": "/somebody/data"}
    assert nb.choose_settings(column, {}, {})["DATA_DIR"] == "a~b"


def test_a_setting_changed_after_cell_10_is_named():
    settings = {"EPOCHS": 40, "SEED": 0, "QUERY_CHUNK": 8}
    names = {**settings, "QUERY_CHUNK": 4}
    assert settings_module.what_a_run_shares(settings, names) == {"EPOCHS": 40, "SEED": 0}
    with pytest.raises(ValueError, match=r"no effect: EPOCHS = 3 \(not 40\)\. Set it in cell 10, and run that"):
        settings_module.what_a_run_shares(settings, {**names, "EPOCHS": 3})


def test_the_device_is_described_with_what_else_there_is(monkeypatch):
    assert settings_module.describe(torch.device("cpu")) == "CPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    for there, text in ((1, "H100"), (4, "H100, one of 4 GPUs (make run GPUS=4 trains on all)")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert settings_module.describe(torch.device("cuda")) == text
    monkeypatch.setattr(settings_module, "processes", lambda: 4)
    assert settings_module.describe(torch.device("cuda")) == "4 × H100"


def test_a_size_that_is_none_is_refused_before_the_data_are_read(nb, tmp_path):
    for size, patch in ((0, 2), (63, 2), (1, 2), (64, 0)):
        settings = {**nb.settings, "OUTPUT_DIR": str(tmp_path / "runs"), "IMAGE_SIZE": size, "PATCH_SIZE": patch}
        with pytest.raises(ValueError, match=f"patch_size {patch} must divide image_size {size}"):
            settings_module.announce(settings, {}, torch.device("cpu"))

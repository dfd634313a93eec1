"""The training loop: what it writes, which weights it keeps, and settings that fit no epoch."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import SETTINGS

from mamba_ginr import checkpoints, training_run


def test_training_writes_what_it_promises(nb, start, tmp_path):
    run = start(tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "checkpoints/mamba_ginr_state.pth",
        "checkpoints/mamba_ginr_best.pth",
        "figures/psnr_curves.png",
    }
    _, checkpoint = nb.load_model(run.best_path)
    best = max(run.history, key=lambda row: row["psnr_mean"])
    assert checkpoint["metrics"] == best
    assert run.history[0]["train_loss"] > run.history[-1]["train_loss"]
    assert all(row["train_loss_finer"] > 0 for row in run.history)
    assert best["psnr_mean"] > run.history[0]["psnr_mean"]


def test_the_best_weights_are_those_of_the_held_out_images(nb, start, data, monkeypatch, tmp_path):
    scores = iter([10.0, 30.0, 20.0])
    kept, model_checkpoint = {}, checkpoints.model_checkpoint
    evaluate = nb.evaluate

    def scripted(model, images, batch_size):
        assert images is data.held_out
        return {**evaluate(model, images, batch_size), "psnr_mean": next(scores)}

    def spy(model, settings, metrics):
        kept[metrics["epoch"]] = {k: v.clone() for k, v in model.state_dict().items()}
        return model_checkpoint(model, settings, metrics)

    monkeypatch.setattr(nb, "evaluate", scripted)
    monkeypatch.setattr(training_run, "model_checkpoint", spy)
    run = start(tmp_path)
    model, checkpoint = nb.load_model(run.best_path)
    assert checkpoint["metrics"]["epoch"] == 2
    assert sorted(kept) == [1, 2]
    rounded = {k: v.half().float() if k.startswith("head.") else v for k, v in kept[2].items()}
    assert all(torch.equal(v, rounded[k]) for k, v in model.state_dict().items())


REFINE = SimpleNamespace(**{**SETTINGS, "BATCH_SIZE": 16, "REFINE_STEPS": 40, "REFINE_RATE": 1e-4})


def test_the_decoder_of_the_best_weights_is_refined_once(nb, start, data, capsys, monkeypatch, tmp_path):
    run, made = start(tmp_path), []
    state = run.state_path.read_bytes()
    before, checkpoint = run.load_best()
    capsys.readouterr()

    class Spy(nb.Sampler):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(nb, "Sampler", Spy)
    torch.set_float32_matmul_precision("high")
    nb.refine(run, data, REFINE)
    assert torch.get_float32_matmul_precision() == "highest"
    assert (len(made[0].pictures), made[0].batch_size, made[0].hard, made[0].mosaics) == (44, 4, 1, 0)
    line = re.fullmatch(r"Decoder refined in 40 steps, held out in float32: (.+) → (.+) dB\n", capsys.readouterr().out)
    after, refined = run.load_best()
    assert refined["metrics"] == checkpoint["metrics"]
    scores = [nb.evaluate(model, data.held_out, 16)["psnr_mean"] for model in (before, after)]
    about = {"steps": 40, "rate": 1e-4, "held_out_before": scores[0], "held_out": scores[1]}
    assert refined["refined"] == pytest.approx(about)
    assert [f"{score:.2f}" for score in scores] == list(line.groups())
    assert scores[1] > scores[0]
    was, now = before.state_dict(), after.state_dict()
    assert {name for name in was if not torch.equal(was[name], now[name])} == {
        name for name, _ in before.named_parameters() if name.startswith("decoder.")
    }
    written = run.best_path.read_bytes()
    nb.refine(run, data, REFINE)
    assert capsys.readouterr().out == "The decoder was refined before: 40 steps, rate 0.0001.\n"
    assert (run.best_path.read_bytes(), run.state_path.read_bytes()) == (written, state)


def test_weights_that_refining_harms_stay_and_can_be_refined_again(nb, start, data, capsys, tmp_path):
    run = start(tmp_path)
    written = run.best_path.read_bytes()
    nb.refine(run, data, SimpleNamespace(**{**vars(REFINE), "REFINE_STEPS": 5, "REFINE_RATE": 10.0}))
    assert capsys.readouterr().out.endswith(" dB: left as it was\n")
    assert run.best_path.read_bytes() == written
    nb.refine(run, data, REFINE)
    assert "refined" in run.load_best()[1]


def test_an_interrupted_refining_changes_nothing(nb, start, data, monkeypatch, tmp_path):
    run = start(tmp_path)
    files = {path: path.read_bytes() for path in (run.best_path, run.state_path)}

    def interrupt(*_):
        assert list((tmp_path / "checkpoints").glob(".*.lock"))  # no other process may write meanwhile
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nb, "shortfall", interrupt)
        with pytest.raises(KeyboardInterrupt, match="the run is saved, its refining is not: run this cell again"):
            nb.refine(run, data, REFINE)
    assert {path: path.read_bytes() for path in files} == files
    nb.refine(run, data, REFINE)
    assert "refined" in run.load_best()[1]


def test_trained_weights_start_no_other_run(nb, tiny, data, tmp_path):
    model, settings = tiny(), SimpleNamespace(**SETTINGS)
    nb.train(model, data, settings, {}, tmp_path)
    assert nb.train(model, data, settings, {}, tmp_path).epoch == 3  # read back
    (tmp_path / "checkpoints/mamba_ginr_state.pth").unlink()
    with pytest.raises(ValueError, match=r"these weights are trained already.*run cell 10 for new ones"):
        nb.train(model, data, settings, {}, tmp_path)


def test_larger_images_are_asked_for_as_many_finer_pixels_to_each_of_theirs(nb):
    settings = SimpleNamespace(**{**SETTINGS, "SR_QUERIES": 2048})
    for size, queries in ((32, 2048), (64, 4 * 2048), (16, 512)):
        model = nb.MambaGINR(size, 4, 16, 1, d_state=2, expand=1, decoder_dim=16, head_dim=8, head_hidden=8)
        sampler, _ = nb.set_up(model, torch.zeros(64, 3, size, size, dtype=torch.uint8), settings)
        assert sampler(0, 0).coords.shape[1] == queries


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BATCH_SIZE": 45}, "BATCH_SIZE = 45 must lie in 1 … 44"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE = 0 must lie in 1 … 44"),
        ({"WARMUP_EPOCHS": 3}, "WARMUP_EPOCHS = 3 must be less than EPOCHS = 3"),
        ({"EPOCHS": 0}, "must be less than EPOCHS = 0"),
        ({"SR_FRACTION": 1.0}, "of BATCH_SIZE = 8 make 2 hard images and 8 mosaics: they must leave an image"),
        ({"SR_QUERIES": 0}, "SR_QUERIES asks a mosaic for 0 finer pixels"),
        ({"GRADIENT_CLIP": 1.0}, "GRADIENT_CLIP = 1.0 must be over 1"),
        ({"SEED": 2**32}, "SEED = 4294967296 must lie in 0 … 2³² − 1"),
        ({"HARD_FRACTION": 1.0}, "of BATCH_SIZE = 8 make 8 hard images and 2 mosaics: they must leave an image"),
    ],
)
def test_settings_that_fit_no_epoch(start, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []

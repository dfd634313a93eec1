"""Training: interruption and resumption, checkpoints good and bad, settings, schedules, data."""

import json
import math
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, notebook_cells
from PIL import Image
from torchvision.transforms import functional as TF

import mamba_ginr.data as loading
import mamba_ginr.settings as settings_module
from mamba_ginr import checkpoints, enlarge, training_run
from mamba_ginr.kernels import backends

SETTINGS = {
    "EPOCHS": 3, "WARMUP_EPOCHS": 1, "BATCH_SIZE": 8, "EVAL_BATCH": 16, "LEARNING_RATE": 2e-3, "BETA2": 0.99,
    "WEIGHT_DECAY": 1e-4, "GRADIENT_CLIP": 2.0, "LOG_LOSS": True, "EMA_SHARE": 0.15, "SEED": 0, "COMPILE": False,
    "DECODER": "lainr", "HARD_FRACTION": 0.25, "SR_FRACTION": 0.25, "SR_QUERIES": 64, "OPTIMIZER": "muon",
    "MUON_DECAY": 0.1,
}  # fmt: skip
STEPS = 5  # an epoch of 44 images


@pytest.fixture
def data(nb):
    generator = torch.Generator().manual_seed(0)
    train, held_out, test = (
        torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8) for n in (44, 6, 6)
    )
    return nb.ImageData("noise", train, held_out, test)


@pytest.fixture
def start(nb, tiny, data):
    """Train the tiny model in a folder, as cell 11 does; a fresh model each time, as after a restart."""

    def run(folder, identity=None, **changes):
        return nb.train(tiny(), data, SimpleNamespace(**{**SETTINGS, **changes}), identity or {"DIM": 16}, folder)

    return run


@pytest.fixture
def interrupt_at(nb, monkeypatch):
    """Send the interrupt of Jupyter's stop button while a given step, counted over the epochs, is running."""
    schedule = nb.learning_rate

    def arm(interrupted_step):
        def learning_rate(step, *rest):
            if step == interrupted_step:
                signal.raise_signal(signal.SIGINT)
            return schedule(step, *rest)

        monkeypatch.setattr(nb, "learning_rate", learning_rate)

    return arm


def state_in(folder):
    return torch.load(folder / "checkpoints/mamba_ginr_state.pth", weights_only=True)


def tensors(tree):
    """All tensors of nested dicts and lists, by path."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {f"{key}/{path}": tensor for key, value in items for path, tensor in tensors(value).items()}


def without_times(history):
    return [{k: v for k, v in row.items() if k not in ("minutes", "ms_per_step")} for row in history]


def test_resumed_equals_uninterrupted_bit_for_bit(start, interrupt_at, tmp_path):
    whole = start(tmp_path / "whole")
    for step in (6, 9, 10):  # the middle, the last and the first step of an epoch
        interrupt_at(step)
        with pytest.raises(KeyboardInterrupt, match="saved after step"):
            start(tmp_path / "parts")
        saved = state_in(tmp_path / "parts")
        assert saved["epoch"] * STEPS + saved["step"] == step + 1  # the running step was finished, no more
    interrupt_at(None)
    parts = start(tmp_path / "parts")

    expected, found = tensors(state_in(tmp_path / "whole")), tensors(state_in(tmp_path / "parts"))
    assert len(expected) > 50
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert without_times(parts.history) == without_times(whole.history)
    assert len(whole.history) == SETTINGS["EPOCHS"]


def test_a_state_is_written_in_the_background_and_what_fails_is_told(nb, monkeypatch, tmp_path):
    begun, let_go = threading.Event(), threading.Event()
    write = nb.save_atomically

    def slowly(path, write_to):
        begun.set()
        assert let_go.wait(60)
        write(path, write_to)

    monkeypatch.setattr(checkpoints, "save_atomically", slowly)
    saver, weights = checkpoints.Saver(tmp_path / "state.pth"), torch.zeros(3)
    saver.save({"weights": weights})
    assert begun.wait(60)
    weights += 1  # the next step
    assert not saver.path.exists()
    let_go.set()
    saver.close()
    assert torch.load(saver.path, weights_only=True)["weights"].tolist() == [0, 0, 0]

    def fails(path, write_to):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_atomically", fails)
    saver.save({"weights": weights})
    with pytest.raises(OSError, match="disk full"):
        saver.close()
    saver.save({"weights": weights})
    saver.pending.exception()  # waits for it
    monkeypatch.setattr(checkpoints, "save_atomically", write)  # there is room again
    with pytest.raises(OSError, match="disk full"):
        saver.save({"weights": weights})
    saver.close()
    assert torch.load(saver.path, weights_only=True)["weights"].tolist() == [1, 1, 1]


def test_a_finished_run_is_read_back_not_repeated(nb, start, monkeypatch, tmp_path):
    first = start(tmp_path)
    monkeypatch.setattr(nb, "learning_rate", lambda *_: pytest.fail("a step was trained"))
    assert start(tmp_path).history == first.history


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
    kept, save_model = {}, checkpoints.save_model
    evaluate = nb.evaluate

    def scripted(model, images, batch_size):
        assert images is data.held_out
        return {**evaluate(model, images, batch_size), "psnr_mean": next(scores)}

    def spy(path, model, settings, metrics):
        kept[metrics["epoch"]] = {k: v.clone() for k, v in model.state_dict().items()}
        save_model(path, model, settings, metrics)

    monkeypatch.setattr(nb, "evaluate", scripted)
    monkeypatch.setattr(training_run, "save_model", spy)
    run = start(tmp_path)
    model, checkpoint = nb.load_model(run.best_path)
    assert checkpoint["metrics"]["epoch"] == 2
    assert sorted(kept) == [1, 2]
    rounded = {k: v.half().float() if k.startswith("head.") else v for k, v in kept[2].items()}
    assert all(torch.equal(v, rounded[k]) for k, v in model.state_dict().items())


def test_a_saved_model_gives_the_same_values(nb, tiny, tmp_path):
    model = tiny(seed=5).eval()
    checkpoints.save_model(tmp_path / "m.pth", model, {"SEED": 5}, {"psnr_mean": 1.0})
    loaded, checkpoint = nb.load_model(tmp_path / "m.pth")
    images, coords = torch.rand(1, 3, 8, 8), torch.rand(9, 2)
    torch.nn.init.normal_(model.head.to_rgb.weight)
    checkpoints.save_model(tmp_path / "trained.pth", model, {}, {})
    with torch.no_grad():
        assert torch.equal(model(images, coords), loaded(images, coords))
        finer = model(images, coords, 1 / 32), nb.load_model(tmp_path / "trained.pth")[0](images, coords, 1 / 32)
    assert torch.allclose(*finer, atol=5e-3)  # the head is kept in float16
    assert not loaded.training
    assert checkpoint["settings"] == {"SEED": 5}


def test_a_state_of_another_configuration_is_refused_and_kept(nb, start, tmp_path):
    start(tmp_path, {"DIM": 16, "SEED": 0})
    path = tmp_path / "checkpoints/mamba_ginr_state.pth"
    before = path.read_bytes()
    with pytest.raises(checkpoints.CheckpointError, match="SEED is 0 there and 1 here") as error:
        start(tmp_path, {"DIM": 16, "SEED": 1})
    assert str(path) in str(error.value)
    assert "move the file away" in str(error.value)
    assert "DIM" not in str(error.value)
    assert path.read_bytes() == before


def spoil(path, how):
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "picture":
        Image.new("RGB", (4, 4)).save(path, format="PNG")
    elif how == "code":
        torch.save({"kind": print}, path)  # a pickle that names a function
    elif how == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "picture", "code", "foreign"])
def test_a_spoilt_file_is_named_and_kept(nb, start, how, tmp_path):
    start(tmp_path, EPOCHS=2)
    state, best = (tmp_path / f"checkpoints/mamba_ginr_{name}.pth" for name in ("state", "best"))
    for path, read in [(state, lambda: start(tmp_path, EPOCHS=2)), (best, lambda: nb.load_model(best))]:
        spoilt = spoil(path, how)
        with pytest.raises(checkpoints.CheckpointError) as error:
            read()
        assert str(path) in str(error.value)
        assert "Move it away" in str(error.value)
        assert path.read_bytes() == spoilt


def test_a_missing_checkpoint_says_train_first(nb, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="does not exist: train first"):
        nb.load_model(tmp_path / "none.pth")


def test_a_model_is_no_state_and_a_state_no_model(nb, start, tmp_path):
    run = start(tmp_path, EPOCHS=2)
    with pytest.raises(checkpoints.CheckpointError, match="not a model of this notebook"):
        nb.load_model(run.state_path)
    torch.save({"kind": "MAMBA-GINR model"}, tmp_path / "empty.pth")
    with pytest.raises(checkpoints.CheckpointError, match=r"empty\.pth.*'config'"):
        nb.load_model(tmp_path / "empty.pth")
    run.state_path.write_bytes(run.best_path.read_bytes())
    with pytest.raises(checkpoints.CheckpointError, match="not a training state of this notebook"):
        start(tmp_path, EPOCHS=2)


def test_weights_from_before_the_head_load_and_interpolate(nb, tiny, tmp_path, capsys):
    model = tiny().eval()
    checkpoints.save_model(tmp_path / "old.pth", model, {}, {})
    checkpoint = torch.load(tmp_path / "old.pth", weights_only=True)
    checkpoint["config"] = {k: v for k, v in model.config.items() if not k.startswith("head_")} | {"mixing_dim": 4}
    weights = {k: v for k, v in checkpoint["weights"].items() if not k.startswith("head.")}
    checkpoint["weights"] = weights | {"mixing.convolution.weight": torch.randn(4, 16, 3, 3)}
    torch.save(checkpoint, tmp_path / "old.pth")
    old, _ = nb.load_model(tmp_path / "old.pth")
    torch.save({**checkpoint, "config": {"mixing_dim": 4}}, tmp_path / "poor.pth")
    with pytest.raises(checkpoints.CheckpointError, match="their configuration has no d_conv, d_state"):
        nb.load_model(tmp_path / "poor.pth")
    assert "is from before the super-resolution head" in capsys.readouterr().out
    images, coords = torch.rand(2, 3, 8, 8), torch.rand(1, 5, 2)
    with torch.no_grad():
        own = model(images, nb.pixel_grid(8))
        assert torch.equal(old(images, nb.pixel_grid(8)), own)
        pixels = own.transpose(1, 2).unflatten(2, (8, 8))
        spline = model.head.spline(pixels, coords, torch.tensor([1 / 32]))
        assert torch.allclose(old(images, coords[0], 1 / 32), spline, atol=1e-6)


def test_weights_that_call_the_decoder_residual_load(nb, tiny, tmp_path):
    model = tiny()
    model.config = {**model.config, "decoder": "residual"}
    checkpoints.save_model(tmp_path / "old.pth", model, {}, {})
    old, checkpoint = nb.load_model(tmp_path / "old.pth")
    assert old.config["decoder"] == checkpoint["config"]["decoder"] == "lainr"
    assert torch.equal(old.decoder.to_rgb.weight, model.decoder.to_rgb.weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: config.pop("pixel_scale"), "their configuration has no pixel_scale"),
        (lambda config: config.update(colours=4), "unexpected keyword argument 'colours'"),
        (lambda config: config.update(dim=24), "size mismatch"),
        (lambda config: config.update(decoder="mlp"), "decoder = 'mlp'"),
        (lambda config: config.update(patch_size=3), "patch_size 3 must divide"),
    ],
)
def test_weights_of_another_version_are_refused(nb, tiny, change, reason, tmp_path):
    checkpoints.save_model(tmp_path / "model.pth", tiny(), {}, {})
    checkpoint = torch.load(tmp_path / "model.pth", weights_only=True)
    change(checkpoint["config"])
    torch.save(checkpoint, tmp_path / "model.pth")
    with pytest.raises(checkpoints.CheckpointError, match=f"(?s)do not fit this version of the model: .*{reason}"):
        nb.load_model(tmp_path / "model.pth")


@pytest.fixture
def spoil_at(nb, monkeypatch):
    """Give some steps, counted over the epochs, a rate that ruins the weights."""
    schedule = nb.learning_rate

    def arm(steps, rate=math.nan):
        monkeypatch.setattr(nb, "learning_rate", lambda step, *rest: rate if step in steps else schedule(step, *rest))

    return arm


@pytest.mark.parametrize("rate", [math.nan, 1.0], ids=["not finite", "lost"])
def test_a_run_that_fell_goes_back_and_on(nb, start, spoil_at, rate, tmp_path, capsys):
    spoil_at({STEPS + 1}, rate)
    run = start(tmp_path)
    told = [line for line in capsys.readouterr().out.split("\n") if line.startswith("Step 5 of epoch 2: ")]
    assert len(told) == 1
    assert re.search(r"Back to the weights of step \d of epoch [12], and on at 0.5 of the rate.", told[0])
    assert len(run.history) == 3
    assert all(math.isfinite(row["psnr_mean"]) for row in run.history)
    assert run.history[2]["psnr_mean"] > run.history[0]["psnr_mean"] - 1
    assert run.caution == pytest.approx(0.5 * 2**0.1)  # one good look since
    assert (run.returns, run.falls) == (1, 0)
    assert all(torch.isfinite(t).all() for name, t in tensors(state_in(tmp_path)).items() if "losses" not in name)


@pytest.fixture
def watched(nb, tiny, tmp_path):
    """A run of the tiny model, its step, and its batches of noise; ``go(n, rate)`` trains on."""
    images, model = torch.randint(0, 256, (80, 3, 8, 8), dtype=torch.uint8), tiny()
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False, decay=0.5)
    sampler = nb.Sampler(images, 8, 2, 2, 64, seed=0)
    run = nb.Run(step, 100, {}, tmp_path)

    def go(count, rate=1e-3):
        for _ in range(count):
            run.record(step(sampler(0, run.step % sampler.steps), rate))

    return run, step, go


def test_what_comes_back_is_all_that_was_a_look_before(watched):
    run, step, go = watched
    go(25)
    run.watch()
    before = {name: tensor.clone() for name, tensor in step.tensors().items()}
    assert {name.split(".")[0] for name in before} == {"model", "average", "optimizer", "usual"}
    go(25)
    run.watch()
    assert run.caution == 1
    go(25, math.nan)
    run.watch()
    assert run.caution == 0.5
    assert [name for name, tensor in step.tensors().items() if not torch.equal(tensor, before[name])] == []
    assert torch.isnan(run.losses[50:75]).all()
    go(20)
    run.watch()
    assert run.losses[94, 0] < run.losses[0, 0]
    assert (run.returns, run.falls) == (1, 0)


def test_a_fall_just_before_a_look_does_not_ruin_the_run(watched, capsys):
    run, _, go = watched
    go(49)
    run.watch()
    go(1, 1.0)
    run.watch()  # its loss is from before that step, so nothing can be seen yet
    assert run.returns == 0
    go(20)
    run.watch()
    assert run.returns == 1
    assert "Back to the weights of step 49 of epoch 1, and on at 0.5 of the rate." in capsys.readouterr().out
    go(20)
    run.watch()
    assert (run.returns, run.falls) == (1, 0)
    assert run.losses[85:90, 0].mean() < 2 * run.losses[40:49, 0].mean()


def test_falls_in_a_row_go_back_to_the_same_weights(watched, capsys):
    run, step, go = watched
    go(20), run.watch()
    before = {name: tensor.clone() for name, tensor in step.tensors().items()}
    go(20), run.watch()
    for falls in (1, 2, 3):
        go(10, math.nan), run.watch()
        assert (run.falls, run.caution) == (falls, 0.5**falls)
        assert [name for name, tensor in step.tensors().items() if not torch.equal(tensor, before[name])] == []
    assert capsys.readouterr().out.count("Back to the weights of step 20 of epoch 1") == 3


def test_a_head_that_is_not_finite_is_a_fall_too(watched):
    run, step, go = watched
    go(20), run.watch(), go(20), run.watch()
    weights = step.model.head.to_rgb.weight.detach().clone()
    with torch.no_grad():
        step.model.head.of_map.weight.fill_(1e38)
        step.model.head.to_rgb.weight.fill_(1e38)
    go(5)
    assert torch.isfinite(run.losses[40:45, 0]).all()
    run.watch()
    assert run.returns == 1
    assert torch.isfinite(step.model.head.of_map.weight).all()
    assert (step.model.head.to_rgb.weight - weights).abs().max() < 0.1


def test_a_fall_before_an_interrupt_is_not_told_twice(nb, watched, tmp_path, capsys):
    run, step, go = watched
    go(20), run.watch(), go(10, math.nan), run.watch(), go(5)
    run.save()
    run.saver.close()
    capsys.readouterr()
    resumed = nb.Run(step, 100, {}, tmp_path)
    assert (resumed.watched, resumed.returns, resumed.caution) == (30, 1, 0.5)
    resumed.watch()
    assert (resumed.returns, resumed.falls) == (1, 0)
    assert "Back to the weights" not in capsys.readouterr().out


def test_near_zero_a_rise_is_no_fall(nb, tiny, batch_of, tmp_path):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8))
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    step(batch, 1e-3)
    run = nb.Run(step, 300, {}, tmp_path)
    for losses, returns in (([0.0] * 100, 0), ([0.0, 1e-8, 3e-7] * 33 + [0.0], 0), ([1e-5] * 100, 1)):
        for loss in losses:
            run.record(torch.full((2,), loss))
        assert run.returns == returns


def test_a_run_that_falls_at_once_starts_anew(nb, tiny, batch_of, tmp_path):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8))
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    run = nb.Run(step, 10, {}, tmp_path)
    first = step(batch, math.nan)
    run.record(first)
    run.record(step(batch, 1e-3))
    run.watch()
    assert run.returns == 1
    assert torch.equal(step(batch, 1e-3), first)


def test_a_step_that_is_not_finite_changes_nothing(nb, tiny, batch_of):
    model, batch = tiny(dim=128, d_state=2), batch_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), mosaics=2)
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    step(batch, 1e-3)
    before = {name: tensor.clone() for name, tensor in step.tensors().items()}
    spoilt = batch._replace(rgb=batch.rgb * math.inf)  # the finer pixels' loss alone
    assert not torch.isfinite(step(spoilt, 1e-3)).all()
    changed = {n.split(".")[0] for n, t in step.tensors().items() if not torch.equal(t, before[n])}
    assert changed <= {"average", "usual"}  # the average comes nearer to the same weights


def test_a_run_that_cannot_hold_says_what_to_do(nb, start, spoil_at, tmp_path):
    spoil_at(set(range(STEPS, 100)))
    with pytest.raises(FloatingPointError, match=r"left its course ten times in a row.*Lower LEARNING_RATE") as error:
        start(tmp_path, EPOCHS=20)
    path = tmp_path / "checkpoints/mamba_ginr_state.pth"
    assert str(path) in str(error.value)
    state = state_in(tmp_path)
    assert all(torch.isfinite(weights).all() for weights in state["model"].values())


@pytest.mark.parametrize(
    ("spoilt", "rate", "interrupted"),
    [(12, math.nan, 8), (12, math.nan, 12), (12, math.nan, 13), (9, 1.0, 9), (10, 1.0, 14), (6, math.nan, 9)],
)
def test_falls_come_out_as_in_an_uninterrupted_run(nb, start, monkeypatch, tmp_path, spoilt, rate, interrupted):
    """Also where the last step before the interrupt spoils the weights, which only the next loss can show."""
    schedule, interrupt = nb.learning_rate, [False]

    def learning_rate(step, *rest):
        if step == interrupted and interrupt[0]:
            interrupt[0] = False
            signal.raise_signal(signal.SIGINT)
        return rate if step == spoilt else schedule(step, *rest)

    monkeypatch.setattr(nb, "learning_rate", learning_rate)
    whole = start(tmp_path / "whole", EPOCHS=5)
    assert whole.returns >= 1
    interrupt[0] = True
    with pytest.raises(KeyboardInterrupt, match="saved after step"):
        start(tmp_path / "parts", EPOCHS=5)
    parts = start(tmp_path / "parts", EPOCHS=5)
    assert (parts.returns, parts.caution) == (whole.returns, whole.caution)
    expected, found = tensors(state_in(tmp_path / "whole")), tensors(state_in(tmp_path / "parts"))
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name].nan_to_num(7), found[name].nan_to_num(7))]
    assert different == []


def test_an_interrupt_of_the_last_evaluation_is_heard(nb, start, monkeypatch, tmp_path):
    evaluate = nb.evaluate

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(nb, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the run is finished and saved"):
        start(tmp_path, EPOCHS=1, WARMUP_EPOCHS=0)
    assert state_in(tmp_path)["epoch"] == 1
    assert start(tmp_path, EPOCHS=1, WARMUP_EPOCHS=0).epoch == 1


def test_a_finished_run_leaves_nothing_to_go_back_to(start, tmp_path):
    identity = {"EPOCHS": 2}
    run = start(tmp_path, identity, EPOCHS=2)
    state = state_in(tmp_path)
    assert (state["kept"], state["latest"]) == ({}, {})
    again = start(tmp_path, identity, EPOCHS=2)
    assert without_times(again.history) == without_times(run.history)


def test_trained_weights_start_no_other_run(nb, tiny, data, tmp_path):
    model, settings = tiny(), SimpleNamespace(**SETTINGS)
    nb.train(model, data, settings, {}, tmp_path)
    assert nb.train(model, data, settings, {}, tmp_path).epoch == 3  # read back
    (tmp_path / "checkpoints/mamba_ginr_state.pth").unlink()
    with pytest.raises(ValueError, match=r"these weights are trained already.*run cell 10 for new ones"):
        nb.train(model, data, settings, {}, tmp_path)


def test_the_best_weights_are_those_of_the_run(nb, start, tmp_path):
    first, second = start(tmp_path / "first"), start(tmp_path / "second", LEARNING_RATE=1e-3)
    model, checkpoint = first.load_best()
    assert checkpoint["metrics"] in first.history
    assert not model.training
    first.best_path.write_bytes(second.best_path.read_bytes())
    with pytest.raises(checkpoints.CheckpointError, match=r"is of another run than .*_state\.pth"):
        first.load_best()
    first.best_path.unlink()
    with pytest.raises(checkpoints.CheckpointError, match=r"_best.pth is gone: move .*_state.pth away, too"):
        first.load_best()


def test_a_score_that_is_no_number_is_not_the_best(nb, start, monkeypatch, tmp_path):
    evaluate, scores = nb.evaluate, iter((math.nan, 10.0, 9.0))
    monkeypatch.setattr(nb, "evaluate", lambda *a: {**evaluate(*a), "psnr_mean": next(scores)})
    run = start(tmp_path)
    assert run.load_best()[1]["metrics"]["epoch"] == 2


@pytest.mark.parametrize("spoil", [lambda s: s.pop("caution"), lambda s: s.update(losses=torch.zeros(3, 2))])
def test_a_state_of_another_version_is_named(nb, start, spoil, tmp_path):
    run = start(tmp_path, EPOCHS=2)
    state = state_in(tmp_path)
    spoil(state)
    torch.save(state, run.state_path)
    with pytest.raises(checkpoints.CheckpointError, match=r"_state.pth does not fit this version of the training"):
        start(tmp_path, EPOCHS=2)


def test_without_float16_the_scale_stays_what_it_is(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), mosaics=2)
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    for _ in range(3):
        step(batch._replace(rgb=batch.rgb * math.inf), 1e-3)
    assert step.scaler.get_scale() == 1


def test_kill_during_a_save_leaves_the_old_file_whole(script, tmp_path):
    program = f"""
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {str(script.parent)!r})
import notebook_cells as nb
path = Path({str(tmp_path / "state.pth")!r})
state = lambda n: {{"kind": "MAMBA-GINR training state", "n": n, "weights": torch.full((1000,), float(n))}}
nb.save_atomically(path, lambda file: torch.save(state(1), file))
def half_then_killed(file):
    torch.save(state(2), file)
    file.flush()
    os.truncate(file.name, os.path.getsize(file.name) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
nb.save_atomically(path, half_then_killed)
"""
    process = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "state.pth", weights_only=True)["n"] == 1
    assert len(list(tmp_path.iterdir())) == 2  # and the unfinished one, which the next save writes over


def test_a_save_that_fails_leaves_the_old_file(nb, tmp_path):
    path = tmp_path / "file"
    nb.save_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        nb.save_atomically(path, lambda file: file.write(b"new" * (1 // 0)))
    assert path.read_bytes() == b"old"
    nb.save_atomically(path, lambda file: file.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"new"


def test_eight_images_are_learnt_past_40_db(nb):
    torch.manual_seed(0)
    images = loading.load_photos(12)[1][100:1300:150][:8]
    model = nb.MambaGINR(image_size=12, dim=64, depth=1, d_state=8, num_lp=36, decoder_dim=128, fourier_std=5.0)
    optimizer = nb.make_optimizer(model, "adamw", 1e-3, 0.99, 0.0, 0.1)
    (images, target), coords = nb.to_batch(images), nb.pixel_grid(12)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = nb.learning_rate(step, 500, 40, 5e-3)
        loss = torch.nn.functional.mse_loss(model(images, coords), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        assert nb.psnr(model(images, coords), target).mean() > 40


def test_the_rate_of_a_step_is_the_one_asked_for(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1.0, compiled=False)
    loss = step(batch, 0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(step(batch, 1e-3), loss)
    assert step(batch, 1e-3)[0] < loss[0]


def test_what_is_evaluated_is_an_average_of_the_weights(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), mosaics=1)
    expected = [p.detach().clone() for p in model.parameters()]
    step = nb.TrainingStep(
        model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1.0, compiled=False, decay=0.75
    )
    for _ in range(3):
        step(batch, 1e-2)
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, model.parameters())]
    assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(step.average.parameters(), expected))
    assert not any(torch.equal(a, p) for a, p in zip(step.average.parameters(), model.parameters()))
    assert not any(a.requires_grad for a in step.average.parameters())


def test_the_logarithm_of_the_loss_changes_only_the_size_of_its_gradient(nb, tiny, batch_of):
    batch, losses, gradients = batch_of(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)), [], []
    for log_loss in (False, True):
        model = tiny()
        step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1e9, False, log_loss)
        losses.append(step(batch, 0.0))
        trained = [p for p in model.parameters() if p.grad is not None]  # not the head, which mosaics train
        gradients.append([p.grad * (losses[-1][0] if log_loss else 1) for p in trained])
    assert torch.equal(*losses)  # the MSE in both
    assert losses[0][1] == 0
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(*gradients))


@pytest.mark.skipif(backends.triton is None, reason="needs Triton")
@pytest.mark.parametrize("decoder", ["lainr", "hybrid"])
def test_the_model_is_compiled_in_one_piece(nb, tiny, batch_of, decoder, monkeypatch):
    # Nothing is known of the machine yet, so that the scan is tried while the model is compiled.
    monkeypatch.setattr(backends, "_faults", {})
    monkeypatch.setattr(backends, "triton_fault", lambda device: backends._fault_of("triton", device))
    monkeypatch.setitem(backends._chosen, "backend", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny(decoder=decoder).to(device)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, device=device)
    batch = batch_of(images, mosaics=2)
    model.precision = torch.bfloat16
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 1.0, compiled=False)
    losses, gradients = [], []
    for errors_of in (torch.compile(step.errors, backend="aot_eager", fullgraph=True), step.errors):
        model.zero_grad()
        losses.append(errors_of(batch))
        losses[-1].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(*losses)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("decoder", ["lainr", "gaussian", "scent", "hybrid"])
def test_a_captured_step_trains_as_an_eager_one(nb, tiny, precision, decoder):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8).cuda()
    sampler = nb.Sampler(images, 8, 2, 2, 64, 0)
    losses = []
    for compiled in (False, True):
        model = tiny(decoder=decoder).cuda()
        model.precision = precision
        step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 1.0, compiled)
        losses.append(torch.stack([step(sampler(0, i), 1e-3 * (i + 1) / 8).clone() for i in range(8)]))
        assert (step.graph is not None) == compiled
    assert torch.allclose(*losses, atol=0, rtol=2e-3 if precision == torch.float16 else 1e-4)


def test_a_mosaic_holds_images_side_by_side_and_averages_down(nb):
    images = torch.randint(0, 256, (35, 3, 8, 8), dtype=torch.uint8)
    inputs, truth = nb.mosaic(images, 4, 4)
    assert (inputs.shape, inputs.dtype, truth.shape) == ((2, 3, 8, 8), torch.uint8, (2, 3, 32, 32))
    for row in range(4):
        for column in range(4):
            tile = truth[1, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal((255 * tile).round().byte(), images[16 + 4 * row + column])
    assert (255 * torch.nn.functional.avg_pool2d(truth, 4) - inputs).abs().max() <= 0.5001
    half = nb.mosaic(images, 4, 2)
    assert torch.equal(half[0], inputs)
    assert torch.allclose(half[1], torch.nn.functional.avg_pool2d(truth, 2), atol=1e-6)


def test_places_away_from_seams_are_two_input_pixels_off(nb):
    assert len(nb.away_from_seams(1, 8)) == 256**2  # no mosaic, no seams
    places = nb.away_from_seams(2, 2)  # seams at 16 of 32 input pixels: 4 of 64 rows on each side are near
    rows = [r for r in range(64) if r < 28 or r >= 36]
    assert places.tolist() == [64 * r + c for r in rows for c in rows]
    assert len(nb.away_from_seams(4, 4)) == (128 - 3 * 16) ** 2


def test_finer_pixels_lie_where_the_truth_is(nb):
    """A picture whose brightness is its row: each finer pixel's truth is that of its centre."""
    rows = torch.arange(32).view(1, 1, 32, 1).expand(16, 3, 32, 32)
    images = rows + 32 * (torch.arange(16) // 4).view(-1, 1, 1, 1)  # 4 × 4 tiles, 128 rows one after the other
    for tiles, scale, step in nb.MOSAICS:
        chosen = images if tiles == 4 else images[[0, 0, 4, 4]]
        _, truth = nb.mosaic(chosen.byte(), tiles, scale, step)
        places = nb.finer_places(scale, step, 32)
        assert truth.shape[2:] == (len(places), len(places))
        assert torch.allclose(255 * truth[0, 0, :, 0], 32 * tiles * places - 0.5, atol=1e-3)
        assert places[0].item() == pytest.approx(0.5 / (32 * scale))
        assert (places + places.flip(0)).tolist() == pytest.approx([1.0] * len(places))


def test_a_batch_depends_on_seed_epoch_and_step_only(nb):
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    first, other = (nb.Sampler(images, 8, 2, 2, 64, seed) for seed in (0, 1))
    batches = [first(0, step) for step in range(5)]
    again = nb.Sampler(images, 8, 2, 2, 64, 0)
    again(1, 3)
    assert all(torch.equal(a, b) for a, b in zip(batches[3], again(0, 3)))
    for different in (batches[2], again(1, 3), other(0, 3)):
        assert not any(torch.equal(a, b) for a, b in zip(batches[3][:3], different[:3]))
    seen = torch.cat([b.images[:4] for b in batches])
    assert len({bytes(x) for x in seen.numpy()}) == 20  # no image twice in an epoch
    shapes = [tuple(x.shape) for x in batches[0]]
    assert shapes == [(6, 3, 8, 8), (2, 3, 8, 8), (2, 64, 2), (2,), (2, 64, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_made_ahead_are_those_made_in_place(nb):
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8).cuda()
    ahead, in_place = (nb.Sampler(images, 40, 8, 8, 256, 0) for _ in range(2))
    for now in (0, 1, 2, 9, 10, 11, 5):  # in turn, over the end of an epoch, and out of turn
        epoch, step = divmod(now, ahead.steps)
        assert all(torch.equal(a, b) for a, b in zip(ahead(epoch, step), in_place.make(epoch, step)))


def test_the_finer_pixels_of_a_batch_are_those_of_its_mosaics(nb):
    # Images of one colour each: away from seams a finer pixel has the colour of the input's pixel in which it lies.
    images = torch.randint(0, 256, (64, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 32, 32).contiguous()
    sampler = nb.Sampler(images, 8, 0, 3, 256, 0)
    for step in range(8):
        batch = sampler(0, step)
        pixel = (batch.coords * 32).long()  # row and column
        index = (pixel[..., 0] * 32 + pixel[..., 1]).unsqueeze(-1).expand(-1, -1, 3)
        colours = batch.mosaics.flatten(2).transpose(1, 2).gather(1, index) / 255
        assert torch.allclose(batch.rgb, colours, atol=1e-6)
        assert [round(1 / (32 * width)) for width in batch.pixel_width.tolist()] == [2, 4, 2]


def test_mosaics_are_turned_and_mirrored_in_turn(nb):
    images = torch.arange(4 * 3 * 64).view(4, 3, 8, 8).remainder(256).byte()
    sampler = nb.Sampler(images, 4, 0, 1, 64, 0)
    assert [tuple(kind) for kind, *_ in sampler.kinds] == [(2, 2, 1)]  # 8 pixels are too few for 4 × 4 tiles
    drawn = []
    for epoch in range(8):
        batch = sampler(epoch, 0)
        generator = torch.Generator().manual_seed(epoch)
        tiles = images[torch.randint(4, (4,), generator=generator)]
        plain = nb.mosaic(tiles, 2, 2)[0]
        views = [v.rot90(k, (2, 3)) for v in (plain, plain.flip(3)) for k in range(4)]
        drawn.append([torch.equal(batch.mosaics, v) for v in views].index(True))
    assert drawn == list(range(8))


def test_images_too_small_for_mosaics_are_named(nb):
    with pytest.raises(ValueError, match="images of 4 pixels a side be large enough for mosaics"):
        nb.Sampler(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), 8, 0, 2, 64, 0)


def test_finer_pixels_train_the_head_alone(nb, tiny, batch_of):
    images, gradients = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), []
    for mosaics in (0, 4):
        batch, model = batch_of(images, mosaics), tiny()
        batch = batch._replace(images=images[:4])
        step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1e9, False)
        mse, finer = step(batch, 0.0)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert (0 < mse != finer > 0) if mosaics else finer == 0
    without, with_mosaics = gradients
    assert {n for n in with_mosaics if n not in without} == {n for n in with_mosaics if n.startswith("head.")}
    assert all(torch.equal(with_mosaics[n], without[n]) for n in without)
    assert with_mosaics["head.to_rgb.weight"].abs().max() > 0


def test_beyond_black_and_white_nothing_is_missing(nb):
    rgb = torch.tensor([-0.2, 0.3, 1.4, -0.2, 0.3, 1.4, -0.2, 0.3, 1.4], requires_grad=True)
    target = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0])
    missing = nb.shortfall(rgb, target)
    assert missing.tolist() == pytest.approx([0, 0.3, 1.4, -0.7, -0.2, 0.9, -1.2, -0.7, 0])
    missing.square().mean().backward()
    assert (rgb.grad == 0).tolist() == [True, *[False] * 7, True]  # also far on the wrong side there is a gradient


def test_colours_are_clamped_before_they_are_scored(nb, tiny):
    model, images = tiny(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1] = 255
    for bias, first, second in ((-3.0, 100.0, 0.0), (3.0, 0.0, 100.0)):
        with torch.no_grad():
            model.decoder.to_rgb.weight.zero_()
            model.decoder.to_rgb.bias.fill_(bias)
        each = [nb.evaluate(model, images[i : i + 1], 2) for i in range(2)]
        assert [row["psnr_mean"] for row in each] == pytest.approx([first, second])
        assert [row["bit_exact_share"] for row in each] == [first == 100, second == 100]
        assert (nb.decode_grid(model, model.encode(images / 255), 8, 64) == (bias > 0)).all()


def test_images_without_an_error_train_on(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    with torch.no_grad():
        model.decoder.to_rgb.weight.zero_()
        model.decoder.to_rgb.bias.fill_(-1.0)
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    assert step(batch, 1e-3)[0] == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_parameters_go_to_the_optimizer_that_is_theirs(nb):
    model = nb.MambaGINR(dim=128, depth=1, decoder_blocks=1)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer, groups in (("muon", 3), ("adamw", 2)):
        made = nb.make_optimizer(model, optimizer, 1e-3, 0.99, 0.1, 0.3).param_groups
        assert len(made) == groups
        assert sum(len(g["params"]) for g in made) == len(names)
        for group in made:
            for p in group["params"]:
                spared = p.dim() < 2 or "A_log" in names[id(p)] or names[id(p)] == "lp.tokens"
                matrix = p.dim() == 2 and min(p.shape) >= 128 and not spared
                muon = matrix and optimizer == "muon"
                assert bool(group.get("muon")) == muon, names[id(p)]
                assert group["weight_decay"] == (0.0 if spared else 0.3 if muon else 0.1), names[id(p)]
    with pytest.raises(ValueError, match="OPTIMIZER = 'sgd': choose one of muon, adamw"):
        nb.make_optimizer(model, "sgd", 1e-3, 0.99, 0.1, 0.1)


def test_the_schedule_warms_up_and_ends_at_zero(nb):
    rates = [nb.learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert nb.learning_rate(0, 100, 0, 1.0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BATCH_SIZE": 45}, "BATCH_SIZE = 45 must lie in 1 … 44"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE = 0 must lie in 1 … 44"),
        ({"WARMUP_EPOCHS": 3}, "WARMUP_EPOCHS = 3 must be less than EPOCHS = 3"),
        ({"EPOCHS": 0}, "must be less than EPOCHS = 0"),
        ({"SR_FRACTION": 1.0}, "of BATCH_SIZE = 8 make 2 hard images and 8 mosaics: they must leave an image"),
        ({"SR_QUERIES": 0}, "SR_QUERIES = 0: mosaics are asked for at least one"),
        ({"GRADIENT_CLIP": 1.0}, "GRADIENT_CLIP = 1.0 must be over 1"),
        ({"SEED": 2**32}, "SEED = 4294967296 must lie in 0 … 2³² − 1"),
        ({"HARD_FRACTION": 1.0}, "of BATCH_SIZE = 8 make 8 hard images and 2 mosaics: they must leave an image"),
    ],
)
def test_settings_that_fit_no_epoch(start, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


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
    assert capsys.readouterr().out == "OPTIMIZER = adamw sets RATE = 0.001, DIM = 128.\n"
    with pytest.raises(ValueError, match="OPTIMIZER = 'sgd': choose one of muon, adamw"):
        nb.choose_settings(column, choices, {"MAMBA_GINR_OPTIMIZER": "sgd"})


def write_images(folder, counts, size=(32, 32), mode="RGB"):
    rng = np.random.default_rng(0)
    for place, count in counts.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / place / f"{i}.png")


def test_a_folder_of_images_is_read_as_it_is(nb, tmp_path):
    write_images(tmp_path / "mine", {"train/cat": 3, "train/dog": 2, "test/cat": 1})
    name, train, test = loading.load_folder(tmp_path / "mine")
    assert name == "mine (folder)"
    assert (train.shape, test.shape) == ((5, 3, 32, 32), (1, 3, 32, 32))
    first = np.asarray(Image.open(tmp_path / "mine/train/cat/0.png"))
    assert torch.equal(train[0], torch.from_numpy(first.copy()).permute(2, 0, 1))


def test_images_of_other_sizes_and_modes_are_fitted_and_told(nb, tmp_path, capsys):
    write_images(tmp_path, {"train/a": 2}, size=(50, 40), mode="L")
    write_images(tmp_path, {"test/a": 1}, size=(20, 64), mode="RGBA")
    _, train, test = loading.load_folder(tmp_path)
    assert (train.shape, test.shape) == ((2, 3, 32, 32), (1, 3, 32, 32))
    assert "3 of other sizes were cropped" in capsys.readouterr().out


def test_a_folder_without_images_is_named(nb, tmp_path):
    with pytest.raises(FileNotFoundError, match="reads DATA_DIR/train/<class>/") as error:
        loading.load_folder(tmp_path / "none")
    assert str(tmp_path / "none") in str(error.value)
    write_images(tmp_path, {"train/a": 1})
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "test")):
        loading.load_folder(tmp_path)


def test_a_broken_image_is_named(nb, tmp_path):
    write_images(tmp_path, {"train/a": 2, "test/a": 1})
    broken = tmp_path / "train/a/1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as an image") as error:
        loading.load_folder(tmp_path)
    assert str(broken) in str(error.value)


def test_photographs_give_training_and_test_crops_apart(nb):
    name, train, test = loading.load_photos()
    assert "scikit-image" in name
    assert (train.dtype, train.shape[1:], test.shape[1:]) == (torch.uint8, (3, 32, 32), (3, 32, 32))
    assert len(train) > 1700
    assert len(test) > 200
    # Unflat crops at full size would be found again if a pixel of the test quarter were in a training crop.
    textured = [t for t in test if t.float().std() > 20]
    assert len(textured) > 50
    assert not any((train == t).flatten(1).all(1).any() for t in textured)


def test_auto_without_network_takes_the_photographs_and_warns(nb, monkeypatch, tmp_path, capsys):
    def no_network(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(loading, "urlopen", no_network)
    data = nb.load_data("auto", str(tmp_path), 100, 0, 0, 0, "cpu")
    assert data.name == "scikit-image photographs"
    assert capsys.readouterr().out.startswith("WARNING: CIFAR-10 is neither on disk nor reachable")


@pytest.fixture
def fake_cifar10(nb, monkeypatch):
    """Stands in for torchvision's class, whose files cannot be made up: it checks their MD5."""

    class CIFAR10(loading.torchvision.datasets.CIFAR10):
        def __init__(self, root, train, download):
            rng = np.random.default_rng(int(train))
            self.data = rng.integers(0, 256, (300 if train else 50, 32, 32, 3), dtype=np.uint8)

    monkeypatch.setattr(loading.torchvision.datasets, "CIFAR10", CIFAR10)
    return CIFAR10


def test_auto_takes_cifar10_from_disk_without_asking_the_network(nb, fake_cifar10, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = nb.load_data("auto", str(tmp_path), 100, 0, 0, 0, "cpu")
    assert (data.name, len(data.train), len(data.held_out), len(data.test)) == ("CIFAR-10", 200, 100, 50)


def test_cifar10_out_of_reach_says_what_to_do(nb, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(loading.torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(RuntimeError, match=r"downloaded \(no route\). Set DATA_DIR to the folder that holds cifar"):
        nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 0, "cpu")


def test_held_out_images_are_apart_and_the_same_each_time(nb, fake_cifar10, tmp_path):
    a = nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 3, "cpu")
    b = nb.load_data("cifar10", str(tmp_path), 100, 50, 10, 3, "cpu")
    original = torch.from_numpy(fake_cifar10(tmp_path, True, False).data).permute(0, 3, 1, 2)
    together = torch.cat([a.train, a.held_out])
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, original.contiguous().numpy()))
    assert torch.equal(a.held_out, b.held_out)
    assert torch.equal(a.train[:50], b.train)
    assert torch.equal(b.test[0], a.test[0])
    assert torch.equal(b.test[-1], a.test[-1])
    assert not torch.equal(a.held_out, nb.load_data("cifar10", str(tmp_path), 100, 0, 0, 4, "cpu").held_out)


def test_an_unknown_dataset_and_too_many_held_out(nb, fake_cifar10, tmp_path):
    with pytest.raises(ValueError, match="choose one of auto, cifar10, folder, photos"):
        nb.load_data("mnist", str(tmp_path), 100, 0, 0, 0, "cpu")
    with pytest.raises(ValueError, match="HELD_OUT = 300 must lie in 1 … 299: CIFAR-10 has 300 training images"):
        nb.load_data("cifar10", str(tmp_path), 300, 0, 0, 0, "cpu")


def test_a_grid_is_decoded_in_raster_order_whatever_the_chunk(nb, tiny):
    model, images = tiny().eval(), torch.rand(2, 3, 8, 8)
    pictures = nb.decode_grid(model, model.encode(images), 20, 64)
    assert pictures.shape == (2, 3, 20, 20)
    values = model(images, torch.tensor([[2.5 / 20, 7.5 / 20]]), 1 / 20)[:, 0]
    assert torch.allclose(pictures[:, :, 2, 7], values, atol=1e-5)
    assert torch.allclose(pictures, nb.decode_grid(model, model.encode(images), 20, 400), atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_at_whole_multiples_a_picture_averages_back_to_its_pixels(nb, tiny, scale):
    model = tiny().eval()
    torch.nn.init.normal_(model.head.to_rgb.weight)
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 8, 8))
        own = nb.decode_grid(model, latents, 8, 100)
        assert torch.allclose(own, nb.decode_grid(model, latents, 8, 7), atol=1e-5)
        pictures = nb.decode_grid(model, latents, 8 * scale, 100)
        plain = model.decode(latents, nb.pixel_grid(8 * scale), pixel_width=1 / (8 * scale)).transpose(1, 2)
    back = torch.nn.functional.avg_pool2d(pictures, scale)
    assert torch.allclose(back, own, atol=1e-5)
    assert (plain.unflatten(2, pictures.shape[2:]) - pictures).abs().max() > 1e-3  # without that they do not


class Interpolation(torch.nn.Module):
    """Stands in for a model: its latents are the pixels, which it interpolates linearly."""

    image_size = 8

    def __init__(self, spline=None):
        super().__init__()
        self.lp, self.head, self.widths = SimpleNamespace(tokens=torch.zeros(1)), SimpleNamespace(spline=spline), set()
        self.own_coords = torch.cartesian_prod(*2 * [(torch.arange(8) + 0.5) / 8])

    def encode(self, images):
        return images

    def decode(self, latents, coords, chunk=None, pixel_width=None):
        self.widths.add(pixel_width)
        grid = 2 * coords.flip(-1).expand(len(latents), 1, -1, -1) - 1
        colours = torch.nn.functional.grid_sample(latents, grid, "bilinear", "border", align_corners=False)
        return colours[:, :, 0].transpose(1, 2)

    def own_pixels(self, latents, chunk=None):
        return self.decode(latents, self.own_coords, chunk).transpose(1, 2).unflatten(2, (8, 8))

    def decode_finer(self, latents, own, coords, pixel_width, chunk=None):
        assert torch.allclose(own, latents, atol=1e-6)
        return self.decode(latents, coords, chunk, pixel_width.item())


@pytest.mark.parametrize(("size", "scale"), [((8, 8), 2), ((5, 3), 4), ((31, 20), 3), ((40, 17), 2.5), ((16, 24), 1)])
def test_super_resolve_leaves_no_seam(nb, size, scale):
    pixels = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, model = TF.to_pil_image(pixels), Interpolation()
    result = enlarge.super_resolve(model, image, scale, chunk=100)
    height, width = (round(scale * n) for n in size)
    assert result.size == (width, height)
    assert model.widths == {1 / (scale * 8)}
    # One interpolation of the whole image, at the centres of the result's pixels.
    rows, columns = ((torch.arange(n) + 0.5) / (scale * m) for n, m in zip((height, width), size))
    whole = model.decode(pixels[None] / 255, torch.cartesian_prod(rows, columns))[0].T.view(3, height, width)
    assert (255 * whole - torch.from_numpy(np.array(result)).permute(2, 0, 1)).abs().max() <= 0.501


def test_super_resolve_says_which_models_it_takes(nb):
    model = Interpolation()
    model.image_size = 12
    with pytest.raises(ValueError, match="image_size = 12 is no multiple of 8"):
        enlarge.super_resolve(model, Image.new("RGB", (12, 12)), 2)


@pytest.mark.parametrize("scale", [0.5, 0, -1, float("nan"), 600])
def test_super_resolve_says_which_scales_it_takes(nb, scale):
    with pytest.raises(ValueError, match=r"of 8×8 pixels: at least 1, and at most 4096 a side"):
        enlarge.super_resolve(Interpolation(), Image.new("RGB", (8, 8)), scale)


def test_enlargements_are_scored_against_the_truth(nb):
    truth = torch.rand(5, 3, 16, 16)
    inputs = (255 * torch.nn.functional.avg_pool2d(truth, 2)).round().byte()
    scores = nb.enlargement_scores(Interpolation(nb.HistoSpline(8)), inputs, truth, 1, 2, 100)
    for name, method in [("nearest", "NEAREST"), ("bicubic", "BICUBIC"), ("lanczos", "LANCZOS")]:
        large = [TF.to_pil_image(x).resize((16, 16), Image.Resampling[method]) for x in inputs]
        values = nb.psnr(torch.stack([TF.to_tensor(x) for x in large]), truth)
        assert scores[name] == pytest.approx(values.mean().item(), abs=1e-3)
    linear = torch.nn.functional.interpolate(inputs / 255, size=16, mode="bilinear", align_corners=False)
    error = inputs / 255 - torch.nn.functional.avg_pool2d(linear, 2)
    spread = nb.HistoSpline(8)(error, nb.pixel_grid(16)[None], torch.tensor([1 / 16]))
    linear = (linear + spread.transpose(1, 2).unflatten(2, (16, 16))).clamp(0, 1)  # as decode_grid does
    assert scores["model"] == pytest.approx(nb.psnr(linear, truth).mean().item(), abs=1e-3)
    back = torch.nn.functional.avg_pool2d(linear, 2)
    assert scores["consistency"] == pytest.approx(nb.psnr(back, inputs / 255).mean().item(), abs=0.5)  # near 80 dB


def test_seams_of_a_mosaic_do_not_count(nb):
    inputs, truth = nb.mosaic(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), 2, 2)
    model = Interpolation(nb.HistoSpline(8))
    before = nb.enlargement_scores(model, inputs, truth, 2, 1, 100)
    truth[..., 4:12, :] = 0.5  # two pixels of the input on each side of the seam
    assert nb.enlargement_scores(model, inputs, truth, 2, 1, 100) == before
    truth[..., 3, 3] += 0.1
    assert nb.enlargement_scores(model, inputs, truth, 2, 1, 100) != before


def test_photographs_are_cropped_for_enlargement(nb):
    crops = nb.photograph_crops()
    assert (crops.shape, crops.dtype) == ((33, 3, 256, 256), torch.uint8)
    assert torch.equal(nb.photograph_crops(limit=2), crops[[0, 32]])
    assert torch.equal(nb.photograph_crops(limit=50), crops)


def test_the_program_refuses_a_wrong_setting(run_script):
    process = run_script(EPOCH=3)
    assert process.returncode == 1
    assert "MAMBA_GINR_EPOCH is not a setting of this notebook" in process.stderr


@pytest.mark.parametrize("settings", [{"SMALL": 1}, {"SMALL": 0, "TRAIN": 0}], ids=["small", "pretrained"])
def test_only_a_full_run_writes_beside_the_notebook(run_script, settings, tmp_path):
    process = run_script(**settings, OUTPUT_DIR=".")
    assert process.returncode == 1
    assert "set OUTPUT_DIR to another folder" in process.stderr
    assert list(tmp_path.iterdir()) == []


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


def test_an_unknown_decoder_is_named(run_script):
    process = run_script(DECODER="residual")
    assert process.returncode == 1
    assert "DECODER = 'residual': choose one of lainr, gaussian, scent, hybrid" in process.stderr


@pytest.mark.parametrize("decoder", ["lainr", "hybrid"])
def test_results_name_their_data_and_decoder(run_script, decoder, tmp_path):
    write_images(tmp_path / "my photos", {"train/a": 20, "test/a": 8})
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
    last = process.stdout.strip().split("\n")[-1]
    assert re.match(r"my photos \(folder\): 0\.\d M parameters, 2 epochs of 16 images", last), last

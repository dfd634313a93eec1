"""A run that falls: what is a fall and what is none, going back, and falls around an interrupt."""

import math
import re
import signal

import pytest
import torch
from tiny_runs import STEPS, state_in, tensors


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


@pytest.fixture
def look(nb, tiny, batch_of, tmp_path):
    """A run, and ``look(loss)``: as many steps of that loss as it takes for a look."""
    model, batch = tiny(), batch_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8))
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    step(batch, 1e-3)
    run = nb.Run(step, 10_000, {}, tmp_path)

    def look(loss):
        for _ in range(run.WATCH):
            run.record(torch.full((2,), loss))

    return run, look


def test_losses_that_rise_with_the_rate_are_no_fall(look):
    """After a fall the rate is halved, the losses go down with it, and up again: to where they were, and no further."""
    (run, look), usual = look, 3e-5
    look(usual), look(usual), look(100 * usual)
    assert (run.returns, run.caution) == (1, 0.5)
    for _ in range(11):
        look(usual * run.caution**3)  # −9 dB at half the rate
    assert (run.returns, run.falls, run.caution) == (1, 0, 1)
    look(usual / 10)  # at the whole rate what is lower counts
    look(usual)
    assert (run.returns, run.falls, run.caution) == (2, 1, 0.5)


def test_where_the_rate_is_halved_a_fall_is_still_seen(look, capsys):
    (run, look), usual = look, 3e-5
    look(math.nan)  # before any loss is known
    assert (run.returns, run.caution) == (1, 0.5)
    look(usual)
    assert run.reference == pytest.approx(10 * math.log10(usual) + 10)
    look(10 * usual)
    assert run.returns == 1
    look(100 * usual)  # 20 dB: above the 10 of a halved rate by more than 6
    assert (run.returns, run.falls) == (2, 1)
    assert "the loss was 10 dB above its lowest" in capsys.readouterr().out
    for _ in range(8):
        look(usual / 100)  # a long time at lower rates
        look(math.nan)
    assert run.caution < 0.5
    look(usual / 100), look(1000 * usual)
    assert run.falls == 1


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

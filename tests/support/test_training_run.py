"""A run: interrupted and resumed, finished and read back, its state and its best weights."""

import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import SETTINGS, STEPS, state_in, tensors, without_times

from mamba_ginr import checkpoints, progress, training_run


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


def test_a_finished_run_is_read_back_not_repeated(nb, start, monkeypatch, tmp_path):
    first = start(tmp_path)
    monkeypatch.setattr(nb, "learning_rate", lambda *_: pytest.fail("a step was trained"))
    assert start(tmp_path).history == first.history


def test_a_state_of_another_configuration_is_refused_and_kept(nb, start, tmp_path):
    start(tmp_path, {"DIM": 16, "SEED": 0})
    path = tmp_path / "checkpoints/mamba_ginr_state.pth"
    before = path.read_bytes()
    with pytest.raises(checkpoints.CheckpointError, match="SEED is 0 there and 1 here") as error:
        start(tmp_path, {"DIM": 16, "SEED": 1})
    assert str(path) in str(error.value)
    assert "move the file away or set another OUTPUT_DIR" in str(error.value)
    assert "DIM" not in str(error.value)
    assert path.read_bytes() == before


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


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [1, 2, 3, 4]), (1e9, [1, 4])])
def test_states_are_written_at_most_so_often_and_at_the_end(start, monkeypatch, seconds, expected, tmp_path):
    written, save = [], checkpoints.Saver.save

    def spy(saver, files):
        written.append(files)
        save(saver, files)

    monkeypatch.setattr(checkpoints.Saver, "save", spy)
    monkeypatch.setattr(training_run.Run, "SAVE_EVERY", seconds)
    run = start(tmp_path, EPOCHS=4)
    assert [files[run.state_path]["epoch"] for files in written] == expected
    best = max(run.history, key=lambda row: row["psnr_mean"])
    assert run.load_best()[1]["metrics"] == best
    assert [files[run.best_path]["metrics"] for files in written if run.best_path in files][-1] == best


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


def test_the_best_weights_of_an_epoch_without_a_loss_are_the_runs_own(start, tmp_path):
    run = start(tmp_path)
    best = torch.load(run.best_path, weights_only=True)
    row = run.history[best["metrics"]["epoch"] - 1]
    best["metrics"]["train_loss"] = row["train_loss"] = math.nan  # all its steps were of a fall
    torch.save(best, run.best_path)
    assert run.load_best()[1]["metrics"]["epoch"] == row["epoch"]


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


def test_weights_that_took_part_of_a_state_are_not_taken_for_new_ones(nb, tiny, data, start, tmp_path):
    """As after an edit of cell 6: the state does not fit, is moved away as it says, and cell 11 is run again."""

    def train(model, folder):
        nb.train(model, data, SimpleNamespace(**SETTINGS), {"DIM": 16}, folder)

    start(tmp_path)
    model = tiny()
    model.decoder.extra = torch.nn.Linear(2, 2)
    with pytest.raises(checkpoints.CheckpointError, match=r"to train anew, move it away and run cell 10 again"):
        train(model, tmp_path)
    (tmp_path / "checkpoints/mamba_ginr_state.pth").unlink()
    with pytest.raises(ValueError, match=r"these weights are trained already, .* run cell 10 for new ones"):
        train(model, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt("stop"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_state_that_was_read_in_part_is_kept_and_the_model_is_no_new_one(
    nb, tiny, data, start, monkeypatch, error, tmp_path
):
    def fails(*_):
        raise error

    start(tmp_path)
    model, s = tiny(), SimpleNamespace(**SETTINGS)
    with monkeypatch.context() as context:
        context.setattr(nb.TrainingStep, "load_state_dict", fails)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else checkpoints.CheckpointError
        with pytest.raises(
            expected, match="stop" if expected is KeyboardInterrupt else "is whole, but there is too little memory"
        ):
            nb.train(model, data, s, {"DIM": 16}, tmp_path)
    (tmp_path / "checkpoints/mamba_ginr_state.pth").rename(tmp_path / "away.pth")
    with pytest.raises(ValueError, match="these weights are trained already"):
        nb.train(model, data, s, {"DIM": 16}, tmp_path)


def test_a_folders_state_from_before_there_were_checksums_goes_on(start, tmp_path):
    start(tmp_path, {"data": "mine (folder)"})
    start(tmp_path, {"data": "mine (folder), checksum 0123abcd"})
    start(tmp_path / "new", {"data": "mine (folder), checksum 0123abcd"})
    with pytest.raises(
        checkpoints.CheckpointError, match=r"checksum 0123abcd there and mine .* checksum 89abcdef here"
    ):
        start(tmp_path / "new", {"data": "mine (folder), checksum 89abcdef"})


@pytest.mark.parametrize("name", ["price_$10_$20 (folder)", "50%$_$x", "$a$"])
def test_the_datas_name_may_hold_anything(nb, tiny, data, name, tmp_path):
    data.name = name
    nb.train(tiny(), data, SimpleNamespace(**{**SETTINGS, "EPOCHS": 2}), {"DIM": 16}, tmp_path)
    assert (tmp_path / "figures/psnr_curves.png").stat().st_size > 10_000


def test_a_state_that_another_run_wrote_meanwhile_is_not_overwritten(nb, start, monkeypatch, tmp_path):
    """Between the reading of the state and the lock."""
    begin = progress.Progress.__init__

    def late(self, run, *rest):
        begin(self, run, *rest)
        monkeypatch.setattr(progress.Progress, "__init__", begin)
        start(tmp_path)

    monkeypatch.setattr(progress.Progress, "__init__", late)
    with pytest.raises(checkpoints.CheckpointError, match=r"another run has written .*_state\.pth since this one read"):
        start(tmp_path)
    assert state_in(tmp_path)["epoch"] == SETTINGS["EPOCHS"]


def test_a_run_in_another_thread_is_the_same(start, tmp_path):
    """Python hears signals in its main thread only, which web notebooks and schedulers may not give to a run."""
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(start, tmp_path / "there").result()
    assert signal.getsignal(signal.SIGINT) is before
    assert without_times(there.history) == without_times(start(tmp_path / "here").history)


def test_an_interrupt_of_a_run_in_another_thread_is_the_main_threads():
    held, let_go, heard = threading.Event(), threading.Event(), []

    def run():
        with progress.deferred_interrupt() as interrupted:
            held.set()
            assert let_go.wait(60)
            heard.append(interrupted())

    thread = threading.Thread(target=run)
    thread.start()
    assert held.wait(60)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    let_go.set()
    thread.join()
    assert heard == [False]


def test_a_handler_that_is_not_pythons_is_no_error(monkeypatch):
    before, set_handler = signal.getsignal(signal.SIGINT), signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_handler(number, handler) and None)
    with progress.deferred_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_fails_at_the_start_of_a_run_leaves_no_lock_and_no_handler(start, monkeypatch, tmp_path):
    start(tmp_path)
    before = signal.getsignal(signal.SIGINT)

    def fails(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "show", fails)
        with pytest.raises(OSError, match="disk full") as error:  # held, as a notebook holds its last error
            start(tmp_path)
    assert start(tmp_path).epoch == SETTINGS["EPOCHS"]
    assert signal.getsignal(signal.SIGINT) is before
    assert error.value


def test_a_state_that_another_run_writes_is_refused(start, tmp_path):
    with checkpoints.only_writer(tmp_path / "checkpoints/mamba_ginr_state.pth"):
        with pytest.raises(checkpoints.CheckpointError, match=r"another run is writing .*mamba_ginr_state\.pth"):
            start(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert start(tmp_path).epoch == SETTINGS["EPOCHS"]


def test_states_from_before_the_head_could_do_without_latents_are_of_a_head_that_reads_them(start, tmp_path):
    start(tmp_path, identity={"DIM": 16}, EPOCHS=2)
    assert start(tmp_path, identity={"DIM": 16, "HEAD_LATENTS": True}, EPOCHS=2).epoch == 2
    with pytest.raises(checkpoints.CheckpointError, match="HEAD_LATENTS is True there and False here"):
        start(tmp_path, identity={"DIM": 16, "HEAD_LATENTS": False}, EPOCHS=2)

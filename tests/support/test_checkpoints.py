"""Checkpoints: written whole or not at all, read back, spoilt, and of other versions."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image

from mamba_ginr import checkpoints, figures


def test_a_state_is_written_in_the_background_and_what_fails_is_told(nb, monkeypatch, tmp_path):
    begun, let_go = threading.Event(), threading.Event()
    write = nb.save_atomically

    def slowly(path, write_to):
        begun.set()
        assert let_go.wait(60)
        write(path, write_to)

    monkeypatch.setattr(checkpoints, "save_atomically", slowly)
    saver, path, weights = checkpoints.Saver(), tmp_path / "state.pth", torch.zeros(3)
    saver.save({path: {"weights": weights}})
    assert begun.wait(60)
    weights += 1  # the next step
    assert not path.exists()
    let_go.set()
    saver.close()
    assert torch.load(path, weights_only=True)["weights"].tolist() == [0, 0, 0]

    def fails(path, write_to):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_atomically", fails)
    saver.save({path: {"weights": weights}})
    with pytest.raises(OSError, match="disk full"):
        saver.close()
    saver.save({path: {"weights": weights}})
    saver.pending.exception()  # waits for it
    monkeypatch.setattr(checkpoints, "save_atomically", write)  # there is room again
    with pytest.raises(OSError, match="disk full"):
        saver.save({path: {"weights": weights}, tmp_path / "second.pth": {"weights": 2 * weights}})
    saver.close()
    assert torch.load(path, weights_only=True)["weights"].tolist() == [1, 1, 1]
    assert torch.load(tmp_path / "second.pth", weights_only=True)["weights"].tolist() == [2, 2, 2]


def test_a_saved_model_gives_the_same_values(nb, tiny, tmp_path):
    model = tiny(seed=5).eval()
    checkpoints.save_model(tmp_path / "m.pth", model, {"SEED": 5}, {"psnr_mean": 1.0})
    loaded, checkpoint = nb.load_model(tmp_path / "m.pth")
    images, coords = torch.rand(1, 3, 8, 8), nb.pixel_grid(8)[::7]
    torch.nn.init.normal_(model.head.to_rgb.weight)
    checkpoints.save_model(tmp_path / "trained.pth", model, {}, {})
    with torch.no_grad():
        assert torch.equal(model(images, coords), loaded(images, coords))
        finer = model(images, coords, 1 / 32), nb.load_model(tmp_path / "trained.pth")[0](images, coords, 1 / 32)
    assert torch.allclose(*finer, atol=5e-3)  # the head is kept in float16
    assert not loaded.training
    assert checkpoint["settings"] == {"SEED": 5}


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
    """So do those from before the head could do without latents, and from before the positional encoding's scale."""
    model = tiny()
    model.config = {**model.config, "decoder": "residual"}
    del model.config["head_latents"], model.config["position_scale"]
    checkpoints.save_model(tmp_path / "old.pth", model, {}, {})
    old, checkpoint = nb.load_model(tmp_path / "old.pth")
    assert old.config["decoder"] == checkpoint["config"]["decoder"] == "lainr"
    assert old.config["position_scale"] == 1
    assert nb.MambaGINR().config["position_scale"] == 8
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
    assert len(list(tmp_path.iterdir())) == 2  # and the unfinished one, which a save removes when it is old


def test_a_save_that_fails_leaves_the_old_file(nb, tmp_path):
    path = tmp_path / "file"
    nb.save_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        nb.save_atomically(path, lambda file: file.write(b"new" * (1 // 0)))
    assert path.read_bytes() == b"old"
    nb.save_atomically(path, lambda file: file.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"new"


def test_two_that_write_one_file_at_once_leave_one_of_theirs(tmp_path):
    path = tmp_path / "results.json"

    def first(file):
        file.write(b"A" * 100)
        checkpoints.save_atomically(path, lambda other: other.write(b"B" * 50))
        assert path.read_bytes() == b"B" * 50
        file.write(b"A" * 100)

    checkpoints.save_atomically(path, first)
    assert path.read_bytes() == b"A" * 200
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path):
    for name in (".a[1].pth.unfinished", ".a[1].pth.77.unfinished", ".a[1].pth.78.unfinished", ".b.pth.77.unfinished"):
        (tmp_path / name).write_bytes(b"half")
        if "78" not in name:
            os.utime(tmp_path / name, 2 * (time.time() - 4000,))
    checkpoints.save_atomically(tmp_path / "a[1].pth", lambda file: file.write(b"new"))
    assert {p.name for p in tmp_path.iterdir()} == {".a[1].pth.78.unfinished", ".b.pth.77.unfinished", "a[1].pth"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_broken(error, reason, monkeypatch, tmp_path):
    path = tmp_path / "state.pth"
    path.write_bytes(b"whole")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(checkpoints.CheckpointError, match=rf"cannot be read \({reason}\).* leave it where it is"):
        checkpoints.read_checkpoint(path, "training state")


def test_a_path_through_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "best.pth").write_bytes(b"a file")
    with pytest.raises(checkpoints.CheckpointError, match=r"best\.pth/x does not exist"):
        checkpoints.read_checkpoint(tmp_path / "best.pth/x", "model")


def a_full_device(path, monkeypatch):
    monkeypatch.setattr(checkpoints.secrets, "token_hex", lambda _: "0")
    path.with_name(f".{path.name}.0.unfinished").symlink_to("/dev/full")


def a_full_disk(path, monkeypatch):
    """A file that takes 1000 bytes."""
    recorder = checkpoints._Recorder

    def full(file):
        write, room = file.write, [1000]

        def some(data):
            room[0] -= len(memoryview(data).cast("B"))
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(data)

        wrapped = recorder(file)
        wrapped.file = type("Full", (), {"write": staticmethod(some), "flush": file.flush})()
        return wrapped

    monkeypatch.setattr(checkpoints, "_Recorder", full)


def check_full(path, write, cause):
    old = path.read_bytes()
    with pytest.raises(
        OSError, match=r"cannot be written: .*The one that was there is whole.*Free some space"
    ) as error:
        write()
    assert str(path) in str(error.value)
    assert cause in str(error.value)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("full", [a_full_device, a_full_disk])
def test_a_full_disk_is_named_and_nothing_unfinished_stays(full, size, monkeypatch, tmp_path):
    """Though torch.save may raise a RuntimeError of its file format in its place."""
    path = tmp_path / "state.pth"
    checkpoints.save_atomically(path, lambda file: torch.save({"old": 1}, file))
    full(path, monkeypatch)
    check_full(
        path,
        lambda: checkpoints.save_atomically(path, lambda file: torch.save(torch.zeros(size), file)),
        "No space left on device",
    )
    assert torch.load(path, weights_only=True) == {"old": 1}


def test_a_file_that_may_not_grow_is_named(tmp_path):
    """In a process of its own: the limit is the whole process's, and this one writes the tests' report."""
    path = tmp_path / "state.pth"
    program = f"""
import resource, torch
from pathlib import Path
from mamba_ginr import checkpoints
path = Path({str(path)!r})
checkpoints.save_atomically(path, lambda file: file.write(b"old"))
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    checkpoints.save_atomically(path, lambda file: torch.save(torch.zeros(100_000), file))
except OSError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert f"{path} cannot be written: " in output.stdout
    assert "File too large" in output.stdout
    assert "The one that was there is whole, the unfinished file is removed. Free some space" in output.stdout
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.pth"]


def test_a_full_disk_is_named_for_states_and_figures_too(monkeypatch, tmp_path):
    path = tmp_path / "psnr.png"
    path.write_bytes(b"old")
    a_full_device(path, monkeypatch)
    check_full(path, lambda: figures.show(figures.Figure(figsize=(1, 1)), path), "No space left on device")
    saver = checkpoints.Saver()
    a_full_device(path, monkeypatch)
    saver.save({path: {"weights": torch.zeros(1000)}})
    check_full(path, saver.close, "No space left on device")


def test_an_interrupted_save_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_atomically(path, interrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(OSError, match=r"x\.png cannot be written: .*Nothing is there.*set OUTPUT_DIR to another"):
        checkpoints.save_atomically(tmp_path / "figures/x.png", lambda file: file.write(b"new"))


def test_two_processes_do_not_write_one_state(tmp_path):
    program = f"""
import time
from pathlib import Path
from mamba_ginr.checkpoints import only_writer
with only_writer(Path({str(tmp_path / "new/state.pth")!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(
            checkpoints.CheckpointError, match=r"another run is writing .*state\.pth, .*set OUTPUT_DIR to another"
        ):
            with checkpoints.only_writer(tmp_path / "new/state.pth"):
                pytest.fail("both write")
        with checkpoints.only_writer(tmp_path / "new/state_hybrid.pth"):  # another decoder's
            pass
        process.kill()
    for _ in range(2):  # the lock goes with the process, and with the end of a run
        with checkpoints.only_writer(tmp_path / "new/state.pth"):
            assert [p.name for p in (tmp_path / "new").iterdir()] == [".state.pth.lock"]
        assert list((tmp_path / "new").iterdir()) == []


def test_a_drive_without_locks_or_fsync_takes_a_run(monkeypatch, tmp_path):
    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(checkpoints.fcntl, "flock", unknown)
    monkeypatch.setattr(os, "fsync", unknown)
    with checkpoints.only_writer(tmp_path / "state.pth"):
        checkpoints.save_atomically(tmp_path / "state.pth", lambda file: file.write(b"new"))
    assert (tmp_path / "state.pth").read_bytes() == b"new"
    monkeypatch.setattr(checkpoints, "fcntl", None)  # Windows
    with checkpoints.only_writer(tmp_path / "state.pth"):
        pass

    def full(*_):  # some drives say so only now
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"state\.pth cannot be written: No space left"):
        checkpoints.save_atomically(tmp_path / "state.pth", lambda file: file.write(b"newer"))
    assert (tmp_path / "state.pth").read_bytes() == b"new"


def test_weights_of_another_image_size_are_refused_with_the_size_to_set(nb, tiny, tmp_path):
    checkpoints.save_model(tmp_path / "m.pth", tiny(), {}, {})
    assert nb.load_model(tmp_path / "m.pth", "cpu", 8)[0].image_size == 8
    with pytest.raises(checkpoints.CheckpointError, match="for images of 8×8 pixels: set IMAGE_SIZE = 8, not 32"):
        nb.load_model(tmp_path / "m.pth", "cpu", 32)

"""Several processes train as one: the same batches, losses and weights; stopped, killed or failing, they end together.

Two processes of gloo on the CPU stand for two GPUs.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import twenty_steps
from conftest import NOTEBOOK, ROOT, notebook_cells
from tiny_runs import tensors

from mamba_ginr import checkpoints, parallel

TINY = {
    "SMALL": 1, "DATASET": "photos", "DIM": 8, "DEPTH": 1, "D_STATE": 2, "DECODER_DIM": 16, "HEAD_BLOCKS": 1,
    "BATCH_SIZE": 4, "EPOCHS": 3, "HELD_OUT": 4, "SR_QUERIES": 16, "MAX_TRAIN_IMAGES": 120, "MAX_TEST_IMAGES": 8,
}  # fmt: skip
STEPS = 30  # an epoch of 120 images
STATE = "runs/small/checkpoints/mamba_ginr_state.pth"
END = 'print("The rest:", processes())'


def launch(folder, cells, **environment) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "mamba_ginr.launch", str(ROOT / "tests/twenty_steps.py"), "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "CELLS": str(cells), "OUT": str(folder), **environment}
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def two(script, tmp_path_factory):
    """What two processes did."""
    folder = tmp_path_factory.mktemp("two")
    process = launch(folder, script)
    assert process.returncode == 0, process.stderr
    assert (process.stdout.count("printed by one\n"), process.stderr) == (1, "printed by one\n")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(nb):
    """What one process does; in one thread as each of the two, so that a busy machine does not make them wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield twenty_steps.run(nb)
    torch.set_num_threads(threads)


def test_two_processes_train_as_one(one, two):
    assert torch.equal(two[0]["losses"], two[1]["losses"])
    assert torch.allclose(two[0]["losses"], one["losses"], rtol=1e-5, atol=0)
    for name, expected in one["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        assert (two[0]["weights"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
    moved = [(w - one["before"][name]).norm() > 1e-3 * w.norm() for name, w in one["weights"].items() if w.dim() > 1]
    assert sum(moved) > 20  # matrices by Muon and others by AdamW, by far more than that


def test_their_batches_are_shares_of_one(one, two):
    for i, batch in enumerate(one["batches"]):
        for k, whole in enumerate(batch):
            shares = [two[rank]["batches"][i][k] for rank in (0, 1)]
            assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)
            assert len(whole) == (6, 2, 2, 2, 2)[k]


def test_batches_without_equal_shares_are_refused(nb, monkeypatch):
    sampler = SimpleNamespace(batch_size=64, mosaics=24, steps=1)
    assert parallel.shared(sampler) is sampler
    monkeypatch.setattr(parallel, "_group", parallel._Group(0, 4))
    assert parallel.shared(sampler).sampler is sampler
    monkeypatch.setattr(parallel, "_group", parallel._Group(0, 3))
    message = r"BATCH_SIZE = 64 makes 40 images .* and 24 mosaics, .*GPUS = 3 .*multiples of 3, or GPUS to another"
    with pytest.raises(ValueError, match=message):
        parallel.shared(sampler)


def test_one_process_is_left_as_it_is(tiny):
    assert (parallel.processes(), parallel.is_first()) == (1, True)
    errors, model = torch.rand(2, requires_grad=True), tiny()
    assert parallel.mean_of_all(errors) is errors
    parallel.average_gradients(model)
    parallel.check_weights(model)
    parallel.end_others()
    assert [parallel.any_of_all(flag, 1) for flag in (True, False)] == [True, False]
    program = "import torch, mamba_ginr.progress; print(torch.distributed.is_initialized())"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout == "False\n"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_train_as_one_with_cuda_graphs(nb, script, tmp_path):
    process = launch(tmp_path, script, COMPILED="1")
    assert process.returncode == 0, process.stderr
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(two[0]["losses"], two[1]["losses"])
    assert torch.allclose(two[0]["losses"], twenty_steps.run(nb, compiled=True)["losses"], rtol=1e-3, atol=0)


def cells() -> list[str]:
    """Cells 1 to 11, without the lines that end 2 to 9 with a check."""
    sources = [cell["source"] for cell in notebook_cells("code")[:11]]
    return [source.split("\n\nif __name__ ==")[0] for source in sources[:9]] + sources[9:]


@pytest.fixture
def places():
    """The folder in which temporary folders are made; short, as run_notebook.py asks for."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def begin(places, tmp_path):
    """Start the notebook to its cell 11, with one line after it, in a number of processes; what it may change first."""
    begun = []

    def run(gpus=2, change=lambda source: source, **settings):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(change(source)) for source in (*cells(), END)])
        nbformat.write(nb, tmp_path / NOTEBOOK.name)
        environment = {**os.environ, "TMPDIR": str(places), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        environment |= {f"MAMBA_GINR_{name}": str(value) for name, value in {**TINY, **settings}.items()}
        command = [sys.executable, str(ROOT / "run_notebook.py"), "--gpus", str(gpus), str(tmp_path / NOTEBOOK.name)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        begun.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **streams))
        return begun[-1]

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(process, pattern: str) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError("".join(lines) + process.stderr.read())


def pid_of(rank: int, folder) -> int:
    (path,) = folder.glob(f"mamba-ginr-*/{rank}.pid")
    return int(path.read_text())


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def written(folder) -> set:
    return {p.name for p in (folder / "runs").rglob("*") if p.is_file()}


FILES = {"mamba_ginr_state.pth", "mamba_ginr_best.pth", "psnr_curves.png"}


def test_a_stopped_run_goes_on_with_another_number_of_processes(begin, places, tmp_path):
    process = begin(EPOCHS=3)
    until(process, "^ +1 ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(
        r"\nKeyboardInterrupt: saved after step \d+ of epoch [23]: the same command \(make run GPUS=2\) goes on\n", err
    )
    state = checkpoints.read_checkpoint(tmp_path / STATE, "training state")
    assert state["step"]
    assert (state["epoch"] * STEPS + state["step"]) % parallel.ASK_EVERY == 0
    assert written(tmp_path) == FILES
    assert list(places.iterdir()) == []

    (tmp_path / "part.py").write_text("\n\n".join(cells()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {f"MAMBA_GINR_{name}": str(value) for name, value in TINY.items()}
    command = [sys.executable, "part.py"]
    one = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert one.returncode == 0, one.stderr
    assert f"Resumed from mamba_ginr_state.pth: {state['epoch']} epochs and {state['step']} steps" in one.stdout
    resumed = checkpoints.read_checkpoint(tmp_path / STATE, "training state")

    whole = begin(EPOCHS=3, OUTPUT_DIR="runs/whole")
    out, err = whole.communicate(timeout=60)
    assert (whole.returncode, err) == (0, "")
    assert out.count("The rest: 2\n") == 1  # by the first alone
    assert out.count("\n     3 ") == 1
    expected = checkpoints.read_checkpoint(tmp_path / "runs/whole" / STATE.partition("small/")[2], "training state")
    assert resumed["epoch"] == expected["epoch"] == 3
    assert resumed["history"][-1]["psnr_mean"] == pytest.approx(expected["history"][-1]["psnr_mean"], abs=1e-3)
    found, expected = tensors(resumed["average"]), tensors(expected["average"])
    assert all((found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6 for name in expected)


def test_a_killed_process_ends_the_others(begin, places, tmp_path):
    process = begin(EPOCHS=100)
    until(process, "^ +2 ")
    pids = [pid_of(rank, places) for rank in (0, 1)]
    os.kill(pids[0], signal.SIGKILL)  # the other sees that, too, and is not to be named
    begun = time.perf_counter()
    _, err = process.communicate(timeout=60)
    assert time.perf_counter() - begun < 10
    assert process.returncode == 1
    assert err == (
        "\nProcess 0 of 2 was killed by SIGKILL (signal 9). Often memory was short. The others were ended. What "
        "was saved last is whole: the same command (make run GPUS=2) goes on from it.\n"
    )
    assert checkpoints.read_checkpoint(tmp_path / STATE, "training state")["epoch"] >= 1
    assert all(map(ended, pids))


def test_a_process_out_of_memory_ends_the_others(begin):
    short = 'if epoch and os.environ["RANK"] == "1": raise torch.OutOfMemoryError("CUDA out of memory.\\nMore")'
    line = "                lr = learning_rate("
    process = begin(EPOCHS=100, change=lambda source: source.replace(line, f"{line[:16]}{short}\n{line}"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == (
        "\nProcess 1 of 2 stopped with OutOfMemoryError: CUDA out of memory. Lower BATCH_SIZE or EVAL_BATCH. The "
        "others were ended. What was saved last is whole: the same command (make run GPUS=2) goes on from it.\n"
    )

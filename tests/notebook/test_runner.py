"""run_notebook.py anywhere: from other folders, in terminals with few characters, told to end, and what it refuses."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from notebook_checks import without_farewell

import run_notebook

HELLO = "# Cell 1: Hello\nimport os, sys\nprint('−×…', os.getcwd(), sys.executable)"
# In many short waits, as training waits: Python looks for an interrupt before it goes to sleep, not in it, so that one
# which comes between the two is heard when the sleep is over.
WAIT = """# Cell 1: Training
import time
try:
    print("running", flush=True)
    for _ in range(6000):
        time.sleep(0.01)
except KeyboardInterrupt:
    print("saved")
    raise
"""


def write_notebook(path, *sources, kernel="python3") -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def sockets(tmp_path_factory):
    """The folder in which temporary folders are made; short, as a socket's path must be."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def begin(sockets, tmp_path):
    """Start run_notebook.py, from a folder that is not the notebook's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    begun = []

    def run(*arguments, program=(str(ROOT / "run_notebook.py"),), **environment):
        begun.append(
            subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                cwd=elsewhere,
                env={**os.environ, "TMPDIR": str(sockets), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
            )
        )
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def end(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, without_farewell(err)


def outputs(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", ()))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("sys.stderr.flush()", "RuntimeError: the event loop is closed"),
        ('self._publish_status_and_flush("idle", "control", self.control_stream)', "zmq.error.ZMQError: Not a socket"),
    ],
)
def test_what_a_kernel_says_of_its_own_end_is_left_out_and_nothing_else(line, error):
    def report(place: str) -> str:
        return (
            "ERROR:tornado.general:Uncaught exception in ZMQStream callback\nTraceback (most recent call last):\n"
            f'  File "site-packages/ipykernel/kernelbase.py", line 409, in {place}\n    {line}\n{error}\n'
        )

    assert without_farewell("before\n" + report("process_control") + "after\n") == "before\nafter\n"
    assert without_farewell(report("dispatch_shell")) == report("dispatch_shell")


def test_two_runs_from_another_folder_with_spaces_and_other_letters(begin, sockets, tmp_path):
    """At once, one in a terminal that has no such letters."""
    notebook = write_notebook(tmp_path / "ein Ordner ü/mein Heft é.ipynb", HELLO, kernel="a kernel of another machine")
    first, second = begin(notebook), begin(notebook, tmp_path / "second.ipynb", PYTHONIOENCODING="ascii")
    status, out, err = end(first)
    assert (status, err) == (0, "")
    assert out == f"── Cell 1: Hello\n−×… {notebook.parent} {sys.executable}\n"
    assert outputs(tmp_path / "elsewhere/runs/mein Heft é.ipynb") == out.split("\n", 1)[1]
    status, question_marks, err = end(second)
    assert (status, err) == (0, "")
    assert question_marks == out.encode("ascii", "replace").decode()
    assert outputs(tmp_path / "second.ipynb") == out.split("\n", 1)[1]
    assert list(sockets.iterdir()) == []
    assert [p.name for p in notebook.parent.iterdir()] == [notebook.name]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_tells_a_run_to_end_lets_the_cell_save(begin, sockets, name, tmp_path):
    """Ctrl-C, a scheduler or a container that stops, a terminal that closes."""
    process = begin(write_notebook(tmp_path / "a.ipynb", WAIT, HELLO))
    assert process.stdout.readline() + process.stdout.readline() == "── Cell 1: Training\nrunning\n"
    number = getattr(signal, name)
    process.send_signal(number)
    status, out, err = end(process)
    assert status == 128 + number
    assert (out, err.strip()) == ("saved\n", "KeyboardInterrupt:")
    assert outputs(tmp_path / "elsewhere/runs/a.ipynb") == "running\nsaved\n"
    assert list(sockets.iterdir()) == []


def test_where_the_system_has_no_signal_handlers_of_asyncio(begin, tmp_path):
    """As on Windows: the interrupt still reaches the cell."""
    program = f"""
import asyncio.unix_events, sys
def none(*_):
    raise NotImplementedError
asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = none
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from run_notebook import main
sys.exit(main(Path(sys.argv[1]), Path("executed.ipynb")))
"""
    process = begin(write_notebook(tmp_path / "a.ipynb", WAIT, HELLO), program=("-c", program))
    assert process.stdout.readline() + process.stdout.readline() == "── Cell 1: Training\nrunning\n"
    process.send_signal(signal.SIGINT)
    status, out, _ = end(process)
    assert (status, out) == (130, "saved\n")
    assert outputs(tmp_path / "elsewhere/executed.ipynb") == "running\nsaved\n"


def test_a_killed_run_leaves_nothing_in_the_folder_and_the_next_one_clears_up(begin, sockets, tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb", WAIT)
    process = begin(notebook)
    assert process.stdout.readline() + process.stdout.readline() == "── Cell 1: Training\nrunning\n"
    process.kill()
    process.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb", "elsewhere"]
    (left,) = sockets.iterdir()
    alive = begin(notebook)
    assert alive.stdout.readline() + alive.stdout.readline() == "── Cell 1: Training\nrunning\n"
    (second,) = set(sockets.iterdir()) - {left}
    for folder in (left, second):
        os.utime(folder, 2 * (time.time() - 3600,))
    status, _, err = end(begin(write_notebook(tmp_path / "b.ipynb", HELLO)))
    assert (status, err) == (0, "")
    assert list(sockets.iterdir()) == [second]  # of the one that still runs


def test_a_killed_kernel_is_told(begin, tmp_path):
    status, _, err = end(begin(write_notebook(tmp_path / "a.ipynb", "# Cell 1: End\nimport os\nos._exit(9)")))
    assert status == 1
    assert "The process that runs the cells was killed, often for want of memory." in err
    assert "Traceback" not in err


def test_a_home_that_cannot_be_written_and_a_long_temporary_path(begin, tmp_path):
    (tmp_path / "home").write_text("a file")
    long = tmp_path / ("long" * 25)
    long.mkdir()
    notebook = write_notebook(tmp_path / "a.ipynb", HELLO)
    status, out, _ = end(begin(notebook, HOME=str(tmp_path / "home"), TMPDIR=str(long)))
    assert status == 0
    assert "−×…" in out


def test_no_temporary_folder_is_told(monkeypatch, tmp_path):
    """As in a container whose file system is read-only."""

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    notebook = write_notebook(tmp_path / "a.ipynb", HELLO)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(SystemExit, match=r"No temporary folder can be made \(.*No usable.*\): set TMPDIR"):
        run_notebook.main(notebook, tmp_path / "out/b.ipynb")
    with pytest.raises(SystemExit, match=r"No temporary folder can be made"):
        run_notebook.main_on_several(notebook, 2)


def test_a_reader_that_goes_away_ends_no_run(begin, tmp_path):
    """As `make run | head` does."""
    process = begin(write_notebook(tmp_path / "a.ipynb", HELLO, *3 * ["print('more')"]))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) in (0, 120)  # 120: Python's, of output that could not be flushed
    assert outputs(tmp_path / "elsewhere/runs/a.ipynb").endswith("more\nmore\nmore\n")


@pytest.mark.parametrize(
    ("executed", "reason"),
    [("taken/a.ipynb", "File exists"), ("folder", "it is a folder"), ("/proc/nowhere/a.ipynb", "No such file")],
)
def test_a_copy_that_cannot_be_written_is_told_before_anything_runs(executed, reason, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    notebook = write_notebook(tmp_path / "a.ipynb", "open('ran', 'w')")
    with pytest.raises(
        SystemExit, match=rf"cannot be written to .* \({reason}.*\); nothing was run\. Give another path"
    ):
        run_notebook.main(notebook, tmp_path / executed)
    assert not (tmp_path / "ran").exists()
    assert not capsys.readouterr().out


def test_a_copy_that_cannot_be_written_at_the_end_keeps_the_old_one(monkeypatch, tmp_path):
    executed = tmp_path / "executed.ipynb"
    executed.write_text("old")

    def full(nb, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nbformat, "write", full)
    with pytest.raises(SystemExit, match=r"executed\.ipynb cannot be written \(No space left on device\)"):
        run_notebook.write(nbformat.v4.new_notebook(), executed)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("executed.ipynb", "old")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"a\.ipynb cannot be read \(No such file or directory\): name the notebook"),
        ("# a text", r"a\.ipynb is no notebook, or not a whole one \(Notebook does not appear to be JSON"),
        ('{"cells": [', r"a\.ipynb is no notebook, or not a whole one"),
        ("{}", r"a\.ipynb is no notebook, or not a whole one"),
    ],
)
def test_what_is_no_notebook_is_named(text, message, tmp_path):
    if text is not None:
        (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(SystemExit, match=message):
        run_notebook.main(tmp_path / "a.ipynb", tmp_path / "out/b.ipynb")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--gpus", "2"]], ids=["one", "several"])
def test_an_interrupt_before_the_first_cell_is_one_line(arguments, monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_notebook, "read", interrupted)
    assert run_notebook.run(arguments) == 130
    assert capsys.readouterr().err == "\nInterrupted while no cell was running.\n"


@pytest.mark.parametrize("arguments", [["--gpus"], ["--gpus", "two"], ["a", "b", "c"], ["--help"]], ids=" ".join)
def test_a_command_that_is_none_is_shown_how_it_is_written(arguments):
    with pytest.raises(SystemExit, match=r"usage: python run_notebook\.py \[--gpus N\]"):
        run_notebook.run(arguments)

"""Execute the notebook from top to bottom, with its output in the terminal, and keep the executed copy.

usage: python run_notebook.py [--gpus N] [NOTEBOOK [EXECUTED]]

NOTEBOOK is by default the one beside this file, and EXECUTED runs/NOTEBOOK in the current folder. The cells run in this
Python, in NOTEBOOK's folder. Exit status 1 if a cell fails or something cannot be read or written (the copy then holds
the outputs up to there), 130 if interrupted and 143 or 129 if told to end by SIGTERM or SIGHUP (training was saved; run
again to go on).

With --gpus N the cells run as one program in N processes, each on a GPU of its own, or without a GPU all on the
processor (mamba_ginr/parallel.py). The first one writes the figures, checkpoints and results.json; there is no executed
copy. The exit status is the same.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from mamba_ginr.launch import launch
from mamba_ginr.report import print_anywhere

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def say(text: str, end: str = "\n", file=None) -> None:
    """Print; where nobody can read it any more (a closed terminal or pipe, a full disk), training goes on without."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=file, flush=True)


class Stopped(Exception):
    """A signal came between two cells, where no cell hears it."""


class TerminalClient(NotebookClient):
    """Also prints what the cells print, and leaves progress bars out: they are widgets, dead in a saved notebook."""

    stopped_by = None  # the signal that told this run to end

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            say(msg["content"]["text"], end="")
        if "application/vnd.jupyter.widget-view+json" in msg["content"].get("data", {}):
            return None
        return super().output(outs, msg, display_id, cell_index)

    async def pass_interrupts_on(self, **_) -> None:
        """What tells this run to end interrupts the running cell, which can then save; nbclient would end the kernel.

        That is Ctrl-C; SIGTERM, which schedulers and containers send; SIGHUP, when the terminal closes, unless ignored.
        """
        loop = asyncio.get_running_loop()

        def interrupt(number: int) -> None:
            self.stopped_by = signal.Signals(number)
            self.interruption = asyncio.ensure_future(self.km.interrupt_kernel())

        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
            if number is None or (number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN):
                continue
            try:
                loop.add_signal_handler(number, interrupt, number)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda n, _: loop.call_soon_threadsafe(interrupt, n))
            except (RuntimeError, ValueError):  # not the main thread, which alone hears signals
                return

    def announce(self, cell, **_) -> None:
        """Print the title of a code cell as it starts."""
        if self.stopped_by:
            raise Stopped
        if cell.cell_type == "code":
            say(cell.source.split("\n")[0].replace("# ", "── "))


class ThisPython(KernelSpecManager):
    """The Python that runs this file, whatever kernel the notebook names and is installed under that name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir="", **get_kernel_dict())


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder for a kernel's sockets that nobody else can look into, and that is removed at the end.

    SystemExit with a message where none can be made.

    Its path is short, because a socket's may have some 100 bytes only. Those of runs that were killed are removed, too:
    a run holds a lock on its own, which the system lets go when it ends.
    """
    try:
        place = tempfile.gettempdir()
        if fcntl and len(os.fsencode(place)) > 60:
            place = "/tmp"  # every such system has it
        made = tempfile.TemporaryDirectory(prefix="mamba-ginr-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        sys.exit(f"No temporary folder can be made ({error}): set TMPDIR to one that can be written, of a short path.")
    for old in Path(place).glob("mamba-ginr-*"):
        with contextlib.suppress(OSError, AttributeError), _locked(old):
            about = old.stat()
            if about.st_uid == os.getuid() and time.time() - about.st_mtime > 60:  # not one that is just being made
                shutil.rmtree(old)
    with made as name:
        folder = Path(name)
        with _locked(folder) if fcntl else contextlib.nullcontext():
            yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """OSError where another process holds the lock, or it is no folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def write_script(notebook: Path, script: Path) -> Path:
    """Write the code cells into one file, a program and a module, for tests and benchmarks; return its path."""
    cells = nbformat.read(notebook, as_version=4).cells
    script.write_text("\n\n\n".join(c.source for c in cells if c.cell_type == "code"), encoding="utf-8")
    return script


def import_script(script: Path):
    """The file as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def read(notebook: Path) -> nbformat.NotebookNode:
    """The notebook; SystemExit with a message where there is none."""
    try:
        return nbformat.read(notebook, as_version=4)
    except OSError as error:
        sys.exit(f"{notebook} cannot be read ({error.strerror or error}): name the notebook to run.")
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        sys.exit(f"{notebook} is no notebook, or not a whole one ({reason}): name another, or get a good copy.")


def write(nb: nbformat.NotebookNode, executed: Path) -> None:
    """Write the executed copy, whole or not at all."""
    unfinished = executed.with_name(f".{executed.name}.{os.getpid()}")
    try:
        nbformat.write(nb, unfinished)
        os.replace(unfinished, executed)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        sys.exit(f"{executed} cannot be written ({error.strerror or error}). What the cells wrote is there.")


def check_writable(executed: Path) -> None:
    """SystemExit with a message, before a long run and not after it."""
    try:
        executed.parent.mkdir(parents=True, exist_ok=True)
        if executed.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with tempfile.TemporaryFile(dir=executed.parent):
            pass
    except OSError as error:
        sys.exit(
            f"The executed copy cannot be written to {executed} ({error.strerror or error}); nothing was run. Give "
            f"another path: python run_notebook.py NOTEBOOK EXECUTED"
        )


def execute(client: TerminalClient, folder: Path) -> int:
    """Run all cells, with the kernel's files in ``folder``; the exit status."""
    client.create_kernel_manager()
    client.km.kernel_spec_manager = ThisPython()
    client.km.connection_file = str(folder / "kernel.json")  # and the sockets beside it
    if os.name == "posix":
        client.km.transport = "ipc"  # other users of the machine can read what goes over TCP
    try:
        client.execute()
    except CellExecutionError as error:
        say(f"\n{error.ename}: {error.evalue}", file=sys.stderr)
        if error.ename != "KeyboardInterrupt":
            return 1
        return 128 + (client.stopped_by or signal.SIGINT)
    except Stopped:
        say(f"\nStopped by {client.stopped_by.name} between two cells.", file=sys.stderr)
        return 128 + client.stopped_by
    except DeadKernelError:
        say(
            "\nThe process that runs the cells was killed, often for want of memory. A training run keeps its last "
            "finished epoch: run again to go on, with a lower BATCH_SIZE or EVAL_BATCH if memory was short.",
            file=sys.stderr,
        )
        return 1
    except RuntimeError as error:  # of nbclient, before the first cell
        say(f"\nThe process that runs the cells did not start: {error}", file=sys.stderr)
        return 1
    return 0


def main(notebook: Path, executed: Path) -> int:
    print_anywhere()
    nb = read(notebook)
    check_writable(executed)
    client = TerminalClient(
        nb,
        timeout=None,
        resources={"metadata": {"path": str(notebook.resolve().parent)}},
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.on_cell_start, client.on_notebook_start = client.announce, client.pass_interrupts_on
    with private_folder() as folder:
        try:
            return execute(client, folder)
        finally:
            write(nb, executed)


def main_on_several(notebook: Path, gpus: int) -> int:
    """Run the cells as one program in ``gpus`` processes; the exit status."""
    print_anywhere()
    read(notebook)
    with private_folder() as folder:
        script = write_script(notebook, folder / "cells.py")
        os.chdir(notebook.resolve().parent)
        say(f"The cells run as one program, in {gpus} processes: figures and results.json, but no executed copy.")
        return launch(script, gpus, folder, f"the same command (make run GPUS={gpus})")


def run(arguments: list[str]) -> int:
    """Do what the command line asks for; the exit status."""
    gpus = "1"
    if arguments[:1] == ["--gpus"]:
        gpus, arguments = "".join(arguments[1:2]), arguments[2:]
    if len(arguments) > 2 or any(argument.startswith("-") for argument in arguments) or not gpus.isdecimal():
        sys.exit(__doc__)
    source = Path(arguments[0]) if arguments else Path(__file__).resolve().parent / "mamba_ginr_cifar10.ipynb"
    try:
        if int(gpus) > 1:
            return main_on_several(source, int(gpus))
        return main(source, Path(arguments[1]) if len(arguments) > 1 else Path("runs") / source.name)
    except KeyboardInterrupt:  # where no cell hears it
        say("\nInterrupted while no cell was running.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

"""Execute the notebook from top to bottom, with its output in the terminal, and keep the executed copy.

usage: python run_notebook.py [NOTEBOOK [EXECUTED]]

NOTEBOOK defaults to mamba_ginr_cifar10.ipynb and EXECUTED to runs/NOTEBOOK. Exit status 1 if a cell fails
(the copy then holds the outputs up to there), 130 if interrupted (training was saved; run again to go on).
"""

import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


class TerminalClient(NotebookClient):
    """Also prints what the cells print, and leaves progress bars out: they are widgets, dead in a saved notebook."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        if "application/vnd.jupyter.widget-view+json" in msg["content"].get("data", {}):
            return None
        return super().output(outs, msg, display_id, cell_index)

    async def pass_interrupts_on(self, **_) -> None:
        """Ctrl-C interrupts the running cell, which can then save; nbclient would end the kernel."""

        def interrupt() -> None:
            self.interruption = asyncio.ensure_future(self.km.interrupt_kernel())

        with contextlib.suppress(NotImplementedError):  # Windows has no such handlers
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)


def announce(cell, **_) -> None:
    """Print the title of a code cell as it starts."""
    if cell.cell_type == "code":
        print(cell.source.split("\n")[0].replace("# ", "── "), flush=True)


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


def main(notebook: Path, executed: Path) -> int:
    nb = nbformat.read(notebook, as_version=4)
    client = TerminalClient(
        nb,
        timeout=None,
        resources={"metadata": {"path": str(notebook.resolve().parent)}},
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_start=announce,
    )
    client.on_notebook_start = client.pass_interrupts_on
    client.create_kernel_manager()
    if os.name == "posix":
        client.km.transport = "ipc"  # other users of the machine can read what goes over TCP
    try:
        client.execute()
    except CellExecutionError as error:
        print(f"\n{error.ename}: {error.evalue}", file=sys.stderr)
        return 130 if error.ename == "KeyboardInterrupt" else 1
    finally:
        executed.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, executed)
    return 0


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "mamba_ginr_cifar10.ipynb")
    sys.exit(main(source, Path(sys.argv[2]) if len(sys.argv) > 2 else Path("runs") / source.name))

"""Start a program once for each GPU, under PyTorch's elastic launcher, and say in one line how it ended.

    python -m mamba_ginr.launch cells.py 4    # run_notebook.py --gpus 4 does this with the notebook's cells

The launcher sees a process that dies within a second and ends the others. Ctrl-C, SIGTERM and SIGHUP it hands on to the
first process, which saves (``mamba_ginr.parallel``).
"""

import contextlib
import json
import logging
import os
import runpy
import signal
import sys
import tempfile
import threading
from pathlib import Path

HINTS = {"OutOfMemoryError": "Lower BATCH_SIZE or EVAL_BATCH. ", "SIGKILL": "Often memory was short. "}


def launch(script: Path, count: int, folder: Path, again: str) -> int:
    """Run ``script`` in ``count`` processes in the current folder; the exit status, 128 + a signal's number after one.

    ``folder`` is for this function's own files; ``again`` is the command that goes on from what was saved. SystemExit
    where there are GPUs, but not so many.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported, here and in the processes
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < there < count:
        sys.exit(f"GPUS = {count}, but there {'is' if there == 1 else 'are'} {there} here; nothing was run.")
    logging.disable(logging.CRITICAL)  # the launcher's own pages
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    place = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    failed = []

    def run() -> None:
        try:
            program = elastic_launch(config, sys.executable)
            program("-u", "-m", "mamba_ginr.launch", str(script), "as one of them", str(folder))
        except Exception as error:
            failed.append(error)

    # In a thread, because in the main one the launcher would end the processes at a signal, and not let them save.
    asked, told = [], 0
    thread = threading.Thread(target=run, daemon=True)
    with _heard(asked):
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            with contextlib.suppress(OSError, ValueError):  # not there yet, or already gone
                while told < len(asked):
                    os.kill(int((folder / "0.pid").read_text()), signal.SIGINT)
                    told += 1
    return _report(failed[0], count, folder, asked, again) if failed else 0


@contextlib.contextmanager
def _heard(asked: list):
    """Add the signals that tell a run to end to ``asked``, unless they are ignored."""
    previous = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and (number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN):
            previous[number] = signal.signal(number, lambda n, _: asked.append(n))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report(error: Exception, count: int, folder: Path, asked: list, again: str) -> int:
    """One line on stderr that says which process failed first, and why; the exit status."""
    failures = getattr(error, "failures", None)
    if not failures:
        print(f"\nThe {count} processes did not start: {str(error).strip()[:300]}", file=sys.stderr)
        return 1
    stories = {}
    for rank, failure in failures.items():
        try:
            stories[rank] = json.loads((folder / f"{rank}.error").read_text())
        except (OSError, ValueError):
            number = -failure.exitcode
            name = signal.Signals(number).name if number in list(signal.Signals) else f"status {failure.exitcode}"
            stories[rank] = {"kind": name, "signal": number, "message": ""}
    interrupt = next((s for s in stories.values() if s["kind"] == "KeyboardInterrupt"), None)
    if interrupt:
        message = interrupt["message"].replace("run this cell again to go on", f"{again} goes on")
        print(f"\nKeyboardInterrupt: {message}", file=sys.stderr)
        return 128 + (asked[0] if asked else signal.SIGINT)
    # One that lost another is no cause, and one that the launcher ended is none either.
    rank = min(stories, key=lambda r: (stories[r].get("lost", False), stories[r].get("signal") == signal.SIGTERM, r))
    story = stories[rank]
    what = f"stopped with {story['kind']}: {story['message']}"
    if "signal" in story:
        what = f"was killed by {story['kind']} (signal {story['signal']})" if story["signal"] > 0 else story["kind"]
    saved = f" What was saved last is whole: {again} goes on from it."
    if story["kind"] in ("ValueError", "TypeError", "CheckpointError"):  # of the settings: the same again
        saved = ""
    hint = HINTS.get(story["kind"], "")
    print(f"\nProcess {rank} of {count} {what.rstrip('.')}. {hint}The others were ended.{saved}", file=sys.stderr)
    return 128 + asked[0] if asked else 1


def run_one(script: str, folder: Path) -> int:
    """What each process does: the program, its error in a file for the launcher; the exit status."""
    rank = int(os.environ["RANK"])
    if rank:  # what all would print, the first does
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
    try:
        (folder / f"{rank}.unfinished").write_text(str(os.getpid()))
        os.replace(folder / f"{rank}.unfinished", folder / f"{rank}.pid")
        from mamba_ginr import parallel

        parallel.stop_without_launcher()
        parallel.start()
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if rank:  # the launcher ends all when one fails, and the first may still be writing
            return 0
        write_error(folder / f"{rank}.error", error)
        return 130
    except BaseException as error:
        write_error(folder / f"{rank}.error", error)
        if is_loss(error):
            threading.Event().wait(2)  # the launcher shall see the one that was lost first, and ends this one
        return 1
    return 0


def is_loss(error: BaseException) -> bool:
    """Whether it says only that another process is gone."""
    text = str(error)
    kind = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return kind or (isinstance(error, RuntimeError) and ("gloo" in text.lower() or "Connection closed by peer" in text))


def write_error(path: Path, error: BaseException) -> None:
    message = (str(error).strip().split("\n") or [""])[0][:600]
    path.write_text(json.dumps({"kind": type(error).__name__, "message": message, "lost": is_loss(error)}))


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[2] == "as one of them":
        try:
            status = run_one(sys.argv[1], Path(sys.argv[3]))
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        os._exit(status)  # a GPU's communicator waits for the graph that holds it, and neither is needed
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal() or int(sys.argv[2]) < 1:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        sys.exit(
            launch(
                Path(sys.argv[1]),
                int(sys.argv[2]),
                Path(name),
                " ".join(["python -m mamba_ginr.launch", *sys.argv[1:]]),
            )
        )

"""Files that keep weights and training states: written whole or not at all, read without running what they may hold."""

import contextlib
import errno
import glob
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mamba_ginr.kernels.backends import lacks_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What files from before there was such a choice were made with.
EARLIER = {"head_latents": True, "image_size": 32, "position_scale": 1.0}


def save_atomically(path: Path, write, elsewhere: str = "set OUTPUT_DIR to another folder") -> None:
    """Call ``write(file)`` on a new file beside ``path``, then rename: a kill leaves the old or the new file, whole.

    OSError names ``path``, what the system refuses (no space, no permission, ...) and how to write ``elsewhere``.
    Whatever stops it, an interrupt as well, the unfinished file is removed and the old one stays. Its name is drawn
    anew, so that two processes that write one ``path`` leave one of theirs, whole. What killed ones left goes, too.
    """
    unfinished, recorder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        with open(unfinished, "wb") as file:
            recorder = _Recorder(file)
            write(recorder)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:  # some mounted drives (of hosted notebooks, say) know no fsync
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        cause = error if isinstance(error, OSError) else getattr(recorder, "error", None)
        if cause is None or not isinstance(error, Exception):
            raise
        text = _cannot_write(path, cause, elsewhere)
        raise (OSError(cause.errno, text) if cause.errno else OSError(text)) from error


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished files of ``path`` that nothing was written to for an hour."""
    for old in path.parent.glob(f".{glob.escape(path.name)}*.unfinished"):
        with contextlib.suppress(OSError):
            if time.time() - old.lstat().st_mtime > 3600:
                old.unlink()


class _Recorder:
    """A file that keeps the OSError of a failed write, which torch.save turns into a RuntimeError without its cause."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _cannot_write(path: Path, cause: OSError, elsewhere: str) -> str:
    old = "The one that was there is whole" if path.is_file() else "Nothing is there"
    what = "Free some space" if cause.errno in NO_SPACE else "Mend that"
    return (
        f"{path} cannot be written: {cause.strerror or cause}. {old}, the unfinished file is removed. {what}, or "
        f"{elsewhere}, and run again."
    )


# The disk is full, one's share of it is, or a file may not be as large.
NO_SPACE = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


@contextlib.contextmanager
def only_writer(path: Path):
    """Let no other process write ``path``, a run's state, meanwhile; CheckpointError where one does.

    The system lets go with the process, however it ends. Where files cannot be locked (Windows, some network drives)
    this does nothing.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as clean_up:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            _lock(lock, clean_up)
        except BlockingIOError:
            raise CheckpointError(
                f"another run is writing {path}, and each would overwrite the other's files. Let it end or stop it, or "
                f"set OUTPUT_DIR to another folder."
            ) from None
        except (OSError, AttributeError):
            pass  # no such locks here; what else is wrong with the folder, the first save says
        yield


def _lock(path: Path, clean_up: contextlib.ExitStack) -> None:
    """Hold the lock of a file that is made for it and removed by ``clean_up``; BlockingIOError where another does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        clean_up.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            clean_up.callback(path.unlink, missing_ok=True)
            return  # else the one that held it has just removed it


class Saver:
    """Writes files while the GPU works on: ``save`` returns once what they are to hold is copied.

    What goes wrong with them is raised by the next ``save`` or by ``close``, which both wait for the last one.
    """

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(max_workers=1), None

    def save(self, files: dict[Path, dict]) -> None:
        """Have each path written, one after the other."""
        copied = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), files)

        def write() -> None:
            for path, content in copied.items():
                save_atomically(path, lambda file, content=content: torch.save(content, file))

        try:
            self.close()
        finally:  # also after a write that failed: these may fit where the last did not
            self.pending = self.pool.submit(write)

    def close(self) -> None:
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def stamp(path: Path) -> tuple | None:
    """What changes when a file is written anew; None where there is none."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_size, about.st_mtime_ns  # some network drives give a file another inode each time


class CheckpointError(RuntimeError):
    """A file that cannot serve as a checkpoint; the message names it and says what to do."""


def read_checkpoint(path: Path, kind: str) -> dict:
    """Read a checkpoint of this notebook ("model" or "training state"), without running code that it may hold."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist: train first (cell 11), or give another path.") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        short = lacks_memory(error)
        # A file that was cut may be an invalid argument: a place before its start is looked for.
        refused = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.EISDIR)
        if short or refused:
            why = "not enough memory" if short else getattr(error, "strerror", None) or reason
            raise CheckpointError(
                f"{path} cannot be read ({why}). It may well be whole: leave it where it is, mend that, and run again."
            ) from error
        raise CheckpointError(
            f"{path} is not a whole checkpoint: truncated, or another kind of file ({reason}). "
            f"Nothing was changed. Move it away to start anew, or put a good copy in its place."
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != f"MAMBA-GINR {kind}":
        raise CheckpointError(
            f"{path} is a PyTorch file, but not a {kind} of this notebook. Move it away, or give another path."
        )
    return checkpoint


def model_checkpoint(model: nn.Module, settings: dict, metrics: dict) -> dict:
    """Weights, configuration, settings of the run and metrics; the head in float16."""
    checkpoint = {"kind": "MAMBA-GINR model", "config": model.config, "settings": settings, "metrics": metrics}
    weights = {name: w.half() if name.startswith("head.") else w for name, w in model.state_dict().items()}
    return {**checkpoint, "weights": weights}


def save_model(path: Path, model: nn.Module, settings: dict, metrics: dict, **more) -> None:
    """Write a ``model_checkpoint``, and what ``more`` a reader should find in it, to ``path``, atomically."""
    checkpoint = {**model_checkpoint(model, settings, metrics), **more}
    save_atomically(path, lambda file: torch.save(checkpoint, file))


def load_weights(path: Path | str, build, device: torch.device | str = "cpu", size: int = 0) -> tuple[nn.Module, dict]:
    """Rebuild a model from a checkpoint alone; return it in evaluation mode, with the checkpoint (config, metrics).

    ``build(**config)`` makes a model of that configuration, as its class does. ``size``, if given, is a side of the
    images that it must be for.

    Weights from before there was a head (their configuration has ``mixing_dim``) reconstruct as they did; finer pixels
    are then interpolated, nothing is added, and a line says so.

    Raises CheckpointError if the file is missing, truncated, foreign, or does not fit its own configuration.
    """
    checkpoint = read_checkpoint(Path(path), "model")
    try:
        config, weights = checkpoint["config"], checkpoint["weights"]
        if size and config["image_size"] != size:
            theirs = config["image_size"]
            raise ValueError(f"they are for images of {theirs}×{theirs} pixels: set IMAGE_SIZE = {theirs}, not {size}")
        if config.get("decoder") == "residual":  # its name until it was LAINR's
            config = {**config, "decoder": "lainr"}
        config = {**EARLIER, **config}
        old = "mixing_dim" in config
        if old:
            config = {name: value for name, value in config.items() if name != "mixing_dim"}
            weights = {name: w for name, w in weights.items() if not name.startswith("mixing.")}
        model = build(**config)
        known = config.keys() | {name for name in model.config if old and name.startswith("head_")}
        if missing := model.config.keys() - known:
            raise TypeError(f"their configuration has no {', '.join(sorted(missing))}")
        if old:
            weights |= {name: w for name, w in model.state_dict().items() if name.startswith("head.")}
            print(f"{path} is from before the super-resolution head: finer pixels are interpolated only.")
        model.load_state_dict(weights)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the weights do not fit this version of the model: {error}") from error
    return model.to(device).eval(), {**checkpoint, "config": model.config, "weights": weights}

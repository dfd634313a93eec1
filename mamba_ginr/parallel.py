"""One training on several GPUs: a process for each, which take equal shares of every batch and stay equal bit for bit.

    python -m mamba_ginr.launch cells.py 4       # run_notebook.py --gpus 4 does this; in each process:
    start()                                      # before anything uses a GPU
    sampler = shared(sampler)                    # this process's share of each batch
    errors = mean_of_all(errors)                 # of the whole batch
    loss.backward(); average_gradients(model)    # and clipping and optimizer then do the same everywhere

Without ``start`` there is one process: every function here returns at once, and what it was given.

Why not ``DistributedDataParallel``: its hooks average gradients within an eager backward pass, while a step here is one
CUDA graph from the images to the new weights. And the loss is a logarithm of the whole batch's error, which is no mean
of the processes' losses. Two all-reduces within the step do both, and NCCL's can be captured.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, nn

ASK_EVERY = 20  # steps between two questions whether to stop: each waits for the slowest process, but for no GPU
PATIENCE = timedelta(days=1)  # of what waits on the host; a process that dies is seen by the launcher, in a second


class _Group(NamedTuple):
    """What ``start`` found and made: the number of this process, how many there are, and who speaks on the hosts."""

    rank: int = 0
    size: int = 1
    host: object = None  # a group of gloo, beside the GPUs' of NCCL


_group = _Group()


def start() -> None:
    """Join the processes that a launcher started (RANK, WORLD_SIZE and the like are set); nothing where it is one.

    Each sees one GPU only, its own, which is then ``cuda`` in all its threads. RuntimeError if a GPU was used before.
    """
    global _group
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or _group.size > 1:
        return
    import torch.distributed as dist

    rank, mine = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_initialized():
        raise RuntimeError("a GPU was used before mamba_ginr.parallel.start(), which says which one is to be used")
    # torch.cuda.set_device would be this thread's alone, and others compile kernels and write files.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = list(map(str, range(size))) if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[mine] if mine < len(gpus) else ""
    # A process that is lost, the launcher sees, and ends the others. PyTorch's watchdog would abort them with pages of
    # its own; and what it asks of events must not disturb a capture (GraphedStep), so it is kept out of all else.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine, whatever its name resolves to
    with _silent():
        if torch.cuda.is_available():
            dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
            host = dist.new_group(backend="gloo", timeout=PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
            host = dist.group.WORLD
    _group = _Group(rank, size, host)
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first hears it, and all of them stop at one step


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stdout meanwhile: gloo's C++ greets there."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def processes() -> int:
    """How many processes train, each on a GPU of its own (or all on the processor)."""
    return _group.size


def is_first() -> bool:
    """Whether this process is the one that writes and prints; True where there is one."""
    return _group.rank == 0


class Shares:
    """``sampler`` (cell 9's), of whose batches each process takes the images and mosaics rank, rank + count, …

    All make the whole batch, so that it is the same whatever their number. ValueError where they cannot have equally
    many images and equally many mosaics: the mean of their errors would not be the batch's.
    """

    def __init__(self, sampler):
        self.sampler, self.steps, size = sampler, sampler.steps, _group.size
        images, mosaics = sampler.batch_size - sampler.mosaics, sampler.mosaics
        if images % size or mosaics % size:
            raise ValueError(
                f"BATCH_SIZE = {sampler.batch_size} makes {images} images (hard ones among them) and {mosaics} "
                f"mosaics, of which GPUS = {size} cannot take equal shares: set BATCH_SIZE, or SR_FRACTION, so that "
                f"both numbers are multiples of {size}, or GPUS to another number"
            )

    def __call__(self, epoch: int, step: int) -> NamedTuple:
        batch = self.sampler(epoch, step)
        return type(batch)(*(part[_group.rank :: _group.size].contiguous() for part in batch))


def shared(sampler):
    """``Shares`` of a sampler where there are several processes, else the sampler itself."""
    return sampler if _group.size == 1 else Shares(sampler)


class _MeanOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        mean = values.detach().clone()
        torch.distributed.all_reduce(mean)  # a sum, as gloo knows no mean
        return mean.div_(_group.size)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def mean_of_all(values: Tensor) -> Tensor:
    """The mean of the processes' ``values``, of any shape: the same bits in all of them.

    The gradient goes to one's own values whole. So the mean over processes of the gradients of f(mean_of_all(errors))
    is the gradient of f(the whole batch's errors), also where f is a logarithm.
    """
    return values if _group.size == 1 else _MeanOfAll.apply(values)


def average_gradients(model: nn.Module) -> None:
    """Put the mean over processes in place of each gradient: one all-reduce of all of them. None stays None."""
    if _group.size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.div_(_group.size).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])


def any_of_all(flag: bool, step: int) -> bool:
    """Whether ``flag`` is set in any process: they ask each other at every ``ASK_EVERY``-th step, and else say False.

    ``step`` must count alike in all of them. Where there is one process, its flag.
    """
    if _group.size == 1:
        return flag
    if step % ASK_EVERY:
        return False
    flags = torch.tensor([flag], dtype=torch.int32)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=_group.host)
    return bool(flags)


def check_equal(value, what: str) -> None:
    """RuntimeError where ``value`` differs between processes, which all wait here for each other."""
    if _group.size == 1:
        return
    values = [None] * _group.size
    torch.distributed.all_gather_object(values, value, group=_group.host)
    if differing := [rank for rank, other in enumerate(values) if other != values[0]]:
        raise RuntimeError(f"{what} of process {differing[0]} of {_group.size} differ from those of process 0")


def check_weights(*models: nn.Module) -> None:
    """RuntimeError where a bit of the models' weights differs between processes; it waits for the GPU."""
    if _group.size == 1:
        return
    weights = [p.detach().float().view(torch.int32).sum(dtype=torch.int64) for m in models for p in m.parameters()]
    check_equal(torch.stack(weights).tolist(), "the weights")


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others do, as where it downloads what all then read."""
    if not is_first():
        check_equal(None, "")  # waits
    try:
        yield
    finally:
        if is_first():
            check_equal(None, "")


def end_others() -> None:
    """Once all come here, all processes but the first end: SystemExit, with status 0."""
    check_equal(None, "")
    if not is_first():
        raise SystemExit(0)


def stop_without_launcher() -> None:
    """Have this process end where its launcher was killed: the first saves, as after an interrupt; the others follow.

    Those that then still wait for a process that is gone end after five minutes.
    """

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        if is_first():
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(300)
        if not is_first():
            os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()

"""A training run that can stop at any step and go on, and that goes back by itself where it leaves its course."""

import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mamba_ginr import parallel
from mamba_ginr.checkpoints import (
    EARLIER,
    CheckpointError,
    Saver,
    load_weights,
    model_checkpoint,
    read_checkpoint,
    stamp,
)
from mamba_ginr.kernels.backends import lacks_memory


class ResumableStep:
    """What a run asks of a training step that has model, average, optimizer, scaler, clips and rate (cell 8's)."""

    def state_dict(self) -> dict:
        """What a resumed run needs beside the weights and their average."""
        usual = [clip.usual for clip, _ in self.clips]
        return {"optimizer": self.optimizer.state_dict()["state"], "scaler": self.scaler.state_dict(), "usual": usual}

    def load_state_dict(self, state: dict) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # its own: the state's may be those of another device
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.scaler.scale(self.rate)  # makes its tensors, which a look before the first step may need
        for (clip, _), usual in zip(self.clips, state["usual"]):
            clip.usual.copy_(usual)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a step changes, by name; those of the optimizer exist from the first step on."""
        found = {f"{n}.{k}": v for n in ("model", "average") for k, v in getattr(self, n).state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
        return found | {f"usual.{i}": clip.usual for i, (clip, _) in enumerate(self.clips)}


class Run:
    """A training run that can stop at any step and go on: counters, losses, history, and the files that keep them.

    Every ``WATCH`` steps it looks back. Where ``SEVERAL`` losses or the last one were not finite, or they (those of the
    images' own pixels) are ``FALL`` dB above the lowest, the weights of the look before the last good one come back,
    and the rate is halved; it is whole again after ten good looks. At half the rate losses are several dB lower, and
    they rise again with it: no fall. So a loss counts as ``HALVING`` dB higher for each halving. The steps go on
    counting. FloatingPointError after ten falls in a row.

    ``train_step`` is a ``ResumableStep``.

    ``identity`` holds all settings that a state must share with this run. Creating a Run reads the state in
    ``folder`` if there is one; CheckpointError if it belongs to another run, or is no whole state. A state holds what a
    fall would go back to as well, so that a resumed run does what the run would have done. ``suffix`` ends the names of
    the files.
    """

    KEPT = (
        "epoch", "step", "history", "peak_memory_gib", "seconds", "step_seconds",
        "caution", "reference", "falls", "returns", "watched", "kept_at", "latest_at",
    )  # fmt: skip
    WATCH, SEVERAL, FALL, HALVING = 100, 5, 6.0, 10.0  # steps, losses, dB, dB
    SAVE_EVERY = 30.0  # seconds
    FLOOR = 1e-7  # an MSE below this counts as this: near 0, a rise by some dB means nothing

    def __init__(self, train_step: ResumableStep, steps_per_epoch: int, identity: dict, folder: Path, suffix: str = ""):
        self.train_step, self.identity = train_step, identity
        self.model, self.average = train_step.model, train_step.average
        self.state_path, self.best_path = (folder / f"mamba_ginr{suffix}_{n}.pth" for n in ("state", "best"))
        self.epoch, self.step, self.history, self.peak_memory_gib = 0, 0, [], 0.0
        self.seconds, self.step_seconds = 0.0, 0.0  # of the whole run; in the steps of the running epoch
        self.caution, self.reference = 1.0, math.inf  # share of the rate; dB, the lowest as if at the whole rate
        self.falls, self.returns, self.watched = 0, 0, 0  # in a row; in all; the step of the last look
        self.saver, self.best, self.saved_at = Saver(), None, -math.inf  # best: a checkpoint that is yet to be written
        self.device = next(self.model.parameters()).device
        self.losses = torch.zeros(steps_per_epoch, 2, device=self.device)  # of the images' pixels, of finer ones
        self.kept, self.latest, self.unchanged = {}, {}, False  # copies, and whether the latest is of this step
        self.kept_at, self.latest_at = None, None  # the steps that they are of
        self.found = stamp(self.state_path)
        if self.found:
            self.resume()
        else:
            self.keep()
            self.keep()
        parallel.check_weights(self.model, self.average)  # and all have read the state before one writes it
        self.clock = time.perf_counter()

    def resume(self) -> None:
        state = read_checkpoint(self.state_path, "training state")
        earlier = {name.upper(): value for name, value in EARLIER.items()}
        theirs, mine = {**earlier, **state["identity"]}, {**earlier, **self.identity}
        if theirs.get("data") == str(mine.get("data")).split(", checksum")[0]:  # from before folders had one
            theirs["data"] = mine["data"]
        differing = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        if differing:
            changes = "; ".join(f"{k} is {theirs.get(k)} there and {mine.get(k)} here" for k in differing)
            raise CheckpointError(
                f"{self.state_path} is the state of another run: {changes}. Nothing was changed. "
                f"Set these back to resume that run. To start a new one, move the file away or set another OUTPUT_DIR."
            )
        # From here on some of its weights may be the state's, and nothing may take them for new ones.
        self.model.trained = True
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.train_step.load_state_dict(state["train_step"])
            self.losses.copy_(state["losses"])
            for name in self.KEPT:
                setattr(self, name, state[name])
            now = self.train_step.tensors()
            self.kept, self.latest = (
                {name: tensor.to(self.device, copy=True) for name, tensor in (state[copies] or now).items()}
                for copies in ("kept", "latest")
            )
        except (TypeError, ValueError, KeyError, RuntimeError, MemoryError) as error:
            if lacks_memory(error):
                raise CheckpointError(
                    f"{self.state_path} is whole, but there is too little memory for it: leave it there, end what else "
                    f"takes memory, and run this cell again."
                ) from error
            raise CheckpointError(
                f"{self.state_path} does not fit this version of the training ({error!r}): to train anew, move it away "
                f"and run cell 10 again."
            ) from error
        print(f"Resumed from {self.state_path.name}: {self.epoch} epochs and {self.step} steps were done.")

    def record(self, loss: Tensor) -> None:
        """Count a step. Its loss is looked at every WATCH steps only, because a look makes the GPU wait."""
        self.losses[self.step] = loss
        self.step, self.unchanged = self.step + 1, False
        if self.step % self.WATCH == 0:
            self.watch()

    def keep(self, at: tuple | None = None) -> None:
        """Copy all that a step changes. What a fall goes back to is the copy before: a fall may begin unseen.

        ``at`` is the step, the epoch and the scale of these weights, now if None.
        """
        self.kept, self.latest = self.latest, self.kept
        self.kept_at = self.latest_at
        self.latest_at = at or (self.step, self.epoch + 1, self.train_step.scaler.get_scale())
        now = self.train_step.tensors()
        self.latest |= {name: torch.empty_like(tensor) for name, tensor in now.items() if name not in self.latest}
        by_kind = {}  # a kernel for many tensors, where each of them would cost one
        for name, tensor in now.items():
            by_kind.setdefault(tensor.dtype, []).append((self.latest[name], tensor))
        for pairs in by_kind.values():
            torch._foreach_copy_(*map(list, zip(*pairs)))
        self.unchanged = True  # since this copy

    def watch(self) -> None:
        """Look at the losses since the last look: keep the weights, or go back to those that were kept."""
        since, fewest = self.watched, min(20, len(self.losses))
        losses = self.losses[: self.step].double().cpu()
        lost = (~torch.isfinite(losses[since:])).any(1)
        recent = losses[min(since, max(0, self.step - 50)) :, 0]  # not a few alone, whose mean is chance
        recent = recent[torch.isfinite(recent)].clamp(min=self.FLOOR).log10().mul(10)
        if not len(lost):
            return
        level = recent.mean().item() if len(recent) else math.inf
        worst = max(level, recent[-10:].mean().item()) if len(recent) else math.inf  # a fall may just have begun
        weights = [*self.model.parameters(), *self.average.parameters()]
        sound = math.isfinite(nn.utils.get_total_norm([w.detach() for w in weights]))
        if sound and lost.sum() < self.SEVERAL and not lost[-1] and worst < self.reference + self.FALL:
            if len(recent) >= fewest:
                self.reference = min(self.reference, level - self.HALVING * math.log2(self.caution))
            self.watched, self.falls, self.caution = self.step, 0, min(1.0, self.caution * 2**0.1)
            self.keep()
            return
        self.watched, self.falls, self.returns = self.step, self.falls + 1, self.returns + 1
        if self.falls >= 10:
            raise FloatingPointError(
                f"step {self.step} of epoch {self.epoch + 1}: the training left its course ten times in a row, at half "
                f"the rate each time, and stopped. Lower LEARNING_RATE in cell 10, and move {self.state_path} away, if "
                f"it exists: it fits no other settings."
            )
        for name, tensor in self.train_step.tensors().items():
            tensor.copy_(self.kept[name]) if name in self.kept else tensor.zero_()
        at = step, epoch, scale = self.kept_at
        self.train_step.scaler.update(scale)
        self.keep(at)
        self.keep(at)  # both copies are now of these weights
        self.caution /= 2
        self.losses[since : self.step] = math.nan  # left out of the epoch's mean
        if lost.any():
            what = f"{lost.sum()} of {len(lost)} losses were not finite"
        elif sound:
            what = f"the loss was {worst - self.reference:.0f} dB above its lowest"
        else:
            what = "weights were no longer finite"
        print(
            f"Step {self.step} of epoch {self.epoch + 1}: {what}. Back to the weights of step {step} of epoch {epoch}, "
            f"and on at {self.caution:.2g} of the rate."
        )

    def finish_epoch(self, row: dict, last: bool = True) -> None:
        """Add an epoch's numbers to the history, and keep the average's weights if they are the best yet.

        Both are saved after the ``last`` epoch, and else if nothing was for ``SAVE_EVERY`` seconds.
        """
        best = max(filter(math.isfinite, (r["psnr_mean"] for r in self.history)), default=-math.inf)
        ms_per_step = 1000 * self.step_seconds / len(self.losses)
        minutes = (self.seconds + time.perf_counter() - self.clock) / 60
        self.epoch, self.step, self.watched, self.step_seconds = self.epoch + 1, 0, 0, 0.0
        self.history.append({"epoch": self.epoch, **row, "ms_per_step": ms_per_step, "minutes": minutes})
        if row["psnr_mean"] > best:
            checkpoint = model_checkpoint(self.average, self.identity, self.history[-1])
            self.best = tree_map_only(Tensor, torch.clone, checkpoint)
        if last or time.perf_counter() - self.saved_at >= self.SAVE_EVERY:
            self.save()

    def results(self, batch_size: int) -> dict:
        """What the run cost, and after how many minutes and epochs it first passed 50, 55, 60, 65 and 70 dB."""
        speeds = sorted(row["ms_per_step"] for row in self.history[1:] or self.history)  # the first epoch warms up
        ms_per_step = speeds[len(speeds) // 2]
        results = {
            "epochs": self.epoch,
            "steps": self.epoch * len(self.losses),
            "ms_per_step": ms_per_step,
            "images_per_s": 1000 * batch_size / ms_per_step,
            "peak_memory_gib": self.peak_memory_gib,
            "minutes": self.seconds / 60,
            "returns": self.returns,
        }
        for level in (50, 55, 60, 65, 70):
            first = next((row for row in self.history if row["psnr_mean"] >= level), {})
            results |= {f"minutes_to_{level}_db": first.get("minutes"), f"epochs_to_{level}_db": first.get("epoch")}
        return results

    def load_best(self) -> tuple[nn.Module, dict]:
        """The weights that did best, read back; CheckpointError where the file is missing or another run's."""
        if not self.best_path.exists():
            raise CheckpointError(f"{self.best_path} is gone: move {self.state_path} away, too, to train anew.")
        model, checkpoint = load_weights(self.best_path, type(self.model), self.device)
        if repr(checkpoint["metrics"]) not in map(repr, self.history):  # NaN equals itself
            raise CheckpointError(
                f"{self.best_path} is of another run than {self.state_path}. Put the file that belongs to it there, or "
                f"move both away to train anew."
            )
        return model, checkpoint

    def save(self) -> None:
        """Have the best weights and the state written; of several processes, by the first."""
        if not parallel.is_first():
            return
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.peak_memory_gib = max(self.peak_memory_gib, peak_memory_gib(self.device))
        state = {name: getattr(self, name) for name in (*self.KEPT, "identity", "losses")}
        state |= {"model": self.model.state_dict(), "average": self.average.state_dict()}
        finished = self.epoch == self.identity.get("EPOCHS")  # then none of them is needed, and none takes room twice
        copies = {"kept": {} if finished else self.kept, "latest": {} if finished or self.unchanged else self.latest}
        state |= {"train_step": self.train_step.state_dict(), **copies}
        best, self.best, self.saved_at = self.best, None, now
        files = {self.best_path: best} if best else {}
        self.saver.save({**files, self.state_path: {"kind": "MAMBA-GINR training state", **state}})


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: of the GPU by PyTorch's tensors, or of the machine by this process (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)

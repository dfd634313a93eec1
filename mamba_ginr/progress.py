"""What one sees of a training run: its table, its curves, its bar; and how one stops it."""

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from mamba_ginr.checkpoints import CheckpointError, only_writer, stamp
from mamba_ginr.cuda_graph import GraphedStep
from mamba_ginr.figures import draw_curves, show
from mamba_ginr.parallel import any_of_all, check_weights, is_first
from mamba_ginr.training_run import Run

HEADER = (
    " epoch   train MSE   of finer pixels   held-out PSNR (dB): mean"
    "   of mean MSE   worst   bit-exact   ms/step   minutes"
)


def log_line(row: dict) -> str:
    """One aligned line of the training table."""
    return (
        f"{row['epoch']:6d} {row['train_loss']:11.3e} {row['train_loss_finer']:17.3e} "
        f"{row['psnr_mean']:26.2f} {row['psnr_of_mean_mse']:13.2f} "
        f"{row['psnr_worst']:7.2f} {row['bit_exact_share']:11.2%} {row['ms_per_step']:9.1f} {row['minutes']:9.2f}"
    )


class Progress:
    """Show a run's progress, and let an interrupt stop it between two steps.

        with Progress(run, epochs, path, title) as progress:
            for epoch in range(run.epoch, epochs):
                for step in progress.steps(epoch):
                    run.record(...)
                progress.finish_epoch(scores)

    ``path`` and ``title`` are the curves', which are drawn within the next epoch, when a GPU has steps to work on.
    ValueError where the model's weights are trained and no state goes on from them; CheckpointError where another
    process is writing this run's files. Of several that train together (``mamba_ginr.parallel``) the first writes.
    """

    def __init__(self, run: Run, epochs: int, path: Path, title: str):
        if vars(run.model).get("trained") and not run.epoch and not run.step:
            raise ValueError(
                "these weights are trained already, and no state goes on from them: run cell 10 for new ones"
            )
        run.model.trained = True
        self.run, self.epochs, self.path, self.title = run, epochs, path, title
        self.curves, self.stale = None, False
        self.graphed = run.train_step.execute if isinstance(run.train_step.execute, GraphedStep) else None

    def __enter__(self):
        run, count = self.run, len(self.run.losses)
        with ExitStack() as begun:  # what fails from here on leaves no lock and no handler
            if is_first():
                begun.enter_context(only_writer(run.state_path))
                if stamp(run.state_path) != run.found:
                    raise CheckpointError(
                        f"another run has written {run.state_path} since this one read it: run this cell again to go "
                        f"on from there."
                    )
            print(HEADER, *map(log_line, run.history), sep="\n")
            if run.history:
                self.draw()
            self.interrupted = begun.enter_context(deferred_interrupt())
            done = run.epoch * count + run.step
            self.bar = begun.enter_context(tqdm(total=self.epochs * count, initial=done, desc="steps", leave=False))
            if self.graphed and run.epoch < self.epochs:
                self.bar.set_description("compiling, about a minute")
            begun.enter_context(closing(run.saver))
            self.clean_up = begun.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self.clean_up:
            if kind is None and self.interrupted():  # in the last evaluation
                raise KeyboardInterrupt("the run is finished and saved: run this cell again to go on")
        if kind is None and self.stale:
            self.draw()

    def steps(self, epoch: int) -> Iterator[int]:
        """The steps of an epoch that are not yet done; KeyboardInterrupt, once the state is saved, if one came."""
        run, count = self.run, len(self.run.losses)
        started = time.perf_counter() - run.step_seconds
        for step in range(run.step, count):
            yield step
            if self.graphed and self.graphed.calls == 1:
                started += self.graphed.start_up  # not the steps' own time
                self.bar.set_description("steps")
                print(f"Start-up: the step was compiled in {self.graphed.start_up:.0f} s.")
            self.bar.update()
            if self.stale and step >= min(50, count - 1):
                begun = time.perf_counter()
                self.draw()
                started += time.perf_counter() - begun if run.device.type == "cpu" else 0.0
            if any_of_all(self.interrupted(), epoch * count + step + 1):
                run.step_seconds = time.perf_counter() - started
                if self.stale:
                    self.draw()
                run.save()
                raise KeyboardInterrupt(
                    f"saved after step {run.step} of epoch {epoch + 1}: run this cell again to go on"
                )
        run.watch()
        self.losses = run.losses.nanmean(0).tolist()  # waits for the GPU, so that the time is the steps' own
        run.step_seconds = time.perf_counter() - started

    def finish_epoch(self, scores: dict) -> None:
        """Give the run an epoch's scores, and print its line."""
        check_weights(self.run.model, self.run.average)
        row = {**dict(zip(("train_loss", "train_loss_finer"), self.losses)), **scores}
        self.run.finish_epoch(row, last=self.run.epoch + 1 == self.epochs)
        print(log_line(self.run.history[-1]))
        self.stale = True

    def draw(self) -> None:
        self.stale = False
        if is_first():
            self.curves = show(draw_curves(self.run.history, self.title), self.path, self.curves)


@contextmanager
def refining(run: Run, steps: int) -> Iterator[Iterable[int]]:
    """The steps that follow a finished run, with a bar; meanwhile no other process may write the run's files.

    CheckpointError where one does; KeyboardInterrupt, with what it means for the run, if one comes.
    """
    with only_writer(run.state_path), tqdm(range(steps), desc="refining", leave=False) as bar:
        try:
            yield bar
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the run is saved, its refining is not: run this cell again to go on") from None


@contextmanager
def deferred_interrupt():
    """Hold an interrupt back until the running step is whole; yields a function that says whether one has come.

    Python hears interrupts in its main thread only. In a run in another one none is held back: it is a
    KeyboardInterrupt of the main thread.
    """
    interrupts = []
    try:
        previous = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    except ValueError:  # not the main thread, or not the main interpreter
        yield lambda: False
        return
    try:
        yield lambda: bool(interrupts)
    finally:  # None: a handler that is not Python's, which Python cannot put back
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)

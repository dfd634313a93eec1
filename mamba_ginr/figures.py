"""The notebook's figures, drawn without pyplot, saved as PNG and shown below the cell."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from IPython.display import Image as InlineImage
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mamba_ginr.checkpoints import save_atomically
from mamba_ginr.enlarge import resize


def show(figure: Figure, path: Path, handle=None, picture: bool = False):
    """Save a figure as PNG and show it below the cell, in place of that under ``handle``; a picture inline as JPEG."""
    rendered = io.BytesIO()
    figure.savefig(rendered, dpi=110, format="png")
    save_atomically(path, lambda file: file.write(rendered.getvalue()))
    if picture:
        rendered = io.BytesIO()
        figure.savefig(rendered, dpi=90, format="jpeg", pil_kwargs={"quality": 88})
    image = InlineImage(rendered.getvalue())
    if handle is None:
        return display(image, display_id=True)
    handle.update(image)
    return handle


def draw_curves(history: list[dict], title: str) -> Figure:
    """Held-out PSNR and training loss over epochs."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for key, label in [
        ("psnr_mean", "mean over images"),
        ("psnr_of_mean_mse", "of the mean MSE"),
        ("psnr_worst", "worst image"),
    ]:
        left.plot(epochs, [row[key] for row in history], ".-", label=label)
    left.set(xlabel="epoch", ylabel="PSNR (dB)", title="Held-out reconstruction")
    left.legend()
    for key, label in [("train_loss", "pixels of the images"), ("train_loss_finer", "finer pixels of the mosaics")]:
        if history[0][key]:
            right.semilogy(epochs, [row[key] for row in history], ".-", label=label)
    right.set(xlabel="epoch", ylabel="MSE, values in [0, 1]", title="Training loss")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, parse_math=False)
    return figure


def draw_enlargements(
    inputs: Tensor,
    ours: list[tuple[str, Tensor]],
    truth: Tensor,
    detail: tuple[str, Tensor],
    zoom: tuple[float, int],
    title: str,
    psnr: Callable,
) -> Figure:
    """A row of pictures for each input: the models' at several sizes, the truth, Lanczos, bicubic, and a detail.

    All are (n, 3, H, W) in [0, 1], those of a model with its name. The PSNR stands under those of the truth's size.
    ``zoom``: the detail's upsampling factor, and how many of the input's middle pixels a side it shows, around which a
    frame is drawn.
    """
    size, full = inputs.shape[-1], truth.shape[-1]
    columns = {f"input\n{size}×{size}": inputs}
    columns |= {f"{name}\n{x.shape[-1]}×{x.shape[-1]}": x for name, x in ours}
    columns[f"truth\n{full}×{full}"] = truth
    columns |= {f"{method}\n{full}×{full}": resize(inputs, full, method) for method in ("Lanczos", "bicubic")}
    columns[f"{detail[0]}, the\nframe ×{zoom[0]}"] = detail[1]
    count = len(truth)
    figure = Figure(figsize=(1.55 * len(columns), 1.7 * count + 0.75), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    grid = figure.subplots(count, len(columns), squeeze=False)
    for line, (label, images) in zip(grid.T, columns.items()):
        for axes, image, true in zip(line, images, truth):
            axes.imshow(rearrange(image.float().cpu(), "c h w -> h w c").numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if image.shape == true.shape and not torch.equal(image, true):
                axes.set_xlabel(f"{psnr(image[None], true[None]).item():.1f} dB", fontsize=9, labelpad=2)
        line[0].set_title(label, fontsize=10)
    corner = (size - zoom[1]) // 2 - 0.5
    for axes in grid[:, 0]:
        axes.add_patch(Rectangle((corner, corner), zoom[1], zoom[1], fill=False, color="white"))
    figure.suptitle(title, fontsize=12)
    return figure


def draw_errors(images: Tensor, reconstructions: dict[str, Tensor], title: str, psnr: Callable) -> Figure:
    """Originals, and below them each model's reconstructions with its largest error of the three channels at a pixel.

    ``reconstructions`` are those of one model or of several, by the name that is written beside them.
    """
    errors = {name: 255 * (x - images).abs().amax(1) for name, x in reconstructions.items()}
    most, rows = max(error.max().item() for error in errors.values()), 1 + 2 * len(reconstructions)
    figure = Figure(figsize=(11, 0.4 + 1.33 * rows), layout="constrained")
    grid = figure.subplots(rows, len(images))
    _draw_row(grid[0], images, "original")
    for i, (name, reconstruction) in enumerate(reconstructions.items(), start=1):
        _draw_row(grid[2 * i - 1], reconstruction.clamp(0, 1), name)
        for axes, error, value in zip(grid[2 * i], errors[name], psnr(reconstruction, images)):
            drawn = axes.imshow(error.numpy(), cmap="magma", vmin=0, vmax=most, interpolation="nearest")
            axes.set_xlabel(f"{value.item():.1f} dB", fontsize=9)
        grid[2 * i][0].set_ylabel("error")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=grid[2::2].flatten().tolist(), label="grey levels of 255")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _draw_row(row, images: Tensor, label: str) -> None:
    for axes, image in zip(row, images):
        axes.imshow(rearrange(image, "c h w -> h w c").numpy(), interpolation="nearest")
    row[0].set_ylabel(label.replace(" ", "\n"))

"""Time and memory of a pixel as images grow, and of more GPUs: `python benchmarks/sizes.py`.

For images of 32 to 512 pixels a side and patches of 2 and 4, the notebook's model and the same one with attention in
place of BiMamba, in the text-book form of the blocks: a training step (forward, backward, optimizer; no mosaics), and
encoding and decoding an image's own pixels, without the head. Each is measured with as many images as have PIXELS
pixels. Prints a table and writes it to benchmarks/sizes_<device>.json, and draws it, with the images a second of
several GPUs if they were measured, into benchmarks/sizes_<device>.png. What does not fit the memory says so.
"""

import argparse
import gc
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench  # noqa: E402
from bench import DEVICE, ON_GPU, Attention, median_ms, notebook, replay_ms  # noqa: E402

from mamba_ginr.checkpoints import save_atomically  # noqa: E402
from mamba_ginr.cuda_graph import GraphedStep  # noqa: E402
from mamba_ginr.kernels import use_backend  # noqa: E402

SIDES, PATCHES, KINDS = (32, 64, 128, 256, 512), (2, 4), ("BiMamba", "attention")
PIXELS = 512 * 512  # in all images of a measurement
HEAD_WIDTH = 64  # of an attention head


def build(side: int, patch_size: int, kind: str):
    """The notebook's model for images of this size; with attention, blocks of the same widths."""
    nb = notebook()
    torch.manual_seed(0)

    class WithAttention(nb.MambaGINR):
        def encode(self, images):
            tokens = self.lp.insert(self.patch_embedding(images))
            with self.autocast():
                return self.lp.extract(self.encoder(tokens)).float()

    config = {**nb.model_config, "image_size": side, "patch_size": patch_size, "num_lp": 0}
    model = (WithAttention if kind == "attention" else nb.MambaGINR)(**config)
    if kind == "attention":
        for block in model.encoder.blocks:
            block.mixer = Attention(config["dim"], max(1, config["dim"] // HEAD_WIDTH))
    model.precision = torch.float16 if ON_GPU else torch.float32
    return model.to(DEVICE)


def added_mib(run) -> float:
    """The most memory that PyTorch's tensors take during ``run`` beyond what they took before, MiB; 0 on a CPU."""
    if not ON_GPU:
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(side: int, patch_size: int, kind: str, pixels: int = PIXELS) -> dict:
    """ms and MiB of a training step and of encoding and decoding, for ``images`` of side² pixels."""
    nb, count = notebook(), max(1, pixels // side**2)
    model = build(side, patch_size, kind)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=DEVICE)
    inputs = images.float() / 255

    @torch.no_grad()
    def reconstruct():
        return model(inputs, model.own_coords)

    found = {"images": count, "infer_mib": added_mib(reconstruct), "infer_ms": replay_ms(reconstruct)}
    changes = {"BATCH_SIZE": count, "HARD_FRACTION": 0.0, "SR_FRACTION": 0.0, "COMPILE": ON_GPU}
    sampler, step = nb.set_up(model, images, SimpleNamespace(**{**nb.settings, **changes}))
    step.errors_of = step.errors  # one CUDA graph, but not compiled, which takes a minute for each size
    steps = itertools.count()

    def train():
        return step(sampler(next(steps), 0), 1e-4)

    train()  # makes the optimizer's tensors
    found["train_mib"] = added_mib(train)
    for _ in range(GraphedStep.WARM_UP if ON_GPU else 0):  # the last records the graph
        train()
    return {**found, "train_ms": median_ms(train)}


def growth(rows: list[dict], kind: str, patch_size: int, key: str, first: int = 64) -> float:
    """How much more a pixel costs at the largest side than at ``first``, as a share; NaN if one is missing."""
    cost = {r["side"]: r[key] / (r["images"] * r["side"] ** 2) for r in rows if r["kind"] == kind and key in r
            and r["patch_size"] == patch_size}  # fmt: skip
    return cost[max(cost)] / cost[first] - 1 if first in cost and max(cost) > first else float("nan")


def draw(results: dict, path: Path) -> None:
    """Time and memory of a pixel over the side of the image, and images a second over the number of GPUs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    gpus = results.get("gpus", [])
    panels = [
        ("train_ms", "training: time of a pixel (µs)", 1e3),
        ("infer_ms", "reconstruction: time of a pixel (µs)", 1e3),
    ]
    if ON_GPU:
        panels.append(("train_mib", "training: memory of a pixel (KiB)", 2**10))
    count = len(panels) + bool(gpus)
    figure = Figure(figsize=(8.8, 3.6 * -(-count // 2)), layout="constrained")
    *axes, last = [figure.add_subplot(-(-count // 2), 2, 1 + i) for i in range(count)]
    for ax, (key, label, unit) in zip([*axes, last], panels):
        for (kind, marker), patch_size in itertools.product(zip(KINDS, ("o-", "s--")), PATCHES):
            rows = [r for r in results["rows"] if (r["kind"], r["patch_size"]) == (kind, patch_size) and key in r]
            cost = [unit * r[key] / (r["images"] * r["side"] ** 2) for r in rows]
            colour, name = f"C{PATCHES.index(patch_size) + 2 * KINDS.index(kind)}", f"{kind}, patches of {patch_size}"
            ax.loglog([r["side"] for r in rows], cost, marker, color=colour, label=name)
        ax.set(xlabel="pixels a side", ylabel=label, xticks=SIDES, xticklabels=map(str, SIDES))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, high / 10), high)  # no small growth looks large
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    if gpus:
        number, speed = ([row[key] for row in gpus] for key in ("gpus", "images_per_s"))
        last.plot(number, speed, "o-", label="measured")
        last.plot(number, [n * speed[0] / number[0] for n in number], ":", color="grey", label="in proportion")
        of = gpus[0].get("device", results["device"]).removeprefix("NVIDIA ")
        last.set(xlabel=f"{of}s, 64 images of 32×32 each", ylabel="images a second in training", xticks=number, ylim=0)
        last.grid(alpha=0.3)
        last.legend(fontsize=8)
    figure.suptitle(f"{results['device']}, PyTorch {results['torch']}, {PIXELS:,} pixels at a time", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES if ON_GPU else SIDES[:3])
    parser.add_argument("--patches", type=int, nargs="+", default=PATCHES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--gpus", type=Path, help="a JSON list of {gpus, images_per_s, device}, to be drawn beside it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    gpus = json.loads(arguments.gpus.read_text(encoding="utf-8")) if arguments.gpus else None
    torch.set_float32_matmul_precision("high" if ON_GPU else "highest")
    use_backend("auto", DEVICE)
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    results = {"device": device, "torch": torch.__version__, "pixels": PIXELS, "rows": []}
    pixels = PIXELS if ON_GPU else 4 * max(arguments.sides) ** 2
    bench.WARM_UP, bench.REPEATS = 2, 5
    for kind, patch_size, side in itertools.product(arguments.kinds, arguments.patches, arguments.sides):
        row = {"kind": kind, "patch_size": patch_size, "side": side}
        try:
            row |= measure(side, patch_size, kind, pixels)
            text = (
                f"{row['images']:4d} images   step {row['train_ms']:9.1f} ms {row['train_mib']:8.0f} MiB   "
                f"reconstruction {row['infer_ms']:8.1f} ms {row['infer_mib']:7.0f} MiB"
            )
        except torch.OutOfMemoryError as error:
            text = row["failed"] = f"out of memory: {str(error).splitlines()[0]}"
        results["rows"].append(row)
        print(f"{kind:10} patches of {patch_size}, {side:4d} a side: {text}", flush=True)
        gc.collect()
    keys = ("train_ms", "train_mib", "infer_ms", "infer_mib")[:: 1 if ON_GPU else 2]
    for kind, patch_size in itertools.product(arguments.kinds, arguments.patches):
        shares = ", ".join(f"{key} {growth(results['rows'], kind, patch_size, key):+.0%}" for key in keys)
        print(f"A pixel at {max(arguments.sides)} a side against 64: {kind}, patches of {patch_size}: {shares}")
    if gpus:
        results["gpus"] = gpus
    name = f"sizes_{'gpu' if ON_GPU else 'cpu'}"
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    save_atomically(arguments.out / f"{name}.json", lambda file: file.write(text.encode()))
    draw(results, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()

"""Many short runs in one process, one for each seed: does every one hold, and how far do they end apart?

    python benchmarks/stability.py --seeds 20            # the default recipe: 6 epochs of 24,000 images, one of warm-up
    python benchmarks/stability.py --seeds 8 --rate 2    # at twice the rate
    MAMBA_GINR_DECODER=scent python benchmarks/stability.py --seeds 4

Settings are those of cell 10, and what the environment sets of them, but for EPOCHS, WARMUP_EPOCHS (1) and
MAX_TRAIN_IMAGES, which are options here; nothing is refined. The step is compiled and captured once, and each seed
begins with weights of its own and an optimizer that remembers nothing; the batches are the seed's, too. Prints a
row for each seed and their spread, and adds the rows to --out as JSON lines.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run_notebook import import_script, write_script  # noqa: E402


def begin(nb, train_step, config: dict, seed: int) -> None:
    """Give the captured step a new model's weights, in place, and forget all that it had learnt."""
    torch.manual_seed(seed)
    fresh = nb.MambaGINR(**{**config, "seed": seed}).state_dict()
    for name, tensor in train_step.tensors().items():
        part, _, key = name.partition(".")
        tensor.copy_(fresh[key]) if part in ("model", "average") else tensor.zero_()
    if train_step.optimizer.state and train_step.model.precision == torch.float16:
        state = {**train_step.scaler.state_dict(), "scale": 2.0**16, "_growth_tracker": 0}
        train_step.scaler.load_state_dict(state)  # in place: the captured step reads them where they are


def train(nb, train_step, sampler, s: SimpleNamespace) -> dict:
    """One run, as cell 11 trains, without its files; what went wrong in it, and the speed of its last epoch."""
    run, first, lost = nb.Run(train_step, sampler.steps, {}, Path(tempfile.mkdtemp())), None, 0
    total, warmup = s.EPOCHS * sampler.steps, s.WARMUP_EPOCHS * sampler.steps
    for epoch in range(s.EPOCHS):
        begun, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if s.COMPILE else (None, None)
        if begun:
            begun.record()
        seen = torch.zeros(sampler.steps, 2, device=run.device)
        try:
            for step in range(sampler.steps):
                rate = nb.learning_rate(epoch * sampler.steps + step, total, warmup, s.LEARNING_RATE)
                seen[step] = train_step(sampler(epoch, step), run.caution * rate)
                run.record(seen[step])
            run.watch()
        except FloatingPointError as error:  # a result as well
            print(error)
        if end:
            end.record()
        bad = (~torch.isfinite(seen)).any(1).nonzero().flatten().tolist()
        first = epoch * sampler.steps + bad[0] + 1 if bad and first is None else first
        lost += len(bad)
        if run.falls >= 10:
            break
        run.epoch, run.step, run.watched = run.epoch + 1, 0, 0
    if end:
        end.synchronize()
    ms = begun.elapsed_time(end) / sampler.steps if begun else None
    return {"not_finite": lost, "first": first, "returns": run.returns, "caution": run.caution, "ms_per_step": ms}


def main(seeds: range, rate: float, images: int, out: Path | None, **changes) -> None:
    nb = import_script(write_script(ROOT / "mamba_ginr_cifar10.ipynb", Path(tempfile.mkdtemp()) / "cells.py"))
    s = SimpleNamespace(**{**nb.settings, **changes})
    s.LEARNING_RATE *= rate
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scan, _ = nb.use_backend(s.SCAN_BACKEND, device)
    data = nb.load_data(s.DATASET, s.DATA_DIR, s.HELD_OUT, images, 1, 0, device, s.IMAGE_SIZE)
    model = nb.MambaGINR(**nb.model_config).to(device)
    model.precision = getattr(torch, s.PRECISION)
    nb.MambaGINR.fused = s.FUSED and nb.forms_agree(nb.MambaGINR, nb.model_config)
    s.COMPILE = s.COMPILE and (scan, device.type) == ("triton", "cuda")
    sampler, train_step = nb.set_up(model, data.train, s)
    rows = []
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    setup = {
        "device": where, "torch": torch.__version__, "data": data.name, "images": len(data.train), "decoder": s.DECODER,
        "optimizer": s.OPTIMIZER, "rate": s.LEARNING_RATE, "epochs": s.EPOCHS, "steps": s.EPOCHS * sampler.steps,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in setup.items()))
    print("seed   held out, dB: mean   worst   bit-exact   steps not finite (first)   returns   caution   ms/step")
    for seed in seeds:
        begin(nb, train_step, nb.model_config, seed)
        torch.set_float32_matmul_precision("high" if s.TF32 and device.type == "cuda" else "highest")
        sampler.seed, sampler.epoch, sampler.made_ahead.ahead = seed, None, {}
        row = train(nb, train_step, sampler, s)
        torch.set_float32_matmul_precision("highest")
        train_step.average.precision = torch.float32
        rows.append({"seed": seed, **row, **nb.evaluate(train_step.average, data.held_out, s.EVAL_BATCH), **setup})
        row = rows[-1]
        print(
            f"{seed:4d} {row['psnr_mean']:20.2f} {row['psnr_worst']:7.2f} {row['bit_exact_share']:11.2%} "
            f"{row['not_finite']:18d} ({row['first']}) {row['returns']:11d} {row['caution']:9.2g} "
            f"{row['ms_per_step'] or math.nan:9.2f}",
            flush=True,
        )
        if out:
            with open(out, "a") as file:
                file.write(json.dumps(row) + "\n")
    means = [row["psnr_mean"] for row in rows]
    middle = statistics.median(means)
    print(
        f"{len(rows)} seeds: median {middle:.2f} dB, lowest {min(means):.2f} ({min(means) - middle:+.2f}), highest "
        f"{max(means):.2f}; {sum(row['not_finite'] > 0 for row in rows)} runs with steps that were not finite, "
        f"{sum(row['returns'] > 0 for row in rows)} that went back"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="how many, at least 1")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--rate", type=float, default=1.0, help="times LEARNING_RATE")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=24_000, help="of the training images")
    parser.add_argument("--out", type=Path, help="a file that the rows are added to, as JSON lines")
    a = parser.parse_args()
    if a.seeds < 1:
        parser.error("--seeds: at least 1")
    if a.out:
        open(a.out, "a").close()  # what cannot be written is told before a seed is trained
    os.environ.setdefault("TQDM_DISABLE", "1")
    main(range(a.first, a.first + a.seeds), a.rate, a.images, a.out, EPOCHS=a.epochs, WARMUP_EPOCHS=1)

"""Speed, memory and growth, side by side in one run: `make bench`, or `python benchmarks/bench.py`.

Prints a table and writes it, with the machine's description, to benchmarks/results_<device>.json, and draws the growth
with length into benchmarks/growth_<device>.png. Rows that this machine cannot run say why. Times are the median of
REPEATS runs after WARM_UP; on a GPU, scans and encoders run as CUDA graphs, as they do in training, so that the time is
the GPU's own. Memory is what a row adds to its inputs, of PyTorch's tensors on a GPU and of the process on a CPU, where
each row therefore runs in a process of its own.
"""

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mamba_ginr.cuda_graph import GraphedStep  # noqa: E402
from mamba_ginr.kernels import BACKENDS, backend_fault, selective_scan, use_backend  # noqa: E402
from mamba_ginr.report import print_anywhere  # noqa: E402

WARM_UP, REPEATS = 3, 10
SEEDS = 8  # of an error
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@functools.cache
def notebook():
    """The notebook's code cells as a module."""
    from run_notebook import import_script, write_script

    return import_script(write_script(ROOT / "mamba_ginr_cifar10.ipynb", Path(tempfile.mkdtemp()) / "cells.py"))


def median_ms(run) -> float:
    """Median time of ``run`` in milliseconds: on a GPU between events, with no wait from run to run."""
    if not ON_GPU:
        times = []
        for _ in range(WARM_UP + REPEATS):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[WARM_UP:])
    for _ in range(WARM_UP):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def replay_ms(run) -> float:
    """Median time of ``run`` in milliseconds, on a GPU as a CUDA graph."""
    if not ON_GPU:
        return median_ms(run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay)


def peak_mib() -> float:
    """Peak memory so far, MiB."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(forward, leaves) -> dict:
    """Forward alone, forward and backward, and the memory that they add to what the inputs take."""
    before = peak_mib()
    dy = torch.randn_like(forward())
    torch.autograd.grad(forward(), leaves, dy)
    added = peak_mib() - before
    with torch.no_grad():
        forward_ms = replay_ms(forward)
    both_ms = replay_ms(lambda: torch.autograd.grad(forward(), leaves, dy))
    if not ON_GPU:
        added = peak_mib() - before  # a process takes its most after some runs only; a graph would count twice
    return {"forward_ms": forward_ms, "forward_backward_ms": both_ms, "added_mib": added}


def scan_inputs(dtype, batch: int, length: int, channels: int, d_state: int, directions: int, seed: int = 0) -> tuple:
    """Seeded inputs of ``selective_scan``, normal; step sizes after the softplus mostly within 0.001 … 0.1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    channels *= directions
    states = (batch, length, *((2,) if directions == 2 else ()), d_state)
    A = (-torch.rand(channels, d_state, generator=generator) * d_state).to(DEVICE).requires_grad_()
    u, delta, z = (draw(batch, length, channels) for _ in range(3))
    B, C, D = draw(*states), draw(*states), draw(channels, dtype=torch.float32)
    bias = (draw(channels, dtype=torch.float32).detach() - 4).requires_grad_()
    return u, delta, A, B, C, D, z, bias


def run_scan(inputs: tuple, backend: str):
    return selective_scan(*inputs, delta_softplus=True, bidirectional=inputs[3].dim() == 4, backend=backend)


def scan_row(backend: str, *shape: int) -> dict:
    """The scan with gate, skip, bias and softplus, bfloat16 on a GPU and float32 on a CPU."""
    inputs = scan_inputs(torch.bfloat16 if ON_GPU else torch.float32, *shape)
    return measure(lambda: run_scan(inputs, backend), inputs)


def scan_error_row(backend: str, *shape: int) -> dict:
    """Error against the same inputs in float64, of output and gradients: root mean square over that of the values.

    The mean over SEEDS draws, the same for every backend: sums such as the gradient of A differ by a third among draws.
    """
    names, errors = ("y", "u", "delta", "A", "B", "C", "D", "z", "delta_bias"), []
    for seed in range(SEEDS):
        inputs = scan_inputs(torch.bfloat16, *shape, seed)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        truth = run_scan(exact, "torch")
        # Of a seed of their own: from the inputs' seed they would be u, some steps later.
        generator = torch.Generator().manual_seed(SEEDS + seed)
        weights = torch.randn(truth.shape, generator=generator).to(DEVICE, torch.bfloat16)
        truths = (truth, *torch.autograd.grad(truth, exact, weights.double()))
        y = run_scan(inputs, backend)
        values = (y, *torch.autograd.grad(y, inputs, weights))
        errors.append(
            [((v.double() - t).square().mean() / t.square().mean()).sqrt().item() for v, t in zip(values, truths)]
        )
    return {"rms_error": dict(zip(names, map(statistics.mean, zip(*errors))))}


def mambapy_scan_row(batch: int, length: int, channels: int, d_state: int) -> dict:
    """The parallel scan of mambapy (Blelloch), with what its Mamba block does around it."""
    from mambapy.pscan import pscan

    u, delta, A, B, C, D, z, _ = scan_inputs(torch.float32, batch, length, channels, d_state, 1)

    def forward():
        step = F.softplus(delta).unsqueeze(-1)
        h = pscan(torch.exp(step * A), step * B.unsqueeze(2) * u.unsqueeze(-1))
        return ((h @ C.unsqueeze(-1)).squeeze(3) + D * u) * F.silu(z)

    return measure(forward, (u, delta, A, B, C, D, z))


def build_model(precision: str):
    """The notebook's model: of the default sizes on a GPU, of the small run on a CPU."""
    nb = notebook()
    torch.manual_seed(0)
    model = nb.MambaGINR(**nb.model_config).to(DEVICE)
    model.precision = getattr(torch, precision)
    return nb, model


def step_row(precision: str, compiled: bool, batch: int, mosaics: int) -> dict:
    """A training step of the notebook, from uint8 images on the device to new weights; ``mosaics`` of the batch are."""
    left = torch.cuda.memory_allocated() / 2**20 if ON_GPU else 0.0  # cuBLAS keeps a workspace for each stream so far
    nb, model = build_model(precision)
    images = torch.randint(0, 256, (64 * batch, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    changes = {"BATCH_SIZE": batch, "SR_FRACTION": mosaics / batch, "COMPILE": compiled}
    sampler, step = nb.set_up(model, images, SimpleNamespace(**{**nb.settings, **changes}))
    steps = itertools.count()
    start = time.perf_counter()
    for _ in range(GraphedStep.WARM_UP + 1):
        step(sampler(0, next(steps)), 1e-4).sum().item()
    start_up = time.perf_counter() - start
    ms = median_ms(lambda: step(sampler(0, next(steps) % 64), 1e-4))
    return {"ms": ms, "images_per_s": 1000 * batch / ms, "peak_mib": peak_mib() - left, "start_up_s": start_up}


def throughput_row(precision: str, batch: int, size: int) -> dict:
    """Images a second: encoded, and decoded from their latents on a grid of size × size, ``batch`` at a time."""
    nb, model = build_model(precision)
    images = torch.rand(batch, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        latents = model.encode(images)
        encode, decode = (
            median_ms(lambda: model.encode(images)),
            median_ms(lambda: nb.decode_grid(model, latents, size, 4096)),
        )
    return {"encode_images_per_s": 1000 * batch / encode, "decode_images_per_s": 1000 * batch / decode}


class Attention(nn.Module):
    """Self-attention where the notebook's blocks have BiMamba: (B, L, dim) → (B, L, dim)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def growth_row(kind: str, length: int, batch: int, dim: int, depth: int) -> dict:
    """An encoder alone on random tokens, forward and backward: float16 autocast on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    nb = notebook()
    encoder = nb.MambaEncoder(dim, depth)
    encode = encoder if kind == "attention" else lambda tokens: nb.fast_encoder(encoder, tokens, lambda x: x)
    if kind == "attention":
        for block in encoder.blocks:
            block.mixer = Attention(dim, dim // 32)
    encoder.to(DEVICE)
    tokens = torch.randn(batch, length, dim, device=DEVICE, requires_grad=True)

    def forward():
        with torch.autocast(DEVICE, torch.float16, enabled=ON_GPU):
            return encode(tokens)

    return measure(forward, (tokens, *encoder.parameters()))


def rows() -> dict[str, tuple | str]:
    """Name of a row → (function, arguments), or a text that says why it cannot run here."""
    found = {}
    if ON_GPU:
        for backend in BACKENDS:
            name = f"scan, {backend}, both directions, (64, 512, 2×512), 16 states, bfloat16"
            fault = backend_fault(backend, "cuda")
            found[name] = fault or ("scan_row", backend, 64, 512, 512, 16, 2)
            if backend != "torch":
                found[f"error of the scan, {backend}, (8, 512, 2×512)"] = fault or (
                    "scan_error_row", backend, 8, 512, 512, 16, 2,
                )  # fmt: skip
        for precision, compiled in [("float32", False), ("float16", False), ("float16", True)]:
            found[f"training step, batch 64, {precision}, {'compiled' if compiled else 'eager'}"] = (
                "step_row", precision, compiled, 64, 0,
            )  # fmt: skip
        found["training step, batch 64, float16, compiled, 24 of them mosaics"] = ("step_row", "float16", True, 64, 24)
        for size in (32, 256):
            found[f"encode, and decode at {size}×{size}, batch 64, float16, eager"] = (
                "throughput_row", "float16", 64, size,
            )  # fmt: skip
    else:
        for name in ("mamba_ssm", "triton"):
            found[f"scan, {name}"] = "needs a CUDA GPU"
        found["scan, mambapy's parallel scan, (8, 512, 256), 16 states, float32"] = (
            ("mambapy_scan_row", 8, 512, 256, 16)
            if importlib.util.find_spec("mambapy")
            else "needs mambapy: pip install mambapy==1.2.0"
        )
        for length in LENGTHS:
            # The same number of tokens in all, but for the longest.
            batch = max(1, 8 * 512 // length)
            name = f"scan, torch, ({batch}, {length}, 256), 16 states, float32"
            found[name] = ("scan_row", "torch", batch, length, 256, 16, 1)
        found["training step of the small model, batch 32, float32, eager"] = ("step_row", "float32", False, 32, 0)
        found["encode, and decode at 32×32, small model, batch 32"] = ("throughput_row", "float32", 32, 32)
    for kind in ("mamba", "attention"):
        for length in LENGTHS:
            size = (4, 256, 6) if ON_GPU else (1, 64, 1)
            name = f"growth, {kind} encoder, {length} tokens, batch {size[0]}, width {size[1]}, depth {size[2]}"
            found[name] = ("growth_row", kind, length, *size)
    return found


def exponent(lengths, values) -> float:
    """Slope of log(value) over log(length), least squares."""
    x, y = ([math.log(v) for v in values_] for values_ in (lengths, values))
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def draw_growth(results: dict, path: Path) -> dict:
    """Draw time and memory over length for both encoders; return the exponents over the four longest."""
    from matplotlib.figure import Figure

    figure, exponents = Figure(figsize=(9, 3.6), layout="constrained"), {}
    for axes, key, label in zip(
        figure.subplots(1, 2), ("forward_backward_ms", "added_mib"), ("time (ms)", "memory added (MiB)")
    ):
        for kind, marker in (("mamba", "o-"), ("attention", "s--")):
            picked = [(n, r) for n, r in results["rows"].items() if n.startswith(f"growth, {kind}") and key in r]
            lengths = [int(name.split(", ")[2].split()[0]) for name, _ in picked]
            values = [max(r[key], 1e-3) for _, r in picked]
            if len(values) > 3:
                exponents[f"{kind}, {key}"] = exponent(lengths[-4:], values[-4:])
                slope = f"exponent {exponents[f'{kind}, {key}']:.2f} from {lengths[-4]:,} tokens on"
                axes.loglog(lengths, values, marker, label=f"{'BiMamba' if kind == 'mamba' else kind}: {slope}")
        axes.set(xlabel="tokens", ylabel=label, xticks=LENGTHS, xticklabels=[f"{n:,}" for n in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"An encoder, forward and backward: {results['device']}, PyTorch {results['torch']}", fontsize=10)
    figure.savefig(path, dpi=110)
    return exponents


def describe(result: dict) -> str:
    """One row's numbers in words."""
    if "forward_ms" in result:
        return (
            f"forward {result['forward_ms']:8.2f} ms   with backward {result['forward_backward_ms']:8.2f} ms   "
            f"memory {result['added_mib']:7.0f} MiB"
        )
    if "rms_error" in result:
        return " ".join(f"{name} {value:.1e}" for name, value in result["rms_error"].items())
    units = {"ms": "ms", "images_per_s": "images/s", "peak_mib": "MiB at most", "start_up_s": "s to start"}
    units |= {"encode_images_per_s": "images/s encoded", "decode_images_per_s": "images/s decoded"}
    return "   ".join(f"{value:,.1f} {units[key]}" for key, value in result.items())


def run_row(name: str, function: str, *arguments) -> dict:
    """On a GPU in this process, on a CPU in one of its own; a row that fails says how."""
    if not ON_GPU:
        process = subprocess.run([sys.executable, __file__, "--row", name], capture_output=True, text=True)
        if process.returncode:
            return {"failed": process.stderr.strip()[-300:]}
        return json.loads(process.stdout.splitlines()[-1])  # the notebook's cells print before
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        return globals()[function](*arguments)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", help="measure this row in this process and print it as JSON")
    row = parser.parse_args().row
    torch.set_float32_matmul_precision("high" if ON_GPU else "highest")
    use_backend("auto", DEVICE)
    if row:
        function, *arguments = rows()[row]
        print(json.dumps(globals()[function](*arguments)))
        return

    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device} · PyTorch {torch.__version__} · Python {platform.python_version()}")
    results = {"device": device, "torch": torch.__version__, "python": platform.python_version(), "rows": {}}
    for name, work in rows().items():
        result = results["rows"][name] = {"not_run": work} if isinstance(work, str) else run_row(name, *work)
        problem = next(
            (f"{key.replace('_', ' ')}: {result[key]}" for key in ("not_run", "failed") if key in result), ""
        )
        print(f"{name:76} {problem or describe(result)}", flush=True)
    folder, suffix = ROOT / "benchmarks", "gpu" if ON_GPU else "cpu"
    results["exponents"] = draw_growth(results, folder / f"growth_{suffix}.png")
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / f"results_{suffix}.json").write_text(text, encoding="utf-8")
    for name, value in results["exponents"].items():
        print(f"Grows with length to the power {value:.2f}: {name}")
    print(f"Written to benchmarks/results_{suffix}.json and benchmarks/growth_{suffix}.png")


if __name__ == "__main__":
    main()

"""Speed and memory of the scan, side by side in one run: `make bench`, or `python benchmarks/bench.py`.

Prints a table and writes it, with the machine's description, to benchmarks/results_<device>.json. Rows that this
machine cannot run say why. Each row runs in a process of its own, so that its peak memory is its own; times are the
median of REPEATS runs after WARM_UP.
"""

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from selective_scan import BACKENDS, backend_fault, selective_scan  # noqa: E402

WARM_UP, REPEATS = 2, 5


def median_ms(run) -> float:
    """Median wall-clock time of ``run`` in milliseconds, the device's work included."""
    times = []
    for repeat in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= WARM_UP:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_mib() -> float:
    """Peak memory so far: of PyTorch's tensors on the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(forward, leaves) -> dict:
    """Forward alone, forward and backward, and the memory that they add to what the inputs take."""
    before = peak_mib()
    with torch.no_grad():
        forward_ms = median_ms(forward)
    both_ms = median_ms(lambda: torch.autograd.grad(forward().float().sum(), leaves))
    return {"forward_ms": forward_ms, "forward_backward_ms": both_ms, "added_mib": peak_mib() - before}


def scan_row(backend: str, batch: int, length: int, channels: int, d_state: int, directions: int) -> dict:
    """The scan with gate, skip, bias and softplus, bfloat16 on a GPU and float32 on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    channels *= directions
    states = (batch, length, *((2,) if directions == 2 else ()), d_state)
    A = (-torch.rand(channels, d_state, generator=generator) * d_state).to(device).requires_grad_()
    u, delta, z = (draw(batch, length, channels) for _ in range(3))
    B, C = draw(*states), draw(*states)
    D, bias = (draw(channels, dtype=torch.float32) for _ in range(2))
    options = {"delta_softplus": True, "bidirectional": directions == 2, "backend": backend}
    return measure(lambda: selective_scan(u, delta, A, B, C, D, z, bias, **options), (u, delta, A, B, C, D, z, bias))


def mambapy_scan_row(batch: int, length: int, channels: int, d_state: int) -> dict:
    """The parallel scan of mambapy (Blelloch), with what its Mamba block does around it."""
    from mambapy.pscan import pscan

    generator = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(batch, length, channels, generator=generator).requires_grad_() for _ in range(3))
    B, C = (torch.randn(batch, length, d_state, generator=generator).requires_grad_() for _ in range(2))
    A = (-torch.rand(channels, d_state, generator=generator) * d_state).requires_grad_()
    D = torch.randn(channels, generator=generator).requires_grad_()

    def forward():
        step = torch.nn.functional.softplus(delta).unsqueeze(-1)
        h = pscan(torch.exp(step * A), step * B.unsqueeze(2) * u.unsqueeze(-1))
        return ((h @ C.unsqueeze(-1)).squeeze(3) + D * u) * torch.nn.functional.silu(z)

    return measure(forward, (u, delta, A, B, C, D, z))


def rows() -> dict[str, tuple | str]:
    """Name of a row → (function, arguments), or a text that says why it cannot run here."""
    found = {}
    if torch.cuda.is_available():
        for backend in BACKENDS:
            name = f"scan, {backend}, (64, 512, 2×512), 16 states, bfloat16"
            found[name] = backend_fault(backend, "cuda") or ("scan_row", (backend, 64, 512, 512, 16, 2))
    else:
        for name in ("mamba_ssm", "triton"):
            found[f"scan, {name}"] = "needs a CUDA GPU"
        found["scan, mambapy's parallel scan, (8, 512, 256), 16 states, float32"] = (
            ("mambapy_scan_row", (8, 512, 256, 16))
            if importlib.util.find_spec("mambapy")
            else "needs mambapy: pip install mambapy==1.2.0"
        )
        for length in (512, 1024, 2048, 4096, 8192, 16384):
            # The same number of tokens in all, but for the longest.
            batch = max(1, 8 * 512 // length)
            name = f"scan, torch, ({batch}, {length}, 256), 16 states, float32"
            found[name] = ("scan_row", ("torch", batch, length, 256, 16, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", help="measure this row in this process and print it as JSON")
    row = parser.parse_args().row
    if row:
        function, arguments = rows()[row]
        print(json.dumps(globals()[function](*arguments)))
        return

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device} · PyTorch {torch.__version__} · Python {platform.python_version()}")
    print(f"{'':72} {'forward':>12} {'+ backward':>12} {'added memory':>14}")
    results = {"device": device, "torch": torch.__version__, "python": platform.python_version(), "rows": {}}
    for name, work in rows().items():
        if isinstance(work, str):
            results["rows"][name] = {"not_run": work}
            print(f"{name:72} not run: {work}")
            continue
        process = subprocess.run([sys.executable, __file__, "--row", name], capture_output=True, text=True)
        if process.returncode:
            results["rows"][name] = {"failed": process.stderr.strip().split("\n")[-1]}
            print(f"{name:72} failed: {results['rows'][name]['failed']}")
            continue
        r = results["rows"][name] = json.loads(process.stdout)
        print(f"{name:72} {r['forward_ms']:9.1f} ms {r['forward_backward_ms']:9.1f} ms {r['added_mib']:10.0f} MiB")
    path = ROOT / "benchmarks" / f"results_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(f"Written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

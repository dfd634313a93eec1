"""What the last cells print: a line for each row of numbers; and that a terminal can show it."""

import io
import sys


def print_anywhere() -> None:
    """Have × and − printed as ? where the terminal's encoding (cp1252, ASCII) has no such characters: no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


print_anywhere()  # cell 1 imports this before anything is printed, also where the cells run as a program

ENLARGEMENT_HEADER = f"{'PSNR, dB':34} nearest  bicubic  Lanczos  MAMBA-GINR  over bicubic  consistency"


def enlargement_line(name: str, count: int, scores: dict) -> str:
    """One aligned line of the super-resolution table; ``scores`` are those of cell 12, in dB."""
    return (
        f"{f'{name} ({count:,})':34} {scores['nearest']:7.2f}  {scores['bicubic']:7.2f}  {scores['lanczos']:7.2f}  "
        f"{scores['model']:10.2f}  {scores['model'] - scores['bicubic']:+12.2f}  {scores['consistency']:11.2f}"
    )


def print_results(results: dict) -> None:
    """A line a number of results.json, and one for each kind of images that are no photographs."""
    for name, value in results.items():
        if value is not None and name not in ("others", "enlargement"):
            print(f"{name:19} {value:.4g}" if isinstance(value, float) else f"{name:19} {value}")
    for name, row in results["others"].items():
        print(
            f"{name:13} {row['images']:5,} {row['psnr_mean']:.2f} dB, worst {row['psnr_worst']:.2f} dB, "
            f"{row['bit_exact_share']:.1%} bit for bit"
        )

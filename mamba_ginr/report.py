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


def enlargement_lines(name: str, count: int, scores: dict[str, dict]) -> str:
    """Aligned lines of the super-resolution table: one, or where there are several models one more for each.

    ``scores`` are those of cell 12, in dB, by the model's name; the interpolations are the same in all.
    """
    first = next(iter(scores.values()))
    line = f"{f'{name} ({count:,})':34} {first['nearest']:7.2f}  {first['bicubic']:7.2f}  {first['lanczos']:7.2f}"
    columns = [
        f"  {each['model']:10.2f}  {each['model'] - each['bicubic']:+12.2f}  {each['consistency']:11.2f}"
        for each in scores.values()
    ]
    if len(scores) == 1:
        return line + columns[0]
    return "\n".join([line, *(f"  {who:{len(line) - 2}}{numbers}" for who, numbers in zip(scores, columns))])


def print_results(results: dict) -> None:
    """A line a number of results.json, and one for each kind of images that are no photographs."""
    for name, value in results.items():
        if value is not None and not isinstance(value, dict):
            print(f"{name:19} {value:.4g}" if isinstance(value, float) else f"{name:19} {value}")
    _print_kinds(results["others"])
    if "committed_weights" in results:
        beside = results["committed_weights"]
        print("The committed weights on the same images:")
        _print_kinds({"test images": {"images": results["test_images"], **beside}, **beside["others"]})


def _print_kinds(kinds: dict[str, dict]) -> None:
    for name, row in kinds.items():
        print(
            f"{name:13} {row['images']:5,} {row['psnr_mean']:.2f} dB, worst {row['psnr_worst']:.2f} dB, "
            f"{row['bit_exact_share']:.1%} bit for bit"
        )

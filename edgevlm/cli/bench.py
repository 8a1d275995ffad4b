"""`edgevlm bench`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgevlm.cli.output import stdin, write
from edgevlm.errors import UsageError


def bench(
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Measure the way of a picture to the encoder's input.")
    ] = False,
    image: Annotated[
        str | None,
        typer.Option("--image", "-i", metavar="IMAGE", help="A picture, or `-` for stdin. [default: a made-up 12 MP]"),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Turns that each contender gets.")] = 15,
    json_output: Annotated[bool, typer.Option("--json", help="Print the JSON object alone.")] = False,
) -> None:
    """Time the image kernels on this machine, beside Pillow and a plain copy.

    Prints a card, a table, and as the last line the same as one JSON object.

    \b
    Example:
      edgevlm bench --preprocess -i photo.jpg
    """
    import json

    from edgevlm.bench import bench_preprocess

    if not preprocess:
        raise UsageError("bench measures nothing but preprocessing in this version; add --preprocess")
    report = bench_preprocess(
        stdin() if image == "-" else image,
        rounds=rounds,
        report=(lambda line: typer.echo(line, err=True)) if sys.stderr.isatty() else None,
    )
    if not json_output:
        write(f"{report.text()}\n")
    write(json.dumps(report.to_json()) + "\n")

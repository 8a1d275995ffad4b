"""The command line: each command parses, calls one function, prints. The only place that prints or exits.

The answer goes to stdout, everything else to stderr. Exit codes: 0 ok, 2 the call was wrong, 1 anything else, 130
interrupted. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from edgevlm.cli import models
from edgevlm.cli.ask import ask
from edgevlm.cli.bench import bench
from edgevlm.cli.convert import convert
from edgevlm.errors import EdgeVLMError

app = typer.Typer(
    name="edgevlm",
    help="""Ask questions about pictures, on this machine alone.

    No cloud, no GPU: a bundle holds a quantized language model (GGUF) and a vision encoder (ONNX), and edgevlm runs
    both on the CPU. A small model that reads instrument panels is built in.

    \b
    Examples:
      edgevlm ask "What does the display read?" -i panel.jpg
      edgevlm convert ./llava-checkpoint ./my-bundle
      edgevlm ask "Describe the picture." -i photo.jpg -m ./my-bundle

    Run `edgevlm COMMAND --help` for all options of a command.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


app.command()(ask)
app.command()(convert)
app.command()(bench)
app.add_typer(models.app, name="models")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from edgevlm import __version__

        typer.echo(f"edgevlm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: each of our errors becomes one line on stderr and its exit code; typer words usage errors itself."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character shows a question mark; an answer is not lost over it.
            stream.reconfigure(errors="replace")
    try:
        app()
    except EdgeVLMError as error:
        # One line whatever a native library put into the message, so that scripts can read it.
        typer.echo(f"edgevlm: {' '.join(str(error).split())} [{error.code}]", err=True)
        sys.exit(error.exit_code)

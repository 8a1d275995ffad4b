"""`edgevlm models`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgevlm.cli.output import print_result

app = typer.Typer(
    help="""Look at models: bundles and GGUF files.

    \b
    Example:
      edgevlm models show ./my-bundle
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _models() -> None:
    """A callback keeps `show` a command of its own although it is the only one."""


@app.command()
def show(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", show_default=False, help="Bundle folder or .gguf file; the panel reader if absent."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object with all there is.")] = False,
) -> None:
    """Say what a model is, how it was made and what that cost.

    Family, sizes, quantization, tokens of a picture, fidelity, licence and origin of a bundle; the header of a plain
    GGUF file. Nothing is loaded, so it answers at once.

    \b
    Examples:
      edgevlm models show ./my-bundle
      edgevlm models show smollm2.gguf --json
    """
    from edgevlm.describe import describe

    found = describe(model)
    print_result(found.document, found.text(), json_output)

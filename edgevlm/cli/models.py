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
    memory: Annotated[
        bool, typer.Option("--memory", help="Say as well what memory it takes, and how it would be loaded.")
    ] = False,
    context: Annotated[
        int | None, typer.Option("--context", metavar="N", help="With so many positions. [default: up to 4096]")
    ] = None,
    ram_budget: Annotated[
        str | None, typer.Option("--ram-budget", metavar="SIZE", help="Within so much memory, such as 900MB.")
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
      edgevlm models show ./my-bundle --memory --ram-budget 900MB
    """
    from edgevlm.describe import describe, table

    found = describe(model)
    rows = found.rows
    if memory or context is not None or ram_budget is not None:
        from edgevlm.loading import forecast

        plan = forecast(model, context=context, ram_budget=ram_budget)
        rows = rows + plan.rows()
        found.document["memory"] = plan.to_json()
    print_result(found.document, table(rows), json_output)

"""`edgevlm convert`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli.output import print_result
from edgevlm.errors import UsageError

if TYPE_CHECKING:
    from edgevlm.converters import Options


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(show_default=False, help="Folder of a Hugging Face checkpoint, or a text model's .gguf.")
    ],
    out: Annotated[Path, typer.Argument(show_default=False, help="Folder of the bundle to make.")],
    mmproj: Annotated[
        Path | None,
        typer.Option("--mmproj", metavar="FILE", help="llama.cpp's file with the vision part of that .gguf."),
    ] = None,
    decoder_quant: Annotated[
        str | None,
        typer.Option(
            "--decoder-quant", metavar="TYPE", help="Type of the language model's weights, or auto. [default: q4_k_m]"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="NAME", help="What auto chooses for: this, pi4, pi5, apple or x86. [default: this]"
        ),
    ] = None,
    encoder_quant: Annotated[
        str, typer.Option("--encoder-quant", metavar="TYPE", help="Type of the vision encoder's weights.")
    ] = "int8",
    decoder_type: Annotated[
        list[str] | None,
        typer.Option(
            "--decoder-type",
            metavar="PATTERN=TYPE",
            help="Another type for matrices whose GGUF name matches; may be repeated, the first match decides.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", metavar="FILE", help="Importance matrix (llama-imatrix) of this very model."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FOLDER", help="Pictures to steer and compare the encoder with."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What to call the model. [default: CHECKPOINT's name]")
    ] = None,
    tower: Annotated[
        Path | None,
        typer.Option("--tower", metavar="FOLDER", help="The vision tower's checkpoint, where it lies apart."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="NAME", help="Chat template for a checkpoint without one: v1, v0, llama3."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a bundle.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Keep the bundle even if too much was lost.")] = False,
    fidelity_tokens: Annotated[
        int,
        typer.Option(
            "--fidelity-tokens", metavar="N", help="Predictions to compare with the checkpoint's; 0 for none."
        ),
    ] = 2048,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; say what would come out and what it would take.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Convert a Hugging Face checkpoint, or a text .gguf with its mmproj, to a bundle.

    Works without torch, a few blocks of a tensor at a time, and leaves nothing behind if it fails. After a kill or a
    power cut, the same command goes on with what was finished.

    Decoder types: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_nl, q4_0. Encoder types: fp32, fp16, int8, int4.

    \b
    Examples:
      edgevlm convert ./checkpoint ./bundle --decoder-quant q5_k_m
      edgevlm convert ./checkpoint ./bundle --dry-run
      edgevlm convert ./checkpoint ./bundle --decoder-quant auto --device pi5
      edgevlm convert ./checkpoint ./bundle --decoder-type ffn_down=q6_k
      edgevlm convert ./llava-v1.5-7b ./bundle --tower ./clip-large-336
      edgevlm convert ./SmolVLM-Q8_0.gguf ./bundle --mmproj ./mmproj-f16.gguf
    """
    from edgevlm import converters
    from edgevlm.options import pairs

    options = converters.Options(
        mmproj=mmproj,
        decoder_quant=decoder_quant,
        encoder_quant=encoder_quant,
        device=device,
        decoder_types=pairs(decoder_type or []),
        imatrix=imatrix,
        calibration=calibration,
        name=name,
        tower=tower,
        template=template,
        force=force,
        fidelity_tokens=fidelity_tokens,
    )
    if json_output and not dry_run:
        raise UsageError("--json prints what --dry-run finds; add --dry-run")
    if dry_run:
        forecast = converters.dry_run(checkpoint, **options)
        print_result(forecast.to_json(), forecast.text(), json_output)
        return
    _convert(checkpoint, out, options, overwrite=overwrite)


def _convert(checkpoint: Path, out: Path, options: Options, *, overwrite: bool) -> None:
    from edgevlm import converters, describe
    from edgevlm.machine import peak_rss_bytes
    from edgevlm.progress import Display

    start = time.perf_counter()
    with Display() as show:
        manifest = converters.convert(
            checkpoint, out, **options, overwrite=overwrite, report=show.report, advance=show.advance
        )
    seconds = time.perf_counter() - start
    typer.echo(describe.conversion(manifest, seconds=seconds, peak_bytes=peak_rss_bytes()), err=True)

"""The command line: each command parses, calls one function, prints. The only place that prints or exits.

The answer goes to stdout, everything else to stderr. Exit codes: 0 ok, 2 the call was wrong, 1 anything else, 130
interrupted. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgevlm.errors import EdgeVLMError, UsageError

if TYPE_CHECKING:
    from edgevlm.answer import Answer
    from edgevlm.converters import Options

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


models = typer.Typer(
    help="""Look at models: bundles and GGUF files.

    \b
    Example:
      edgevlm models show ./my-bundle
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(models, name="models")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from edgevlm import __version__

        typer.echo(f"edgevlm {__version__}")
        raise typer.Exit


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(show_default=False, help="The question; `-` reads it from stdin.")],
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="IMAGE", help="A picture, or `-` for stdin; may be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="Bundle folder or .gguf file. [default: the panel reader]"),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Most tokens to answer with.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", help="0 is greedy and repeatable; 0.7 is lively.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens that sum up to X.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", help="Draw from the N likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Repeat a draw: same seed, same answer.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer before TEXT; may be repeated.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="N", help="Positions for prompt and answer. [default: up to 4096]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads. [default: every usable CPU]")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the answer, usage, timings and memory.")
    ] = False,
) -> None:
    """Answer one question, with or without pictures.

    The answer streams to stdout; on a terminal, a line of timings follows on stderr.

    \b
    Examples:
      edgevlm ask "What does the display read?" -i panel.jpg
      edgevlm ask "Which lamps are on?" -i - --json < panel.jpg
      edgevlm ask "Why is the sky blue?" -m smollm2.gguf --max-tokens 80
    """
    from edgevlm.pipeline import load

    question, images = _inputs(prompt, image or [])
    with load(model, context=context, threads=threads) as loaded:
        stream = loaded.stream(
            question,
            images,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
        )
        for piece in stream:
            if not json_output:
                _write(piece)
        answer = stream.answer
    assert answer is not None
    _report(answer, json_output)


@app.command()
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
        _print(forecast.to_json(), forecast.text(), json_output)
        return
    _convert(checkpoint, out, options, overwrite=overwrite)


@app.command()
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
        _stdin() if image == "-" else image,
        rounds=rounds,
        report=(lambda line: typer.echo(line, err=True)) if sys.stderr.isatty() else None,
    )
    if not json_output:
        _write(f"{report.text()}\n")
    _write(json.dumps(report.to_json()) + "\n")


@models.callback()
def _models() -> None:
    """A callback keeps `show` a command of its own although it is the only one."""


@models.command()
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
    _print(found.document, found.text(), json_output)


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


def _inputs(prompt: str, images: list[str]) -> tuple[str, list[str | bytes]]:
    """Resolve `-`: stdin can be the prompt or one picture, not both."""
    if [prompt, *images].count("-") > 1:
        raise UsageError("stdin was asked for more than once; give `-` for the prompt or for one picture")
    question = prompt
    if prompt == "-":
        try:
            question = _stdin().decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError("the prompt on stdin is not UTF-8 text") from None
    return question, [_stdin() if image == "-" else image for image in images]


def _stdin() -> bytes:
    """All of stdin, up to what a picture may have: `< /dev/zero` must not fill the memory."""
    from edgevlm.image import DEFAULT_LIMITS

    if sys.stdin is None:
        raise UsageError("`-` was given but stdin is closed")
    data = sys.stdin.buffer.read(DEFAULT_LIMITS.encoded_bytes + 1)
    if len(data) > DEFAULT_LIMITS.encoded_bytes:
        raise UsageError(f"stdin gives more than {DEFAULT_LIMITS.encoded_bytes} bytes")
    return data


def _write(text: str) -> None:
    from edgevlm.storage import storage_errors

    if sys.stdout is None:
        raise UsageError("stdout is closed; there is nowhere to write the answer")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader went away (`| head`): typer ends quietly
    except OSError as error:
        sys.stdout = io.StringIO()  # or the interpreter would try to flush the old one once more
        with storage_errors(Path("the answer")):
            raise error


def _print(document: dict[str, Any], text: str, json_output: bool) -> None:
    import json

    _write((json.dumps(document, ensure_ascii=False) if json_output else text) + "\n")


def _report(answer: Answer, json_output: bool) -> None:
    _print(answer.to_json(), "", json_output)
    if not json_output and sys.stderr.isatty():
        t, u = answer.timings, answer.usage
        typer.echo(
            f"load {t.load_s:.2f} s, image {t.decode_image_s + t.preprocess_s + t.encode_s:.2f} s, "
            f"prefill {t.prefill_s:.2f} s ({u.prompt_tokens} tokens), {u.completion_tokens} tokens "
            f"at {t.tokens_per_s:.0f}/s, peak {answer.peak_rss_bytes / 1e6:.0f} MB",
            err=True,
        )

"""`edgevlm ask`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgevlm.cli.output import inputs, print_result, schema_text, write
from edgevlm.errors import UsageError

if TYPE_CHECKING:
    from edgevlm.answer import Answer


Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="Positions for prompt and answer. [default: up to 4096]"),
]
ThreadCounts = Annotated[
    str | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Threads; or for each phase: encode=4,prefill=4,decode=2. [default: all cores]",
    ),
]
RamBudget = Annotated[
    str | None,
    typer.Option(
        "--ram-budget",
        metavar="SIZE",
        help="Hold at most so much memory, such as 900MB. [default: what is fastest]",
    ),
]
State = Annotated[
    str | None,
    typer.Option(
        "--state",
        metavar="FOLDER",
        envvar="EDGEVLM_STATE",
        help="Keep there what was computed of pictures, for the next time; empty keeps nothing. [default: nothing]",
    ),
]


Guesses = Annotated[
    int,
    typer.Option(
        "--lookup",
        metavar="N",
        help="Guess N tokens ahead, from the prompt; beyond 256 positions only with --threads decode=1.",
    ),
]


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
    min_p: Annotated[
        float,
        typer.Option("--min-p", metavar="X", help="Draw from tokens X times as likely as the likeliest, or more."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", metavar="X", help="Above 1, words that were said are less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer before TEXT; may be repeated.")
    ] = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", metavar="FILE", help="Answer in JSON of this schema.")
    ] = None,
    lookup: Guesses = 0,
    context: Context = None,
    threads: ThreadCounts = None,
    ram_budget: RamBudget = None,
    choices: Annotated[
        str | None,
        typer.Option(
            "--choices", metavar="A,B,...", help="Answer with the likeliest of these texts; nothing is drawn."
        ),
    ] = None,
    state: State = None,
    image_tokens: Annotated[
        str, typer.Option("--image-tokens", metavar="full|N", help="Most tokens of each picture; fewer answer sooner.")
    ] = "full",
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the answer, usage, timings and memory.")
    ] = False,
) -> None:
    """Answer one question, with or without pictures.

    Pictures come before the prompt, or where it says {image}. The answer streams to stdout; on a terminal, a line of
    timings follows on stderr.

    \b
    Examples:
      edgevlm ask "What does the display read?" -i panel.jpg
      edgevlm ask "Which lamps are on?" -i - --json < panel.jpg
      edgevlm ask "Is the red lamp on?" -i panel.jpg --choices yes,no
      edgevlm ask "From {image} to {image}: what changed?" -i a.jpg -i b.jpg
      edgevlm ask "Why is the sky blue?" -m smollm2.gguf --max-tokens 80
    """
    from edgevlm.loading import load
    from edgevlm.messages import marked
    from edgevlm.threads import parse_threads

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
        "schema": schema,
        "lookup": lookup,
    }
    if choices is not None:
        _check_beside_choices(options)
    question, images = inputs(prompt, image or [])
    parts = marked(question, images)
    with load(
        model,
        context=context,
        threads=parse_threads(threads),
        state=state or None,
        ram_budget=ram_budget,
        image_tokens=image_tokens,
    ) as loaded:
        if choices is not None:
            _report(loaded.pick(parts, choices.split(","), system=system), json_output, streamed=False)
            return
        stream = loaded.stream(parts, system=system, **{**options, "schema": schema_text(schema)})
        for piece in stream:
            if not json_output:
                write(piece)
        answer = stream.finish()
    _report(answer, json_output, streamed=True)


def _check_beside_choices(options: dict[str, Any]) -> None:
    """Refuse what `--choices` would silently ignore."""
    from edgevlm.options import GenerateOptions

    defaults = GenerateOptions()
    for name, value in options.items():
        if value != getattr(defaults, name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} was given with --choices, which draws nothing; leave {option} out")


def _report(answer: Answer, json_output: bool, *, streamed: bool) -> None:
    print_result(answer.to_json(), "" if streamed else _chosen(answer), json_output)
    for warning in answer.warnings:
        typer.echo(f"edgevlm: warning: {warning}", err=True)
    if not json_output and sys.stderr.isatty():
        t, u = answer.timings, answer.usage
        typer.echo(
            f"load {t.load_s:.2f} s, image {t.decode_image_s + t.preprocess_s + t.encode_s:.2f} s, "
            f"prefill {t.prefill_s:.2f} s ({u.prompt_tokens} tokens), {u.completion_tokens} tokens "
            f"at {t.tokens_per_s:.0f}/s, peak {answer.peak_rss_bytes / 1e6:.0f} MB",
            err=True,
        )


def _chosen(answer: Answer) -> str:
    """The choices with their probabilities, the likeliest first: its line begins the output."""
    assert answer.choices is not None
    ranked = sorted(answer.choices.items(), key=lambda item: -item[1])
    return "\n".join(f"{choice}\t{probability:.4f}" for choice, probability in ranked)

"""Every option of `ask` with values that are none: one line, the right exit code, and nothing native is reached."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import edgevlm
from edgevlm.cli import main
from edgevlm.errors import EdgeVLMError, UsageError
from edgevlm.held import ALONE_DIFFERS

NUMBERS = ["-1", "0", str(10**30), "-" + "9" * 50, "nan", "inf", "1e400", "", "abc", "٣", "1.5", "0x10", "\u2212 1"]
OPTIONS = [
    "--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty", "--seed", "--lookup",
    "--context", "--threads", "--image-tokens", "--ram-budget",
]  # fmt: skip
#: Values of `NUMBERS` that mean something for an option.
GOOD = {
    "--temperature": {"0", "1.5"}, "--top-k": {"0"}, "--min-p": {"0"}, "--seed": {"0"}, "--lookup": {"0"},
    "--repetition-penalty": {"1.5"}, "--ram-budget": {"1.5"},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_a_number_that_is_none_is_a_line_and_exit_code_2(option, monkeypatch, capsys) -> None:
    for number in NUMBERS:
        if number in GOOD.get(option, ()):
            continue
        monkeypatch.setattr(sys, "argv", ["edgevlm", "ask", "Which lamps are on?", f"{option}={number}"])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert captured.out == "", number
        assert "Traceback" not in captured.err
        assert stop.value.code == 2, (number, captured.err)
        assert len(captured.err) < 400


@pytest.mark.parametrize(
    "option",
    ["--max-tokens=5", "--max-tokens=-3", "--temperature=0.7", "--temperature=nan", "--top-p=0.5", "--top-k=-1",
     "--min-p=0.1", "--repetition-penalty=1.1", "--seed=0", "--stop=x", "--schema=nowhere.json", "--lookup=4"],
)  # fmt: skip
def test_choices_refuse_what_they_would_ignore(option: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["edgevlm", "ask", "Which?", "--choices=yes,no", option, "-i", "nowhere.png"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"{option.partition('=')[0]} was given with --choices" in capsys.readouterr().err


def test_choices_take_generation_options_that_say_nothing(monkeypatch, capsys) -> None:
    said = ["--max-tokens=256", "--temperature=0", "--top-p=1.0", "--lookup=0", "--system=Be brief."]
    monkeypatch.setattr(sys, "argv", ["edgevlm", "ask", "Is it on?", "--choices=yes,no", "--threads=1", *said])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t")[0] in ("yes", "no")


def test_the_limit_of_lookup_is_said_where_it_is_asked_for(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["edgevlm", "ask", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    for text in (shown[shown.index("--lookup") :][:160], edgevlm.GenerateOptions.__doc__.partition("lookup:")[2]):
        assert f"beyond {ALONE_DIFFERS} positions" in text.lower()
        assert "decode" in text


#: A loop and no parameters: pytest cannot write out numbers of five thousand digits.
ODD = [10**5000, -(10**5000), float("nan"), object(), [], b"\xff", "\ud800"]


@pytest.mark.parametrize(
    "name", ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "lookup", "logprobs"]
)
def test_a_value_that_is_none_is_an_error_of_ours(name) -> None:
    for value in [*ODD, float("inf"), True, 1 << 70, -1]:
        with pytest.raises(UsageError, match=name) as error:
            edgevlm.GenerateOptions(**{name: value})
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["context", "threads", "image_tokens", "ram_budget"])
def test_loading_with_a_value_that_is_none(name) -> None:
    for value in [*ODD, -1]:
        with pytest.raises(EdgeVLMError) as error:
            edgevlm.load(**{name: value})
        assert len(str(error.value)) < 300


LONG = ["a" * 100_000, " " * 100_000, "\n" * 100_000, "é" * 50_000, "\u0301" * 50_000, "1" * 100_000, "👍" * 25_000]


@pytest.mark.parametrize("prompt", LONG, ids=range(len(LONG)))
def test_a_hundred_kilobytes_of_one_character(prompt: str, smollm2: Path) -> None:
    for model in (None, smollm2):
        with edgevlm.load(model, context=512) as loaded:
            if prompt.isspace() and model is None:  # its template trims it, then there is little to read
                assert loaded.ask(prompt, max_tokens=1).usage.prompt_tokens < 100
                continue
            with pytest.raises(EdgeVLMError) as error:
                loaded.ask(prompt)
        assert error.value.code in ("context.too_small", "usage.invalid")


@pytest.mark.parametrize("prompt", ["\0", "a\0b", "\ud800", "a\udfff"])
def test_texts_that_are_no_texts(prompt: str) -> None:
    with edgevlm.load(context=512) as model:
        for ask in (
            lambda: model.ask(prompt),
            lambda: model.ask("x", system=prompt),
            lambda: model.ask([prompt]),
            lambda: model.chat(system=prompt).ask("x"),
            lambda: model.choose("x", [prompt, "y"]),
            lambda: model.choose(prompt, ["x", "y"]),
            lambda: model.reply([{"role": "user", "content": prompt}]),
        ):
            with pytest.raises(EdgeVLMError):
                ask()
        assert model.ask("Which lamps are on?", max_tokens=2).text is not None

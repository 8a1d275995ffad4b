"""However work ends, in the middle or from outside, nothing crashes and no later answer is another one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm.answer import Timings
from edgevlm.converters import convert
from edgevlm.errors import UsageError
from panel.scenes import make_scene

ROOT = Path(__file__).parent.parent


def picture(number: int) -> np.ndarray:
    return np.asarray(make_scene(number).image())


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


CLOSED = """
import sys, threading, time
import edgevlm
from edgevlm.errors import UsageError
for delay_ms in range(0, 60, 3):
    model = edgevlm.load()
    timer = threading.Timer(delay_ms / 1000, model.close)
    timer.start()
    try:
        while True:
            model.ask("Describe the panel.", ["examples/panel.jpg"])
            model.forget()
    except UsageError as error:
        assert "closed" in str(error), error
    timer.join()
print("whole")
"""


def test_a_model_that_another_thread_closes_says_so() -> None:
    ended = run(CLOSED)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "whole\n", "")


EXIT = """
import sys, threading
import edgevlm
model = edgevlm.load()
stream = model.stream("Describe the panel.", ["examples/panel.jpg"])
print(next(stream) != "")
if sys.argv[1] == "busy":
    other = edgevlm.load()
    busy = threading.Event()
    def ask():
        while True:
            other.ask("Describe the panel.", ["examples/panel.jpg"])
            other.forget()
            busy.set()
    threading.Thread(target=ask, daemon=True).start()
    busy.wait()
"""


@pytest.mark.parametrize("others", ["alone", "busy"])
def test_a_program_ends_in_the_middle_of_an_answer(others: str) -> None:
    for _ in range(3 if others == "busy" else 1):
        ended = run(EXIT, others)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_an_interrupt_at_any_moment_leaves_a_model_that_answers_the_same() -> None:
    question = "What does the display read?"
    images = [picture(0), picture(1)]
    moments = random.Random(7)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with edgevlm.load() as model:
        started = time.perf_counter()
        wanted = [model.ask(question, [image]).text for image in images]
        lasts_s = (time.perf_counter() - started) / 2
        assert wanted[0] != wanted[1]
        before = signal.signal(signal.SIGALRM, interrupt)
        interrupted = 0
        try:
            for number in range(40):
                if number % 4 == 0:
                    model.forget()
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-4, lasts_s))
                try:
                    model.ask(question, [images[number % 2]])
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                assert model.ask(question, [images[number // 2 % 2]]).text == wanted[number // 2 % 2]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert interrupted > 5  # else nothing was tested


def test_a_conversation_that_was_closed_in_the_middle_can_go_on() -> None:
    with edgevlm.load() as model:
        chat = model.chat()
        stream = chat.stream("Describe the panel.", [picture(0)])
        next(stream)
        with pytest.raises(UsageError, match="still being answered"):
            chat.ask("And the display?")
        stream.close()
        assert chat.ask("What does the display read?").finish_reason == "stop"
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_a_frame_that_changes_after_it_was_looked_at_is_the_old_one() -> None:
    frame, later = picture(0).copy(), picture(1)
    with edgevlm.load() as model:
        vision = model._reader.eyes()
        wanted_ND = model.embed_image(frame)
        model.forget()
        seen = vision.look(frame, Timings())
        frame[:] = later  # the camera's buffer
        assert np.array_equal(vision.embed(seen, Timings()), wanted_ND)
        assert not np.array_equal(model.embed_image(frame), wanted_ND)
        vision.done()


def test_what_is_kept_of_a_picture_tells_nothing_that_was_said(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with edgevlm.load(state=tmp_path) as model:
        model.ask("What does the display read?", [picture(0)])
        names = sorted(path.name for path in kept.glob("[!.]*"))
        assert sorted(name.split(".")[-1] for name in names) == ["embeds", "state"]
        # Another question, and what follows in a conversation: nothing more is written.
        chat = model.chat()
        chat.ask("Which lamps are on?", [picture(0)])
        chat.ask("And the display?")
        assert sorted(path.name for path in kept.glob("[!.]*")) == names
        # After words, no state is kept at all: it would hold them.
        model.ask(["The code is 4711.", picture(1)])
        assert [path.suffix for path in kept.glob("[!.]*")].count(".state") == 1
        # A system message is before the picture, and makes a state of its own, which does not spell it.
        model.ask("What does the display read?", [picture(0)], system="Be brief.")
        states = list(kept.glob("*.state"))
        assert len(states) == 2
        assert not any(b"brief" in path.read_bytes() for path in states)


def test_float16_weights_go_on_as_from_nothing(tmp_path: Path) -> None:
    """Their matrices have a kernel of their own for a single row: every drawn token is read again."""
    out = tmp_path / "out"
    convert("panel/checkpoint", out, decoder_quant="f16", fidelity_tokens=0)
    with edgevlm.load(out) as model, edgevlm.load(out) as fresh:
        chat = model.chat()
        for question in ("Describe the panel.", "What does the display read?", "Which lamps are on?"):
            before = list(chat.messages)
            answer = chat.ask(question, [picture(2)] if not before else [], max_tokens=40)
            fresh.forget()
            again = fresh.reply([*before, chat.messages[-2]], max_tokens=40)
            assert (answer.text, again.usage.cached_tokens) == (again.text, 0)
        assert answer.usage.cached_tokens > 64
        looked_up = fresh.reply([*before, chat.messages[-2]], max_tokens=40, lookup=4)
        assert looked_up.text == answer.text


def test_threads_that_ask_in_turn_share_a_model() -> None:
    """Not at once, which is not promised; but a web server's workers take turns."""
    question, answers = "What does the display read?", []
    with edgevlm.load() as model:
        wanted = model.ask(question, [picture(0)]).text

        def ask() -> None:
            answers.append(model.ask(question, [picture(0)]).text)

        for _ in range(4):
            worker = threading.Thread(target=ask)
            worker.start()
            worker.join()
    assert answers == [wanted] * 4

"""What a long command says on stderr: bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
import tiny
from tiny import Variant

from edgevlm.converters import convert
from edgevlm.converters.progress import Progress
from edgevlm.progress import Display, amounts


def test_each_step_is_told_how_far_it_is(tmp_path):
    lines, seen = [], {}

    def advance(done, total, unit):
        seen.setdefault(lines[-1].split()[0], []).append((done, total, unit))

    folder, _ = tiny.shared(Variant())
    options = {"decoder_quant": "q8_0", "fidelity_tokens": 50, "report": lines.append, "advance": advance}
    unused = convert(folder, tmp_path / "out", **options).provenance["unused_tensors"]
    assert [line.split()[0] for line in lines] == ["reading", "decoder", "comparing", "encoder", "committing"]
    assert set(seen) == {"decoder", "comparing", "encoder"}
    for step, moments in seen.items():
        done, totals, units = zip(*moments, strict=True)
        assert done[-1] == totals[-1], step
        assert units[-1] == ("tokens" if step == "comparing" else "bytes")
    tensors = tiny.load_file(folder / "model.safetensors")
    used = sum(tensor.nbytes for name, tensor in tensors.items() if name not in unused)
    decoder, encoder = seen["decoder"][-1][1], seen["encoder"][-1][1] // 2  # the encoder is built twice
    assert decoder + encoder == used
    assert seen["comparing"][-1] == (50, 50, "tokens")


def test_nobody_need_listen():
    progress = Progress()
    progress.step("x")
    progress.expect(10, "bytes")
    progress.add(5)


def test_what_is_done_never_passes_the_total():
    seen = []
    progress = Progress(None, lambda *moment: seen.append(moment))
    progress.add(3)  # of a step of unknown size
    progress.expect(4, "tokens")
    progress.add(3)
    progress.add(3)
    assert seen == [(0, 4, "tokens"), (3, 4, "tokens"), (4, 4, "tokens")]


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        ((0, None, None, ""), ""),
        ((240e6, 2472e6, 61.2e6, "bytes"), "240/2,472 MB, 61.2 MB/s"),
        ((3e9, 64e9, None, "bytes"), "3/64 GB"),
        ((100, 5000, 20, "bytes"), "100/5,000 B, 20.0 B/s"),
        ((100, 2048, 17.25, "tokens"), "100/2,048 tokens, 17.2 tokens/s"),
    ],
)
def test_amounts_are_worded(moment, words):
    assert amounts(*moment) == words


def test_elsewhere_nothing_is_said(capsys):
    with Display(live=False) as display:
        display.report("one")
        display.advance(1, 2, "bytes")
        display.report("two [red]")
    assert capsys.readouterr() == ("", "")


def test_without_rich_a_step_is_a_line(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with Display(live=True) as display:
        display.report("one")
        display.advance(1, 2, "bytes")
    assert capsys.readouterr() == ("", "one\n")


SHOW = """
import time
from edgevlm.progress import Display
with Display() as display:
    display.report("decoder to q4_k_m: \\x1b[2J [bold]why[/bold]")
    for done in range(0, 101, 10):
        display.advance(done * 10**6, 100 * 10**6, "bytes")
        time.sleep(0.03)
    display.advance(0, 50, "tokens")
    display.advance(50, 50, "tokens")
    time.sleep(0.3)
    display.report("committing")
print("the end")
"""


def test_a_terminal_sees_bars_with_rate_and_time_left():
    """Names of files may hold control characters; they do not reach the terminal, and brackets are no markup."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=60, check=True
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert done.stdout == b"the end\n"
    assert b"\x1b[2J" not in seen
    assert "decoder to q4_k_m: ?[2J [bold]why[/bold]" in text
    assert re.search(r"\d+/100 MB, [\d.]+ MB/s +\d:\d\d:\d\d", text)
    assert "50/50 tokens" in text
    assert "committing\r\n" in text

"""Characters and stop texts that are spread over tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgevlm.text import TextStream


def run(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    shown = [stream.feed(piece) for piece in pieces]
    return [*shown, stream.finish()], stream.stopped


def test_a_character_over_several_tokens_appears_once_and_whole() -> None:
    assert run([b"caf", b"\xc3", b"\xa9", b"!"]) == (["caf", "", "é", "!", ""], False)
    assert run([bytes([b]) for b in "👍🏽".encode()])[0].count("") == 7  # two characters of four bytes each


def test_bytes_that_never_become_a_character_are_marked() -> None:
    assert "".join(run([b"a\xff", b"b"])[0]) == "a\ufffdb"
    assert "".join(run([b"a\xf0\x9f"])[0]) == "a\ufffd"


def test_stop_text_over_several_tokens_is_never_shown() -> None:
    assert run([b"one E", b"N", b"D two"], ("END",)) == (["one ", "", "", ""], True)
    assert run([b"one E", b"N", b"d two"], ("END",)) == (["one ", "", "ENd two", ""], False)
    assert run([b"one E"], ("END",)) == (["one ", "E"], False)


def test_the_first_of_several_stop_texts_wins() -> None:
    assert run([b"a b c"], ("c", " b")) == (["a", ""], True)


@given(st.text(), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_any_split_shows_the_same_text(text: str, stops: list[str], width: int) -> None:
    raw = text.encode("utf-8", "replace")
    text = raw.decode()
    at = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    shown, stopped = run([raw[i : i + width] for i in range(0, len(raw), width)], tuple(stops))
    assert stopped == any(stop in text for stop in stops)
    if stops and stopped:
        # Fed in pieces, an earlier-completed stop may win over one that begins earlier but ends later.
        assert text.startswith("".join(shown))
        assert any(text[len("".join(shown)) :].startswith(stop) for stop in stops)
    else:
        assert "".join(shown) == text[:at]

"""Characters and stop texts that are spread over tokens."""

from __future__ import annotations

import itertools

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
    # the first to be whole, in one piece as in several
    assert run([b"xabcd"], ("abcd", "bc")) == (["xa", ""], True)
    assert run([b"xab", b"cd"], ("abcd", "bc")) == (["x", "a", ""], True)
    assert run([b"xabc"], ("abc", "bc")) == (["x", ""], True)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition, character by character: the first stop text to be whole ends it, the longest of several."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


pieces = st.one_of(
    st.text("abcé👍").map(str.encode),
    st.text().map(lambda text: text.encode("utf-8", "replace")),
    st.binary(),
    st.lists(st.sampled_from([b"\xf0", b"\x9f", b"\x91", b"\x8d", b"\xc3", b"\xa9", b"a", b"b"])).map(b"".join),
)


@given(
    pieces,
    st.lists(st.text("abcé👍\ufffd", min_size=1, max_size=4) | st.text(min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 40)),
)
def test_any_split_shows_the_same_text_and_nothing_of_a_stop_text(
    raw: bytes, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    stream, shown = TextStream(tuple(stops)), ""
    text, stopped = expected(raw.decode("utf-8", "replace"), stops)
    for start, end in itertools.pairwise(edges):
        shown += stream.feed(raw[start:end])
        assert text.startswith(shown)  # nothing is shown that has to be taken back
    assert (shown + stream.finish(), stream.stopped) == (text, stopped)

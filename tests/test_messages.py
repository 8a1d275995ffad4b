"""What callers say, in every form, becomes the same messages; what cannot be understood is named."""

from __future__ import annotations

import base64

import pytest

from edgevlm.errors import UsageError
from edgevlm.messages import conversation, images_of, marked, question, with_images

TEXT = {"type": "text", "text": "What?"}


def test_a_question_with_its_pictures_first() -> None:
    assert question("What?") == [{"role": "user", "content": "What?"}]
    assert question("What?", system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    (message,) = question("What?", ["a.jpg", b"b"])
    assert message["content"] == [{"type": "image", "image": "a.jpg"}, {"type": "image", "image": b"b"}, TEXT]
    assert images_of([message]) == ["a.jpg", b"b"]


def test_texts_and_pictures_in_any_order() -> None:
    (message,) = question(["Compare", b"one", "with", {"type": "image", "image": b"two"}, TEXT])
    assert [part.get("text") or part["image"] for part in message["content"]] == [
        "Compare",
        b"one",
        "with",
        b"two",
        "What?",
    ]
    assert images_of([message]) == [b"one", b"two"]
    assert images_of(with_images([message], [1, 2])) == [1, 2]
    assert images_of([message]) == [b"one", b"two"]


def test_marks_say_where_the_pictures_go() -> None:
    assert marked("no picture: {image}", []) == "no picture: {image}"
    assert marked("What?", [b"1"]) == [{"type": "image", "image": b"1"}, "What?"]
    one, two = ({"type": "image", "image": data} for data in (b"1", b"2"))
    assert marked("{image} is new, {image} worn", [b"1", b"2"]) == [one, " is new, ", two, " worn"]
    for prompt in ("{image}", "{image}{image}{image}"):
        with pytest.raises(UsageError, match="for 2 pictures"):
            marked(prompt, [b"1", b"2"])


def test_the_form_of_openai_clients() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": url}}]},
        {"role": "assistant", "content": "A lamp."},
        {"role": "user", "content": "Which?"},
    ]
    assert images_of(conversation(turns)) == [b"pixels"]
    assert [turn["role"] for turn in conversation(turns)] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        ([{"role": "robot", "content": "x"}], "role must be one of"),
        (["x"], "role must be one of"),
        ([{"role": "user", "content": 7}], "must be a text"),
        ([{"role": "user"}], "must be a text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "text, image or image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be a text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "last message"),
        *(
            ([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}], words)
            for url, words in [
                ("http://example.com/a.png", "nothing is fetched"),
                ("file:///etc/passwd", "nothing is fetched"),
                ({"url": None}, "nothing is fetched"),
                (None, "nothing is fetched"),
                ("data:image/png,abc", "nothing is fetched"),
                ("data:text/plain;base64,YQ==", "nothing is fetched"),
                ("data:image/png;base64,???", "not base64"),
            ]
        ),
    ],
)
def test_what_cannot_be_understood_is_named(turns, words) -> None:
    with pytest.raises(UsageError, match=words):
        conversation(turns)


def test_arguments_of_the_wrong_kind() -> None:
    for call in (
        lambda: question(7),  # type: ignore[arg-type]
        lambda: question("x", "picture.jpg"),
        lambda: question("x", system=b"x"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError):
            call()

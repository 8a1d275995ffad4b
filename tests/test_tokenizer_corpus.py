"""Ids of the runtime against those of the `tokenizers` library, over texts of every script and worse."""

from __future__ import annotations

import unicodedata

import nasty
import pytest
import tiny_text
from tiny_text import TextVariant

from edgevlm.converters import convert
from edgevlm.decoder import Decoder
from edgevlm.errors import UsageError

#: Where llama.cpp splits with std::regex, which would overflow the stack, the runtime refuses long runs.
SHORT_RUNS = {"smollm": 8000, "deepseek-llm": 8000}


@pytest.fixture(scope="module", params=["llama-bpe", "smollm", "gpt-2", "deepseek-llm", "spm"])
def pair(request, tmp_path_factory):
    """(our decoder, the reference, kind)."""
    folder, _ = tiny_text.shared(TextVariant(tokenizer=request.param, nasty=True))
    out = tmp_path_factory.mktemp("bundle") / "out"
    convert(folder, out, decoder_quant="q8_0")
    decoder = Decoder(out / "decoder.gguf", context=256)
    yield decoder, nasty.make_tokenizer(request.param).backend_tokenizer, request.param
    decoder.close()


def differing(decoder, reference, texts, *, parse_special=True):
    """The texts whose ids differ."""
    return [
        text for text in texts if decoder.vocabulary.tokenize(text, True, parse_special) != reference.encode(text).ids
    ]


def test_nasty_texts(pair):
    decoder, reference, _ = pair
    assert differing(decoder, reference, nasty.TEXTS) == []


def _rare(sign):
    """What llama.cpp's pre-tokenizer for DeepSeek-LLM splits otherwise: numerals and spaces beyond ASCII."""
    return not sign.isascii() and (sign.isspace() or unicodedata.category(sign)[0] == "N")


def test_every_script(pair):
    decoder, reference, kind = pair
    texts = list(nasty.SCRIPTS.values())
    if kind == "deepseek-llm":
        texts = ["".join("x" if _rare(sign) else sign for sign in text) for text in texts]
    assert len(texts) > 300
    assert differing(decoder, reference, texts) == []
    # The twin: one sign of another script in each.
    changed = [
        text
        for text in texts
        if decoder.vocabulary.tokenize(text + "ß", True, True) == reference.encode(text + "ä").ids
    ]
    assert changed == []


def test_control_tokens(pair):
    decoder, reference, _ = pair
    assert differing(decoder, reference, nasty.SPELLED_OUT) == []


def test_control_tokens_that_must_stay_text(pair):
    decoder, reference, _ = pair
    plain = type(reference).from_str(reference.to_str())
    plain.encode_special_tokens = True
    assert differing(decoder, plain, nasty.SPELLED_OUT, parse_special=False) == []
    # The twin: a control token is something else than its text.
    spelled = ["<|begin|>", "a<image>b"]
    assert differing(decoder, reference, spelled, parse_special=False) == spelled


@pytest.mark.parametrize("sign", nasty.LONG, ids=ascii)
def test_one_sign_a_hundred_thousand_times(pair, sign):
    decoder, reference, kind = pair
    assert differing(decoder, reference, [sign * SHORT_RUNS.get(kind, 100_000)]) == []
    if kind in SHORT_RUNS:
        with pytest.raises(UsageError, match="8192"):
            decoder.vocabulary.tokenize(sign * 100_000, True, True)

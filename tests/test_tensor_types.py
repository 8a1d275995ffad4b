"""Types of single matrices: what was chosen is what the file holds, and a choice without effect is an error."""

from __future__ import annotations

import pytest
import tiny
from tiny import Variant

from edgevlm.converters import convert, gguf_file
from edgevlm.converters.tensor_types import TYPES, resolve
from edgevlm.errors import UsageError

WIDE = Variant(hidden=256, n_ff=512)
SHAPES = {
    "token_embd.weight": (480, 64),
    **{f"blk.{i}.{name}.weight": (64, 64) for i in range(12) for name in ("attn_q", "attn_v")},
    **{f"blk.{i}.ffn_down.weight": (64, 96) for i in range(12)},
}


def types_of(folder):
    return {tensor.name: tensor.type for tensor in gguf_file.read_tensors(folder / "decoder.gguf")}


@pytest.mark.parametrize("quant", ["q4_k_m", "q4_0"])
def test_the_file_holds_what_was_chosen_and_the_recipe_elsewhere(tmp_path, quant):
    folder, _ = tiny.shared(WIDE)
    plain = convert(folder, tmp_path / "plain", decoder_quant=quant, encoder_quant="fp32")
    patterns = {r"blk\.0\.attn_q": "Q8_0", "attn_[qv]": "q6_k", "ffn_down": "f16", "token_embd": "q5_0"}
    manifest = convert(folder, tmp_path / "out", decoder_quant=quant, encoder_quant="fp32", decoder_types=patterns)
    chosen = {
        "blk.0.attn_q.weight": "Q8_0", "blk.1.attn_q.weight": "Q6_K", "blk.0.attn_v.weight": "Q6_K",
        "blk.1.attn_v.weight": "Q6_K", "blk.0.ffn_down.weight": "F16", "blk.1.ffn_down.weight": "F16",
        "token_embd.weight": "Q5_0",
    }  # fmt: skip
    assert types_of(tmp_path / "out") == {**types_of(tmp_path / "plain"), **chosen}
    assert types_of(tmp_path / "plain") != types_of(tmp_path / "out")
    assert manifest.fidelity["decoder"]["replaced"] == {}
    assert manifest.provenance["arguments"]["decoder_types"] == patterns
    assert "decoder_types" not in plain.provenance["arguments"]


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_can_be_made_and_costs_less_the_wider_it_is(tmp_path, kind):
    """The error of the weights against random ones: each type's own size of it, from ggml's formats."""
    folder, _ = tiny.shared(WIDE)
    manifest = convert(
        folder, tmp_path / "out", decoder_quant="q8_0", encoder_quant="fp32", decoder_types={"ffn_up": kind.lower()}
    )
    assert types_of(tmp_path / "out")["blk.1.ffn_up.weight"] == kind
    bits = 8 * gguf_file.nbytes((1, 256), kind) / 256
    # A uniform quantizer of b bits over +-3 sigma errs by 3 / 2^b / sqrt(3); the floats by less than 2^-8.
    limit = 2 * 3 / 2**bits / 3**0.5 if bits < 16 else 2**-8
    assert manifest.fidelity["decoder"]["types"][kind]["relative_error"] <= max(limit, 0.006)


def test_the_first_pattern_decides():
    found = resolve({r"blk\.1\.": "q8_0", "attn": "q4_0"}, SHAPES)
    assert found["blk.1.attn_q.weight"] == "Q8_0"
    assert found["blk.10.attn_q.weight"] == "Q4_0"
    assert "blk.10.ffn_down.weight" not in found
    turned = resolve({"attn": "q4_0", r"blk\.1\.": "q8_0"}, SHAPES)
    assert (turned["blk.1.attn_q.weight"], turned["blk.1.ffn_down.weight"]) == ("Q4_0", "Q8_0")
    assert resolve({}, SHAPES) == {}


REFUSED = {
    "an unknown type": ({"attn_q": "q7_0"}, "q8_0"),
    "a recipe is no type": ({"attn_q": "q4_k_m"}, "q4_k"),
    "a type that needs an importance matrix": ({"attn_q": "iq2_xs"}, "must be one of"),
    "no such name": ({"attn_x": "q8_0"}, r"blk\.N\.ffn_down\.weight"),
    "norms are no matrices": ({"attn_norm": "q8_0"}, "no matrix"),
    "an empty pattern": ({"": "q8_0"}, "no matrix"),
    "a broken pattern": ({"attn_(": "q8_0"}, "regular expression"),
    "blocks of 256": ({"ffn_down": "q6_k"}, "rows of 96.*multiple of 256"),
    "in the shadow": ({"attn": "q8_0", "attn_q": "q4_0"}, "put it before"),
    "not a text": ({"attn": 8}, "must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_choice_that_cannot_be_kept_is_refused(tmp_path, case):
    patterns, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        resolve(patterns, SHAPES)
    with pytest.raises(UsageError, match="decoder type"):
        convert(tiny.shared(Variant())[0], tmp_path / "out", decoder_types=patterns)
    assert list(tmp_path.iterdir()) == []


def test_rounding_recipes_take_no_single_types(tmp_path):
    with pytest.raises(UsageError, match="bf16 only rounds, types of single matrices"):
        convert(tiny.shared(Variant())[0], tmp_path / "out", decoder_quant="bf16", decoder_types={"attn": "q8_0"})

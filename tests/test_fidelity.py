"""What a conversion cost: figures that mean what they say, and limits that hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import Variant

from edgevlm.converters import DECODER_QUANTS, convert, fidelity, limits
from edgevlm.decoder import Decoder
from edgevlm.errors import ContextError, FidelityError, UsageError

PANEL = Path(__file__).parent.parent / "panel" / "checkpoint"
WIDE = Variant(hidden=256, n_ff=512)
TOLERANCE = 1e-3  # of logits of size 4 against transformers: the contract's


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A decoder with nothing lost, and the model that it was made from."""
    folder, model = tiny.shared(WIDE)
    out = tmp_path_factory.mktemp("exact") / "out"
    convert(folder, out, decoder_quant="f32", encoder_quant="fp32")
    return out / "decoder.gguf", model


def scoring(path, rows=512, **options):
    return Decoder(path, context=512, kv_type="f32", scored=rows, repack=False, **options)


def reference_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


# the logits of every position


def test_score_gives_the_logits_of_transformers_at_every_position(exact):
    path, model = exact
    ids = tuple(map(int, np.random.default_rng(1).integers(0, 400, 60)))
    decoder = scoring(path)
    found = decoder.score(ids).copy()
    assert np.abs(found - reference_logits(model, ids)).max() <= TOLERANCE
    # The twin: two tokens exchanged are seen, and only from there on.
    swapped = (*ids[:30], ids[31], ids[30], *ids[32:])
    wrong = np.abs(found - reference_logits(model, swapped)).max(axis=1)
    assert wrong[:30].max() <= TOLERANCE < wrong[30:32].min()
    # In pieces, the context goes on.
    decoder.reset()
    pieces = np.concatenate([decoder.score(ids[i : i + 25]).copy() for i in range(0, 60, 25)])
    assert np.abs(pieces - found).max() <= TOLERANCE
    # Logits of the last position alone are those of a prefill.
    assert np.array_equal(decoder.logits(), pieces[-1])
    decoder.close()


def test_score_checks_what_llama_cpp_would_abort_on(exact):
    decoder = scoring(exact[0], rows=8)
    for wrong in ((), (1,) * 9):
        with pytest.raises(ValueError, match="to score"):
            decoder.score(wrong)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        decoder.score((10**6,))
    for _ in range(64):
        decoder.score((1,) * 8)
    with pytest.raises(ContextError):
        decoder.score((1,))
    decoder.close()
    with pytest.raises(UsageError, match="closed"):
        decoder.score((1,))


# the figures


def test_divergence_is_that_of_torch():
    rng = np.random.default_rng(0)
    for scale in (0.1, 3, 30):
        a, b = (rng.normal(0, scale, 1000).astype(np.float32) for _ in range(2))
        logs = [torch.log_softmax(torch.from_numpy(x).double(), 0) for x in (b, a)]
        wanted = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True).item()
        assert fidelity.divergence(a, b) == pytest.approx(wanted, rel=1e-12)
        assert fidelity.divergence(b, a) != pytest.approx(wanted, rel=1e-3)  # which is which matters
        assert fidelity.divergence(a, a + np.float32(5)) == pytest.approx(0, abs=1e-6)
    far = np.array([0, -1e4], np.float32)
    assert fidelity.divergence(far, far) == 0


def test_the_comparison_is_that_of_the_two_models(exact, tmp_path):
    """Against a calculation of its own: both files through `score` in one piece, distributions by torch."""
    path, _ = exact
    convert(tiny.shared(WIDE)[0], tmp_path / "out", decoder_quant="q4_0", encoder_quant="fp32", fidelity_tokens=0)
    found = fidelity.compare(path, tmp_path / "out" / "decoder.gguf", n_tokens=300)
    decoders = [scoring(p) for p in (path, tmp_path / "out" / "decoder.gguf")]
    ids = decoders[0].vocabulary.tokenize(fidelity.TEXT.read_text(encoding="utf-8"), True, False)[:301]
    a, b = (torch.log_softmax(torch.from_numpy(d.score(tuple(ids)).copy()).double(), 1)[1:] for d in decoders)
    each = (a.exp() * (a - b)).sum(1)
    assert found["tokens"] == 300
    assert found["kl_mean"] == pytest.approx(each.mean().item(), rel=6e-3)  # three digits are kept
    assert found["kl_p99"] == pytest.approx(each.quantile(0.99).item(), rel=6e-3)
    assert found["top1_agreement"] == pytest.approx((a.argmax(1) == b.argmax(1)).double().mean().item(), abs=1e-4)
    assert found["kl_mean"] < found["kl_p99"]
    for decoder in decoders:
        decoder.close()


def test_a_file_beside_itself_has_lost_nothing(exact):
    found = fidelity.compare(exact[0], exact[0], n_tokens=600)
    assert (found["tokens"], found["kl_mean"], found["kl_p99"], found["top1_agreement"]) == (600, 0, 0, 1)


@pytest.mark.parametrize("quant", DECODER_QUANTS)
def test_the_number_of_threads_changes_no_figure(tmp_path, quant):
    """Not one logit changes, so that no figure can: the bundle is the same with another number of processors."""
    convert(PANEL, tmp_path / "out", decoder_quant=quant, encoder_quant="fp32", fidelity_tokens=0)
    ids = tuple(range(5, 165))
    one, two = (scoring(tmp_path / "out" / "decoder.gguf", threads=threads) for threads in (1, 2))
    assert np.array_equal(one.score(ids), two.score(ids))
    one.close()
    two.close()


def test_cheaper_types_cost_more_and_the_bundle_says_so(tmp_path):
    costs = []
    for quant in ("f16", "q8_0", "q4_k_m", "q4_0"):
        manifest = convert(PANEL, tmp_path / quant, decoder_quant=quant, fidelity_tokens=600)
        written = json.loads((tmp_path / quant / "bundle.json").read_text())
        costs.append(written["fidelity"]["decoder"]["predictions"])
        assert costs[-1] == manifest.fidelity["decoder"]["predictions"]
        assert sorted(path.name for path in (tmp_path / quant).iterdir()) == [
            "bundle.json", "decoder.gguf", "encoder.onnx", "encoder.onnx.data",
        ]  # fmt: skip
    means = [cost["kl_mean"] for cost in costs]
    assert means == sorted(means)
    assert 0 < means[0] < 1e-4 < means[1] < means[-1] < 0.1
    assert costs[0]["top1_agreement"] > costs[-1]["top1_agreement"] > 0.9
    assert {cost["tokens"] for cost in costs} == {600}


def test_what_is_stored_unchanged_is_not_compared(tmp_path):
    half = Variant(dtype=torch.bfloat16)
    for variant, quant in ((WIDE, "f32"), (half, "f32"), (half, "bf16")):
        out = tmp_path / f"{quant}-{variant.dtype}"
        cost = convert(tiny.shared(variant)[0], out, decoder_quant=quant).fidelity["decoder"]
        assert cost["predictions"] == fidelity.nothing_lost()
    cost = convert(tiny.shared(half)[0], tmp_path / "f16", decoder_quant="f16").fidelity["decoder"]
    assert cost["predictions"]["tokens"] == fidelity.TOKENS
    # Equal numbers, but activations are rounded to 8 bits where weights are BF16: that is all that differs.
    assert cost["predictions"]["kl_mean"] < 1e-3


def test_the_text_is_long_enough_for_a_large_vocabulary(smollm2):
    decoder = Decoder(smollm2, context=8)
    text = fidelity.TEXT.read_text(encoding="utf-8")
    assert 2048 <= len(decoder.vocabulary.tokenize(text, False, False)) <= 4096
    decoder.close()


@pytest.mark.parametrize("tokenizer", ["smollm", "spm"])
def test_windows_begin_as_texts_do(tmp_path, tokenizer):
    """With the token that begins a text if the vocabulary has that rule, else with the text's own first token."""
    folder, _ = tiny.shared(Variant(tokenizer=tokenizer))
    convert(folder, tmp_path / "out", encoder_quant="fp32", fidelity_tokens=0)
    decoder = scoring(tmp_path / "out" / "decoder.gguf")
    text = decoder.vocabulary.tokenize(fidelity.TEXT.read_text(encoding="utf-8"), False, False)
    bos = decoder.header.metadata["tokenizer.ggml.bos_token_id"]
    first, begin = (bos, 0) if tokenizer == "spm" else (text[0], 1)
    windows = fidelity._windows(decoder, 600)
    assert windows == [(first, *text[begin : begin + 511]), (first, *text[begin + 511 : begin + 600])]
    decoder.close()


def test_a_context_of_one_position_is_not_compared(tmp_path):
    folder = tiny.copy(Variant(), tmp_path / "model")
    shorten = {"max_position_embeddings": 1}
    tiny.rewrite_json(folder / "config.json", lambda data: {**data, "text_config": {**data["text_config"], **shorten}})
    cost = convert(folder, tmp_path / "out", encoder_quant="fp32").fidelity["decoder"]
    assert "predictions" not in cost


def test_how_much_is_compared_can_be_chosen(tmp_path):
    folder, _ = tiny.shared(Variant())
    assert "predictions" not in convert(folder, tmp_path / "none", fidelity_tokens=0).fidelity["decoder"]
    some = convert(folder, tmp_path / "some", fidelity_tokens=17)
    assert some.fidelity["decoder"]["predictions"]["tokens"] == 17
    for wrong in (-1, 1 << 20, 1.5, True):
        with pytest.raises(UsageError, match="fidelity_tokens"):
            convert(folder, tmp_path / "out", fidelity_tokens=wrong)


# the limits


def test_a_conversion_that_loses_too_much_is_refused_unless_forced(tmp_path):
    folder, _ = tiny.shared(WIDE)
    options = {"decoder_types": {".": "q2_k"}, "encoder_quant": "fp32"}
    with pytest.raises(FidelityError, match=r"KL divergence 0\.\d+, at most 0\.3.*try q5_k_m.*force") as caught:
        convert(folder, tmp_path / "out", **options)
    assert caught.value.code == "fidelity.exceeded"
    assert list(tmp_path.iterdir()) == []
    manifest = convert(folder, tmp_path / "out", **options, force=True)
    assert manifest.provenance["arguments"]["force"] is True
    (sentence,) = manifest.fidelity["exceeded_limits"]
    assert str(caught.value).startswith(sentence)
    # Force is not needed, and changes nothing, where no limit is passed.
    mild = convert(folder, tmp_path / "mild", encoder_quant="fp32", force=True)
    assert "exceeded_limits" not in mild.fidelity


def cost(kl_mean=0.01, top1=0.99, mean=0.9999, least=0.995):
    predictions = {"kl_mean": kl_mean, "top1_agreement": top1}
    return {"decoder": {"predictions": predictions}, "encoder": {"cosine_mean": mean, "cosine_min": least}}


@pytest.mark.parametrize(
    ("section", "quant", "words"),
    [
        (cost(), "q4_k_m", None),
        (cost(kl_mean=0.3, top1=0.8), "q4_k_m", None),
        (cost(kl_mean=0.31), "q4_0", "try iq4_nl"),
        (cost(kl_mean=0.31), "q4_k_m", "try q5_k_m"),
        (cost(kl_mean=0.31), "q8_0", "check the types"),
        (cost(kl_mean=0.2, top1=0.79), "q6_k", "try q8_0"),
        (cost(kl_mean=0.12, top1=0.5), "q4_0", None),  # flat distributions: no probability moved
        (cost(mean=0.998), "q4_k_m", "try encoder_quant fp16"),
        (cost(least=0.98), "q4_k_m", "0.98 at worst"),
        ({"decoder": {}}, "q4_k_m", None),  # text only, nothing compared
    ],
)
def test_each_limit(section, quant, words):
    found = limits.exceeded(section, quant, "int8")
    assert len(found) == (words is not None)
    assert words is None or words in found[0]

"""Image token budgets: which rows stay, where they stand, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tiny_minicpm
import tiny_smolvlm
import torch
from test_convert import LOGIT_TOLERANCE, exact_logits
from test_smolvlm import picture, reference_inputs
from tiny_smolvlm import FAKE, ROWS

import edgevlm
from edgevlm import messages
from edgevlm.answer import Timings
from edgevlm.budget import Budget, farthest_first, parse_budget, row_counts
from edgevlm.bundle import read_manifest
from edgevlm.converters import convert
from edgevlm.errors import CapabilityError, ContextError, UsageError
from edgevlm.layout import Rows, image_layout
from edgevlm.splice import TextSegment, splice
from panel.budgets import Pooled
from panel.scenes import make_scene

SMOLVLM = tiny_smolvlm.Variant(side_px=112, longest_px=224)  # 16 rows for each of up to 5 tiles
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """(bundle's folder, model, processor), with nothing lost to quantization."""
    folder, reference, processor = tiny_smolvlm.shared(SMOLVLM)
    out = tmp_path_factory.mktemp("smolvlm") / "out"
    convert(folder, out, decoder_quant="f32", encoder_quant="fp32")
    return out, reference, processor


@pytest.fixture(scope="module")
def minicpm(tmp_path_factory):
    """The folder of a bundle whose encoder gives rows without a grid, whole picture first."""
    out = tmp_path_factory.mktemp("minicpm") / "out"
    convert(tiny_minicpm.shared(tiny_minicpm.Variant(queries=6))[0], out, decoder_quant="f32", encoder_quant="fp32")
    return out


def load(folder, **options):
    return edgevlm.load(folder, threads=1, kv_type="f32", context=512, **options)


def plain_choice(rows_ND, count):
    """The definition, pair by pair."""
    unit_ND = rows_ND.astype(np.float64) / np.linalg.norm(rows_ND.astype(np.float64), axis=1, keepdims=True)
    to_mean_N, like_NN = (unit_ND @ unit_ND.mean(axis=0)).tolist(), (unit_ND @ unit_ND.T).tolist()
    found = [max(range(len(rows_ND)), key=lambda i: to_mean_N[i])]
    while len(found) < count:
        rest = [i for i in range(len(rows_ND)) if i not in found]
        found.append(min(rest, key=lambda i: max(like_NN[i][j] for j in found)))
    return sorted(found)


def plain_shares(n_tokens, n_tiles, n_full, whole):
    """Dealt out one by one: to all alike, then what is left to the whole picture, then to the tiles."""
    shares = [n_tokens // n_tiles] * n_tiles
    order = [whole] * n_full + [i for i in range(n_tiles) if i != whole]
    for i in order:
        if sum(shares) < n_tokens and shares[i] < n_full:
            shares[i] += 1
    return shares


# ---- which rows


@pytest.mark.parametrize(("n_rows", "width"), [(1, 3), (16, 64), (64, 33), (81, 5)])
def test_the_rows_are_those_of_the_definition(n_rows, width):
    rows_ND = np.random.default_rng(n_rows).normal(0.3, 1, (n_rows, width)).astype(np.float32)
    for count in sorted({1, 2, 4, 9, n_rows // 2, n_rows - 1, n_rows}):
        if 1 <= count <= n_rows:
            assert farthest_first(rows_ND, count) == plain_choice(rows_ND, count)
    # The twin: with another row in a place that was chosen, the choice is another one.
    if n_rows > 4:
        damaged_ND = rows_ND.copy()
        damaged_ND[farthest_first(rows_ND, 4)[1]] = rows_ND[0] + rows_ND[-1]
        assert farthest_first(damaged_ND, n_rows // 2) != farthest_first(rows_ND, n_rows // 2)


def test_equal_rows_and_rows_of_zeros_are_chosen_in_order():
    same_ND = np.tile(np.random.default_rng(0).normal(size=(1, 37)).astype(np.float32), (13, 1))
    assert farthest_first(same_ND, 5) == [0, 1, 2, 3, 4]
    twice_ND = np.concatenate([np.eye(6, dtype=np.float32)] * 2)
    assert farthest_first(twice_ND, 6) == [0, 1, 2, 3, 4, 5]
    assert farthest_first(np.zeros((4, 8), np.float32), 3) == [0, 1, 2]
    huge_ND = np.full((3, 2), np.finfo(np.float32).max, np.float32) * np.float32([[1, 1], [1, -1], [0.5, 0.5]])
    assert farthest_first(huge_ND, 2) == [0, 1]


@pytest.mark.parametrize("count", [1, 4, 9, 16, 36])
def test_the_rival_averages_by_area(count):
    side = math.isqrt(count)
    tile_ND = np.random.default_rng(count).normal(size=(64, 7)).astype(np.float32)
    wanted = np.zeros((side, side, 7))
    for i in range(8):
        for j in range(8):
            for r in range(side):
                for c in range(side):
                    high = max(0, min((i + 1) / 8, (r + 1) / side) - max(i / 8, r / side)) * side
                    wide = max(0, min((j + 1) / 8, (c + 1) / side) - max(j / 8, c / side)) * side
                    wanted[r, c] += high * wide * tile_ND[8 * i + j]
    found = Pooled(count).keep(tile_ND, count)
    # sums of up to 64 numbers of float32, rounded at most once each
    assert np.abs(found - wanted.reshape(count, 7)).max() <= 64 * 2**-24 * np.abs(tile_ND).max()
    assert np.abs(found - Pooled(count).keep(tile_ND[::-1], count)).max() > 0.01 or count == 1


# ---- how many, and where


@pytest.mark.parametrize("size", [(100, 30), (300, 300), (90, 310), (700, 520), (1, 1), (3, 500)])
def test_layouts_have_the_budget_and_the_same_texts(smolvlm, size):
    spec = read_manifest(smolvlm[0]).spec
    full = image_layout(*size, spec)
    counts = [part.count for part in full if isinstance(part, Rows)]
    n_tiles, n_full = len(counts), sum(counts)
    assert set(counts) == {16}
    for n_tokens in range(n_tiles, n_full + 20):
        layout = image_layout(*size, spec, Budget(n_tokens))
        assert [part for part in layout if isinstance(part, str)] == [part for part in full if isinstance(part, str)]
        reduced = [part.count for part in layout if isinstance(part, Rows)]
        if n_tokens >= n_full:
            assert layout == full
            continue
        assert sum(reduced) == n_tokens
        assert (
            reduced == plain_shares(n_tokens, n_tiles, 16, n_tiles - 1) == row_counts(n_tiles, spec, Budget(n_tokens))
        )
        assert min(reduced) >= 1
    for n_tokens in range(1, n_tiles):
        with pytest.raises(
            UsageError, match=rf"image_tokens is {n_tokens}, .* {n_tiles} tiles; give at least {n_tiles},"
        ):
            image_layout(*size, spec, Budget(n_tokens))


def test_every_grid_there_can_be(smolvlm):
    spec = read_manifest(smolvlm[0]).spec
    slices = dataclasses.replace(spec, image=dataclasses.replace(spec.image, policy="slices"))
    for n_tiles in (1, 2, 3, 4, 10, 17, 65):
        for n_tokens in {*range(n_tiles, 16 * n_tiles, 13), *range(max(n_tiles, 16 * n_tiles - 20), 16 * n_tiles)}:
            counts = row_counts(n_tiles, spec, Budget(n_tokens))
            assert (sum(counts), len(counts), min(counts) >= 1, max(counts) <= 16) == (n_tokens, n_tiles, True, True)
            first = row_counts(n_tiles, slices, Budget(n_tokens))
            assert first == [counts[-1], *counts[:-1]] == plain_shares(n_tokens, n_tiles, 16, 0)


def test_a_picture_without_texts_between_its_tiles_has_one_number(smolvlm):
    spec = read_manifest(smolvlm[0]).spec
    silent = dataclasses.replace(spec, prompt=dataclasses.replace(spec.prompt, tile_texts=None))
    assert image_layout(300, 300, silent) == (Rows(80),)
    assert image_layout(300, 300, silent, Budget(47)) == (Rows(47),)


# ---- the model


@pytest.mark.parametrize("n_tokens", [5, 7, 20, 79])
def test_a_model_is_fed_the_chosen_rows_of_each_tile(smolvlm, n_tokens):
    out, reference, processor = smolvlm
    image = picture("landscape")
    with load(out) as model, load(out, image_tokens=n_tokens) as frugal:
        full_ND, found_ND = model.embed_image(image), frugal.embed_image(image)
        segments = frugal._reader.plan(
            messages.question(QUESTION, [image]), [frugal._vision.look(image, Timings()).layout]
        )
        answer = frugal.ask(QUESTION, [image], max_tokens=6)
    shares = plain_shares(n_tokens, 5, 16, 4)
    chosen = [16 * tile + i for tile, n in enumerate(shares) for i in plain_choice(full_ND[16 * tile :][:16], n)]
    assert np.array_equal(found_ND, full_ND[chosen])
    assert not found_ND.flags.writeable
    assert answer.usage.image_tokens == n_tokens
    # transformers, with its own embeddings, without those that were not chosen
    inputs = reference_inputs(processor, QUESTION, [image])
    ids_N, is_row_N = inputs["input_ids"][0], inputs["input_ids"][0] == reference.config.image_token_id
    kept_N = ~is_row_N
    kept_N[torch.nonzero(is_row_N)[chosen, 0]] = True
    ours = [
        t
        for s in segments
        for t in (s.tokens if isinstance(s, TextSegment) else [reference.config.image_token_id] * len(s))
    ]
    assert ours == ids_N[kept_N].tolist()
    with torch.no_grad():
        made_ND = reference.get_input_embeddings()(ids_N).clone()
        made_ND[is_row_N] = torch.cat(list(reference.model.get_image_features(inputs["pixel_values"]).pooler_output))
        made_ND = made_ND[kept_N]
        wanted = reference(inputs_embeds=made_ND[None]).logits[0, -1].numpy()
        # What stands for pictures has no place in an answer (models.md, 11.6); the reference is told so as well.
        banned = [name for name in (FAKE, "<image>", *ROWS) if name in processor.tokenizer.get_vocab()]
        told = reference.generate(inputs_embeds=made_ND[None], max_new_tokens=6, do_sample=False, pad_token_id=0,
                                  attention_mask=torch.ones(1, len(made_ND)),
                                  suppress_tokens=processor.tokenizer.convert_tokens_to_ids(banned))  # fmt: skip
    found = exact_logits(out / "decoder.gguf", splice(segments, {0: ("kept", found_ND)}))
    assert np.abs(found - wanted).max() <= LOGIT_TOLERANCE
    assert answer.text == processor.tokenizer.decode(told[0], skip_special_tokens=True)
    # The twin: the same rows in another order are seen.
    turned = exact_logits(out / "decoder.gguf", splice(segments, {0: ("turned", found_ND[::-1].copy())}))
    assert np.abs(turned - wanted).max() > LOGIT_TOLERANCE


def test_rows_without_a_grid_are_chosen_as_well(minicpm):
    image = picture("large")
    with load(minicpm) as model, load(minicpm, image_tokens=17) as frugal:
        full_ND, found_ND = model.embed_image(image), frugal.embed_image(image)
        shares = plain_shares(17, len(full_ND) // 6, 6, 0)
        assert shares == [6, 2, 2, *[1] * 7]
        chosen = [6 * tile + i for tile, n in enumerate(shares) for i in plain_choice(full_ND[6 * tile :][:6], n)]
        assert np.array_equal(found_ND, full_ND[chosen])
        assert frugal.ask(QUESTION, [image], max_tokens=2).usage.image_tokens == 17


@pytest.fixture(scope="module")
def panel():
    return make_scene(700_000_001, "clean").image()


@pytest.mark.parametrize("budget", ["full", 64, "64", 1 << 24])
def test_all_is_all(panel, budget):
    with edgevlm.load(threads=1) as model, edgevlm.load(threads=1, image_tokens=budget) as other:
        one, two = (m._vision.look(panel, Timings()) for m in (model, other))
        assert (one.key, one.layout, one.known_as) == (two.key, two.layout, two.known_as)
        rows_ND = other.embed_image(panel)
        assert np.array_equal(model.embed_image(panel), rows_ND)
        assert rows_ND is other._vision.embed(two, Timings())  # no copy
        question = "Describe the panel."
        assert model.ask(question, [panel]).text == other.ask(question, [panel]).text
    with edgevlm.load(threads=1, image_tokens=63) as fewer:
        assert fewer._vision.look(panel, Timings()).key != one.key
        assert len(fewer.embed_image(panel)) == 63


def test_a_smaller_budget_fits_a_smaller_context(panel):
    with edgevlm.load(threads=1, context=64) as model, pytest.raises(ContextError, match="64 of them pictures"):
        model.ask("What does the display read?", [panel])
    with edgevlm.load(threads=1, context=64, image_tokens=16) as model:
        assert model.ask("What does the display read?", [panel]).usage.image_tokens == 16


# ---- caches


def test_caches_keep_all_rows_and_never_mix_budgets(panel, tmp_path):
    """Every budget gives, from a folder that others have filled, what it gives without one; only once is encoded."""
    questions = ["What does the display read?", "Describe the panel."]
    budgets = ["full", 16, 9, "full", 16, 4]
    encoded = []
    for budget in budgets:
        with (
            edgevlm.load(threads=1, image_tokens=budget) as fresh,
            edgevlm.load(threads=1, image_tokens=budget, state=tmp_path) as cached,
        ):
            for question in questions:
                wanted, found = (m.ask(question, [panel]) for m in (fresh, cached))
                assert (found.text, found.usage.image_tokens) == (wanted.text, wanted.usage.image_tokens)
                encoded.append(found.timings.encode_s > 0)
            if budget == 16:
                sixteen_ND = cached.embed_image(panel)
                assert len(sixteen_ND) == 16
                assert np.array_equal(sixteen_ND, fresh.embed_image(panel))
    assert encoded == [True] + [False] * (2 * len(budgets) - 1)
    names = {path.suffix: 0 for path in (tmp_path / "kept").iterdir()}
    for path in (tmp_path / "kept").iterdir():
        names[path.suffix] += 1
    assert names[".embeds"] == 1
    assert names[".state"] == len(set(budgets))


def test_the_context_of_one_budget_is_not_anothers(panel, monkeypatch):
    """The key says how many rows: without that, a context would be taken for one that it is not."""

    def second_answer(change):
        with edgevlm.load(threads=1, image_tokens=16) as model:
            model.ask("What does the display read?", [panel])
            change(model._vision)
            model._vision._sources.clear()
            return model.ask("Describe the panel.", [panel])

    def to_four(vision):
        vision._budget = Budget(4)

    with edgevlm.load(threads=1, image_tokens=4) as model:
        wanted = model.ask("Describe the panel.", [panel])
    found = second_answer(to_four)
    assert found.text == wanted.text
    assert found.usage.cached_tokens < found.usage.image_tokens + found.usage.cached_tokens < found.usage.prompt_tokens
    # The twin: under a key that does not say it, rows of the larger budget count as those of the smaller one.
    monkeypatch.setattr(Budget, "key", lambda self, known_as: known_as)
    assert second_answer(to_four).usage.cached_tokens > found.usage.cached_tokens


def test_turns_of_a_conversation_reuse_the_reduced_picture(panel):
    with edgevlm.load(threads=1, image_tokens=9) as model:
        chat = model.chat()
        first, second = chat.ask("What does the display read?", [panel]), chat.ask("Which lamps are on?")
        assert first.usage.image_tokens == second.usage.image_tokens == 9
        assert second.usage.cached_tokens >= first.usage.prompt_tokens
        assert second.timings.encode_s == 0


# ---- what is refused


@pytest.mark.parametrize(
    "value",
    [0, -1, 1 << 25, 10**5000, 1.5, math.nan, math.inf, True, None, "", "abc", "nan", "0", "-3", "1e3", "٣", " 16",
     "16 ", "99999999999", "full ", "FULL", "144:pool", b"16", [16], "9" * 100_000, "\n"],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:12] if not isinstance(value, int) else value.bit_length()}",
)  # fmt: skip
def test_values_that_are_none(value):
    with pytest.raises(
        UsageError, match="image_tokens must be full or a whole number from 1 to 16777216, found "
    ) as error:
        edgevlm.load(image_tokens=value)
    assert len(str(error.value)) < 150
    assert "\n" not in str(error.value)


def test_whole_numbers_of_other_libraries_are_welcome():
    assert parse_budget(np.int64(9)) == parse_budget("9") == parse_budget("0009") == parse_budget(9) == Budget(9)


def test_a_model_that_cannot_see_has_no_budget(smollm2):
    with pytest.raises(CapabilityError, match="cannot see pictures"):
        edgevlm.load(smollm2, image_tokens=16)


def test_fewer_tokens_than_tiles_name_the_least(smolvlm):
    with load(smolvlm[0], image_tokens=4) as model:
        for ask in (model.ask, model.chat().ask):
            with pytest.raises(UsageError, match="give at least 5, or full"):
                ask(QUESTION, [picture("landscape")])
        assert model.ask("Why?", max_tokens=1).usage.image_tokens == 0  # the model stays usable

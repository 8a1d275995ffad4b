"""docs/models.md is what the families say, and its sizes are those of published files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgevlm import families
from edgevlm.converters import catalog
from edgevlm.errors import CheckpointError

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
#: Of llama.cpp's vocabulary file of Llama 3, which is a header without tensors.
LLAMA_3_HEADER = 7_818_140
#: Bytes of widely used Q4_K_M files, noted from memory: a cross-check of the arithmetic, no reference. All three
#: agree within kilobytes (templates, keys); the reference is the comparison with real conversions.
PUBLISHED = {"Llama 3.2 1B": 807_694_464, "Llama 3.2 3B": 2_019_377_696, "Llama 3 8B": 4_920_734_272}


def model(name):
    return next((f, m) for f in families.families() for m in f.published if m.name == name)


def test_the_page_is_what_the_families_say():
    """If this fails, `make docs` renews the page."""
    assert PAGE.read_text(encoding="utf-8") == catalog.page()


def test_every_family_is_on_it():
    assert all(family.title and family.published for family in families.families())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_published_files(name):
    found = catalog.sizes(*model(name)).decoder["q4_k_m"]
    assert found + LLAMA_3_HEADER == pytest.approx(PUBLISHED[name], abs=100_000)


def test_a_fact_that_contradicts_the_family_is_found():
    family, published = model("Llama 3.2 1B")
    wrong = dataclasses.replace(published, config={**published.config, "mlp_bias": True})
    with pytest.raises(CheckpointError):
        catalog.sizes(family, wrong)
    smaller = dataclasses.replace(published, config={**published.config, "num_hidden_layers": 15})
    assert catalog.sizes(family, smaller).decoder["f16"] < catalog.sizes(family, published).decoder["f16"]


def test_devices():
    half = 512 << 20
    found = [catalog.device(n) for n in (0, half, half + 1, 7 << 30, 100 << 30)]
    assert found == ["1 GB", "1 GB", "2 GB", "8 GB", "more"]

"""A family is a file of declarations; one with known parts needs no other change."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from edgevlm import families
from edgevlm.converters import convert, onnx_vision
from edgevlm.converters.transforms import TRANSFORMS
from edgevlm.encoder import Encoder
from edgevlm.errors import CheckpointError
from edgevlm.families.mmproj import KEYS, TENSORS
from edgevlm.families.parts import LINEAR

FOLDER = Path(families.__path__[0])
DECLARATIONS = [
    FOLDER / "parts.py",
    FOLDER / "published.py",
    FOLDER / "templates.py",
    FOLDER / "mmproj.py",
    *(FOLDER / f"{name}.py" for name in families.module_names()),
]


def only_declares(source: str) -> bool:
    """Whether a module holds a docstring, imports and assignments without loops, functions or arithmetic on names."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    forbidden = (ast.Lambda, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp, ast.IfExp, ast.Attribute)
    tree = ast.parse(source)
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return all(isinstance(node, allowed) for node in body) and not any(
        isinstance(node, forbidden) for node in ast.walk(tree)
    )


@pytest.mark.parametrize("path", DECLARATIONS, ids=lambda path: path.name)
def test_a_family_file_only_declares(path):
    assert only_declares(path.read_text())
    assert not only_declares(path.read_text() + "\nfor i in range(3): pass\n")
    assert not only_declares(path.read_text() + "\nX = [i for i in range(3)]\n")


def test_families_are_found_by_their_architecture():
    assert families.find(["LlavaForConditionalGeneration"]).name == "llava"
    with pytest.raises(CheckpointError, match=r"supported are .*LlamaForCausalLM, LlavaFor") as caught:
        families.find(["MambaForCausalLM"])
    assert caught.value.code == "checkpoint.unsupported"


def test_architectures_and_names_are_unique():
    declared = families.families()
    names = [family.name for family in declared]
    architectures = [(name, str(family.needs)) for family in declared for name in family.hf_architectures]
    assert len(set(names)) == len(names)
    assert len(set(architectures)) == len(architectures)


@pytest.mark.parametrize("family", families.families(), ids=lambda family: family.name)
def test_everything_that_a_family_names_exists(family):
    vision = family.vision
    for tower in vision.towers if vision else ():
        assert tower.kind in onnx_vision.TOWERS
    assert vision is None or vision.connector.kind in onnx_vision.CONNECTORS
    for part in (*vision.towers, vision.connector, family.decoder) if vision else (family.decoder,):
        targets = [weight.to for weight in part.weights.values()]
        assert len(set(targets)) == len(targets)
        for leaf, weight in part.weights.items():
            assert ("{i}" in leaf) == ("{i}" in weight.to)
            assert not weight.transform or weight.transform.partition(":")[0] in TRANSFORMS


@pytest.mark.parametrize("family", [one for one in families.families() if one.mmproj], ids=lambda family: family.name)
def test_what_a_family_says_of_mmproj_files_fits_the_family(family):
    for declared in family.mmproj:
        assert declared.tower in family.vision.towers
        assert declared.processor in family.vision.processors
        assert {weight.to for weight in declared.tower.weights.values()} <= set(TENSORS)
        ours, theirs = (sorted((weight.to, weight.shape) for weight in part.weights.values())
                        for part in (family.vision.connector, declared.connector))  # fmt: skip
        assert ours == theirs
        known = {*family.keys.read, *family.vision.connector.keys.read, *family.vision.connector.keys.fixed}
        assert {*declared.config, *declared.config_keys} <= known
        assert {*declared.config_keys.values()} <= {*KEYS.read, *declared.keys.read}
        assert declared.layer_norm_eps == declared.tower.keys.read["layer_norm_eps"]


def test_a_projector_is_found_by_type_class_token_and_tensors():
    both, one = ["mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"], ["mm.0.weight", "mm.0.bias"]
    cases = {"llava_mlp": ("mlp", [*both, "v.class_embd"]), "llava_linear": ("mlp", [*one, "v.class_embd"]),
             "llava": ("mlp", both), "smolvlm": ("idefics3", ["mm.model.fc.weight"])}  # fmt: skip
    assert {name: families.find_mmproj(*case)[0].name for name, case in cases.items()} == {name: name for name in cases}
    assert families.find_mmproj("mlp", [*both[:3], "v.class_embd"])[0].name == "llava_mlp"  # one is missing
    assert families.find_mmproj("mlp", ["mm.weight", "mm.bias", "v.class_embd"])[0].name == "llava_linear"
    for projector in ("qwen2vl_merger", "ldp", "janus_pro", ""):
        with pytest.raises(CheckpointError, match=r"supported are idefics3, mlp$"):
            families.find_mmproj(projector, both)
    with pytest.raises(CheckpointError, match="'idefics3' behind a tower with a class token"):
        families.find_mmproj("idefics3", ["v.class_embd"])


def test_a_new_family_of_known_parts_is_one_declaration(tmp_path):
    """LLaVA 1.0 in Hugging Face's names: a single linear layer, under a prefix of its own."""
    folder = tiny.copy(tiny.Variant(tower="clip"), tmp_path / "model")
    rename = {"multi_modal_projector.linear_1.": "bridge."}

    def change(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if ".linear_2." not in name}
        return {_renamed(name, rename): tensor for name, tensor in kept.items()}

    tiny.rewrite_tensors(folder, change)
    tiny.rewrite_json(folder / "config.json", lambda c: _without(c, "projector_hidden_act", "multimodal_projector_bias")
                      | {"architectures": ["TinyLinearModel"]})  # fmt: skip
    llava = families.find(["LlavaForConditionalGeneration"])
    vision = dataclasses.replace(llava.vision, connector=LINEAR, connector_prefixes=("bridge.",))
    family = dataclasses.replace(llava, name="tiny-linear", hf_architectures=("TinyLinearModel",), vision=vision)
    manifest = convert(folder, tmp_path / "out", encoder_quant="fp32", known_families=(family,))
    assert (manifest.spec.family, manifest.spec.encoder.connector) == ("tiny-linear", "linear")
    assert "tiny-linear" in json.loads((tmp_path / "out" / "bundle.json").read_text())["spec"]["family"]
    tiles_TCHW = np.random.default_rng(0).normal(size=(1, 3, tiny.SIDE_PX, tiny.SIDE_PX)).astype(np.float32)
    model = tiny.shared(tiny.Variant(tower="clip"))[1].model
    with torch.no_grad():
        states = model.vision_tower(torch.from_numpy(tiles_TCHW), output_hidden_states=True).hidden_states[-1]
        wanted = model.multi_modal_projector.linear_1(states).numpy()
    found = Encoder(tmp_path / "out" / "encoder.onnx", manifest.spec.encoder).encode(tiles_TCHW)
    assert np.abs(found - wanted).max() <= 1e-4  # float32 sums in another order


def test_the_last_norm_of_siglip_follows_where_a_family_says_so(tmp_path):
    folder, model = tiny.shared(tiny.Variant())
    family = with_last_norm()
    manifest = convert(folder, tmp_path / "out", encoder_quant="fp32", known_families=(family,))
    tiles_TCHW = np.random.default_rng(0).normal(size=(1, 3, tiny.SIDE_PX, tiny.SIDE_PX)).astype(np.float32)
    with torch.no_grad():
        output = model.model.vision_tower(torch.from_numpy(tiles_TCHW), output_hidden_states=True)
        wanted, without = (
            model.model.multi_modal_projector(states).numpy()
            for states in (output.last_hidden_state, output.hidden_states[-1])
        )
    found = Encoder(tmp_path / "out" / "encoder.onnx", manifest.spec.encoder).encode(tiles_TCHW)
    assert np.abs(found - wanted).max() <= 1e-4 < np.abs(found - without).max()


def test_a_last_norm_that_a_tower_does_not_have_is_refused(tmp_path):
    family = with_last_norm()
    with pytest.raises(CheckpointError, match="last norm"):
        convert(tiny.shared(tiny.Variant(tower="clip"))[0], tmp_path / "out", known_families=(family,))


def with_last_norm():
    llava = families.find(["LlavaForConditionalGeneration"])
    return dataclasses.replace(llava, vision=dataclasses.replace(llava.vision, post_norm=True))


def _renamed(name: str, rename: dict[str, str]) -> str:
    for old, new in rename.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _without(data: dict, *keys: str) -> dict:
    return {key: value for key, value in data.items() if key not in keys}

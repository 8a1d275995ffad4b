"""The encoder graph as a file: which products are int8, what is float32, and what any number of tiles gives."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest
import tiny
from tiny import Variant

from edgevlm import families
from edgevlm.converters import convert
from edgevlm.converters.calibration import built_in, pictures
from edgevlm.converters.verify import relative_error
from edgevlm.encoder import Encoder
from edgevlm.errors import CheckpointError
from edgevlm.families.parts import MLP
from edgevlm.families.schema import Weight

SIGLIP, CLIP = Variant(), Variant(tower="clip", feature_layer=-2, strategy="default")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    made = {}
    for tower, variant in (("siglip", SIGLIP), ("clip", CLIP)):
        for quant in ("fp32", "int8"):
            out = tmp_path_factory.mktemp("bundle") / "out"
            made[tower, quant] = (out, convert(tiny.shared(variant)[0], out, encoder_quant=quant))
    return made


def kinds(out):
    graph = onnx.load(out / "encoder.onnx", load_external_data=False).graph
    return graph, Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize(("tower", "layers"), [("siglip", 3), ("clip", 2)])
def test_a_block_is_nine_fused_nodes(bundles, tower, layers):
    graph, found = kinds(bundles[tower, "fp32"][0])
    assert found["MultiHeadAttention"] == layers
    assert found["SkipLayerNormalization"] == 2 * layers - 1  # the first norm of all has no branch to close
    assert found["MatMul"] == 4 * layers + 2
    assert found["Split"] == layers
    assert found["DynamicQuantizeMatMul"] == 0
    blocks = [node for node in graph.node if node.name.startswith("tower.blk.1.")]
    extra = 1 if tower == "clip" else 0  # QuickGelu has no bias of its own
    assert len(blocks) == 9 + extra


@pytest.mark.parametrize(("tower", "layers"), [("siglip", 3), ("clip", 2)])
def test_int8_replaces_the_four_products_of_a_block_and_nothing_else(bundles, tower, layers):
    graph, found = kinds(bundles[tower, "int8"][0])
    assert found["DynamicQuantizeMatMul"] == 4 * layers
    assert found["MatMul"] == 2
    assert {node.name for node in graph.node if node.op_type == "MatMul"} == {"connector.MatMul", "connector.MatMul_2"}
    int8 = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert len(int8) == 4 * layers
    assert all(name.endswith(".int8") for name in int8)


def test_the_interface_is_the_contract(bundles):
    for (tower, _), (out, manifest) in bundles.items():
        graph, _ = kinds(out)
        ((pixels,), (embeds,)) = graph.input, graph.output
        assert (pixels.name, embeds.name) == ("pixels_TCHW", "embeds_TND")
        dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (pixels, embeds)]
        assert dims == [["T", 3, tiny.SIDE_PX, tiny.SIDE_PX], ["T", 16, 64]], tower
        assert manifest.spec.encoder.n_tokens == 16
        onnx.checker.check_model(out / "encoder.onnx")


@pytest.mark.parametrize("key", [("siglip", "fp32"), ("clip", "fp32")])
def test_tiles_do_not_influence_each_other_in_float32(bundles, key):
    out, manifest = bundles[key]
    encoder = Encoder(out / "encoder.onnx", manifest.spec.encoder)
    tiles_TCHW = built_in(manifest.spec.image).tiles_TCHW
    together = encoder.encode(tiles_TCHW)
    alone = np.concatenate([encoder.encode(tile[None]) for tile in tiles_TCHW])
    # Other blocking of the same sums. (int8 activations share one scale; the runtime encodes one picture at a time.)
    assert np.abs(together - alone).max() <= 1e-4
    assert np.abs(together - alone[::-1]).max() > 1e-4


def test_the_recorded_fidelity_is_that_of_single_pictures(bundles):
    """And not of a batch, whose int8 activations share one scale."""
    (exact, manifest), (int8, recorded) = bundles["clip", "fp32"], bundles["clip", "int8"]
    tiles_TCHW = built_in(manifest.spec.image).tiles_TCHW
    reference, found = (Encoder(out / "encoder.onnx", manifest.spec.encoder) for out in (exact, int8))
    alone, batch = (
        relative_error(reference.encode(tiles_TCHW), embeds)
        for embeds in (np.concatenate([found.encode(t[None]) for t in tiles_TCHW]), found.encode(tiles_TCHW))
    )
    error = recorded.fidelity["encoder"]["relative_error"]
    assert error == pytest.approx(alone, rel=0.06)  # two digits
    assert abs(error - alone) < abs(error - batch)


def test_a_declared_weight_that_no_layer_reads_is_our_bug(tmp_path):
    """And the checkpoint's tensors are found by the declaration alone."""
    extra = {"linear_2.bias": Weight("fc2.bias", ("n_embd",)), "linear_3.bias": Weight("fc3.bias", ("n_embd",))}
    connector = dataclasses.replace(MLP, weights={**MLP.weights, **extra})
    llava = families.find(["LlavaForConditionalGeneration"])
    family = dataclasses.replace(llava, vision=dataclasses.replace(llava.vision, connector=connector))
    folder = tiny.copy(SIGLIP, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"linear_3\.bias"):
        convert(folder, tmp_path / "out", known_families=(family,))
    name = "multi_modal_projector.linear_2.bias"
    tiny.rewrite_tensors(folder, lambda t: {**t, name.replace("_2", "_3"): t[name].clone()})
    with pytest.raises(AssertionError, match=r"fc3\.bias"):
        convert(folder, tmp_path / "out", known_families=(family,))
    assert not (tmp_path / "out").exists()


def test_the_calibration_pictures_never_change():
    """Numbers in a bundle are comparable between releases only if these stay the same."""
    images_NHWC = pictures(48, 64)
    assert images_NHWC.shape == (8, 48, 64, 3)
    assert images_NHWC.dtype == np.uint8
    assert images_NHWC.reshape(8, -1).astype(np.int64).sum(axis=1).tolist() == PICTURE_SUMS
    assert len({image.tobytes() for image in images_NHWC}) == 8


PICTURE_SUMS = [1175040, 1175040, 695236, 2033730, 1494784, 1338541, 176633, 899036]

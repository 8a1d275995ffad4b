"""The encoder as fp16, int8 and int4: what is stored, what it costs, and what int8 does about outliers."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_sample_images
from tiny import Variant

from edgevlm.converters import convert, limits
from edgevlm.converters.calibration import MOST_PICTURES
from edgevlm.converters.onnx_products import Sample
from edgevlm.converters.smoothing import Observation, error_of
from edgevlm.converters.transforms import quantize_blocks, quantize_columns
from edgevlm.encoder import Encoder
from edgevlm.errors import CheckpointError, EdgeVLMError, FidelityError, FileError, ImageError, UsageError
from edgevlm.image import load_image
from edgevlm.preprocess import preprocess

SIGLIP = Variant()
OPTIONS = {"decoder_quant": "f16", "fidelity_tokens": 0}
#: Of each block qkv, o, fc1 and fc2.
PRODUCTS = 4 * 3


def run_product(node_kind, inputs, outputs, x, **attributes):
    """One node of ONNX Runtime's, with constant weights."""
    names = list(inputs)
    node = helper.make_node(node_kind, ["x", *names], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*x.shape[:-1], outputs])],
        [numpy_helper.from_array(inputs[name], name) for name in names],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


# ---- int4


def unpacked(packed, scale_NB, inputs):
    """What the packed weights mean, read by the format's description: [inputs, outputs]."""
    low, high = packed & 15, packed >> 4
    codes_NBK = np.stack([low, high], axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32) - 8
    return (codes_NBK * scale_NB[..., None]).reshape(len(packed), -1)[:, :inputs].T


@pytest.mark.parametrize("inputs", [64, 96, 80])
def test_int4_is_packed_as_onnx_runtime_reads_it(inputs):
    rng = np.random.default_rng(inputs)
    weight_KN = rng.standard_normal((inputs, 48), dtype=np.float32)
    weight_KN[:, 3], weight_KN[32:64, 5] = 0, 0
    x = rng.standard_normal((1, 5, inputs), dtype=np.float32)
    packed, scale_NB = quantize_blocks(weight_KN, 32)
    assert packed.shape == (48, -(-inputs // 32), 16)
    assert packed.dtype == np.uint8
    found = run_product(
        "MatMulNBits", {"w": packed, "s": scale_NB.reshape(-1)}, 48, x, K=inputs, N=48, bits=4, block_size=32
    )
    exact = x @ unpacked(packed, scale_NB, inputs)
    assert np.abs(found - exact).max() < 1e-4  # float32 sums of 96 terms of size 1, in another order
    swapped = run_product(
        "MatMulNBits", {"w": packed << 4 | packed >> 4, "s": scale_NB.reshape(-1)}, 48, x,
        K=inputs, N=48, bits=4, block_size=32,
    )  # fmt: skip
    assert np.abs(swapped - exact).max() > 1


def test_the_scales_of_int4_are_better_than_the_largest_weight_s():
    rng = np.random.default_rng(0)
    weight_KN = rng.standard_normal((512, 64), dtype=np.float32)
    packed, scale_NB = quantize_blocks(weight_KN, 32)
    blocks = weight_KN.T.reshape(64, -1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    steps = np.clip(np.rint(blocks / (largest / -8)), -8, 7) * (largest / -8)
    plain, ours = (
        float(np.linalg.norm(found - weight_KN) / np.linalg.norm(weight_KN))
        for found in (steps.reshape(64, -1).T, unpacked(packed, scale_NB, 512))
    )
    assert ours < 0.97 * plain
    assert ours < 0.09


# ---- the four forms of one encoder


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    made = {}
    for quant in ("fp32", "fp16", "int8", "int4"):
        out = tmp_path_factory.mktemp(quant) / "out"
        made[quant] = out, convert(tiny.shared(SIGLIP)[0], out, encoder_quant=quant, **OPTIONS)
    return made


def test_what_each_form_stores(forms):
    kinds = {}
    for quant, (out, _) in forms.items():
        graph = onnx.load(out / "encoder.onnx", load_external_data=False).graph
        types = {TensorProto.DataType.Name(t.data_type) for t in graph.initializer if len(t.dims) >= 2}
        kinds[quant] = types, {node.op_type for node in graph.node}
    assert "FLOAT16" in kinds["fp16"][0]
    assert "INT8" in kinds["int8"][0]
    assert "UINT8" in kinds["int4"][0]
    assert "MatMulNBits" in kinds["int4"][1]
    assert "DynamicQuantizeMatMul" not in kinds["int4"][1]
    assert "DynamicQuantizeMatMul" in kinds["int8"][1]
    sizes = {quant: bytes_of_products(out) for quant, (out, _) in forms.items()}
    assert sizes["fp16"] == sizes["fp32"] / 2
    assert sizes["int8"] < 0.3 * sizes["fp32"]  # 8 bits and a scale of 32 for each output
    assert sizes["int4"] < 0.21 * sizes["fp32"]  # 4 bits, a scale of 32 for each 32 weights, and rows of 48 take 64


def bytes_of_products(out):
    """Weights and scales of the blocks' products; the rest of a tiny encoder is larger."""
    graph = onnx.load(out / "encoder.onnx", load_external_data=False).graph
    found = 0
    for tensor in graph.initializer:
        if any(f".{part}.weight" in tensor.name for part in ("qkv", "o", "fc1", "fc2")) and "tower" in tensor.name:
            external = {entry.key: entry.value for entry in tensor.external_data}
            found += int(external["length"]) if external else len(tensor.raw_data)
    return found


def test_what_each_form_costs(forms):
    """Random weights, which have no redundancy. Relative errors are about 0.01 as int8 and 0.2 as int4."""
    cost = {quant: manifest.fidelity["encoder"] for quant, (_, manifest) in forms.items()}
    assert cost["fp16"]["cosine_min"] > 0.99999
    assert cost["int8"]["cosine_min"] > 0.997
    assert 0.999 > cost["int4"]["cosine_mean"] > 0.95
    assert not any("exceeded_limits" in manifest.fidelity for _, manifest in forms.values())


def test_the_embeddings_are_what_the_figures_say(forms):
    image_HWC = load_image(load_sample_images().images[0])
    tiles_TCHW = preprocess(image_HWC, forms["fp32"][1].spec.image)
    embeds = {
        quant: Encoder(out / "encoder.onnx", manifest.spec.encoder).encode(tiles_TCHW)
        for quant, (out, manifest) in forms.items()
    }
    exact = embeds.pop("fp32")
    errors = {quant: float(np.linalg.norm(found - exact) / np.linalg.norm(exact)) for quant, found in embeds.items()}
    assert errors["fp16"] < 1e-3 < errors["int8"] < 0.05 < errors["int4"] < 0.5


def test_fp16_refuses_what_it_cannot_store(tmp_path):
    folder = tiny.copy(SIGLIP, tmp_path / "model")

    def enlarge(tensors):
        name = next(name for name in tensors if name.endswith("layers.0.mlp.fc1.weight"))
        tensors[name][3, 4] = 70000
        return tensors

    tiny.rewrite_tensors(folder, enlarge)
    with pytest.raises(CheckpointError, match=r"blk\.0\.fc1\.weight holds 70000.*65504"):
        convert(folder, tmp_path / "out", encoder_quant="fp16", **OPTIONS)
    assert not (tmp_path / "out").exists()


# ---- outliers


def with_outliers(folder, *, norm="", activation=""):
    """The same function of the pixels, with a channel that is 300 times larger inside one place of a block.

    Args:
        folder: Of a checkpoint that may be changed.
        norm: `layer_norm1` or `layer_norm2`, whose output gets the outlier.
        activation: `fc1`: what the activation function makes gets it, in one channel of one block.
    """

    def change(tensors):
        block = "layers.1."
        for name, tensor in tensors.items():
            if block not in name or "vision" not in name:
                continue
            if norm and f"{norm}.weight" in name:
                tensor[3] *= 300
            if norm and f"{norm}.bias" in name:
                tensor[3] *= 300
            readers = {"layer_norm1": ("q_proj", "k_proj", "v_proj"), "layer_norm2": ("fc1",)}.get(norm, ())
            if any(f"{reader}.weight" in name for reader in readers):
                tensor[:, 3] /= 300
            if activation and "fc1.bias" in name:
                tensor[3] = 500
            if activation and "fc2.weight" in name:
                tensor[:, 3] /= 500
        return tensors

    tiny.rewrite_tensors(folder, change)
    return folder


@pytest.mark.parametrize(("norm", "product"), [("layer_norm1", "qkv"), ("layer_norm2", "fc1")])
def test_a_large_channel_is_smoothed_away(tmp_path, forms, norm, product):
    folder = with_outliers(tiny.copy(SIGLIP, tmp_path / "model"), norm=norm)
    found = convert(folder, tmp_path / "out", **OPTIONS).fidelity["encoder"]
    usual = forms["int8"][1].fidelity["encoder"]
    assert found["in_float32"] == []
    assert found["smoothed"] >= 1
    assert found["products"] == PRODUCTS
    assert found["relative_error"] < 1.5 * usual["relative_error"]
    # Without smoothing it would be far beyond every limit.
    bad = untreated(folder, tmp_path / "untreated")
    assert bad["relative_error"] > 4 * found["relative_error"], product


def untreated(folder, out):
    """What int8 costs if nothing is done about outliers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgevlm.converters.smoothing.STRENGTHS", ())
        patch.setattr("edgevlm.converters.smoothing.TOLERABLE", np.inf)
        patch.setattr("edgevlm.converters.encoder._EXACT_SHARES", ())
        return convert(folder, out, force=True, **OPTIONS).fidelity["encoder"]


def test_a_large_activation_keeps_its_product_in_float32(tmp_path):
    folder = with_outliers(tiny.copy(SIGLIP, tmp_path / "model"), activation="fc1")
    found = convert(folder, tmp_path / "out", **OPTIONS).fidelity["encoder"]
    assert found["in_float32"] == ["tower.blk.1.fc2"]
    assert found["relative_error"] < 0.05 < untreated(folder, tmp_path / "untreated")["relative_error"]
    graph = onnx.load(tmp_path / "out" / "encoder.onnx", load_external_data=False).graph
    assert "tower.blk.1.fc2.weight" in {tensor.name for tensor in graph.initializer}


def test_the_worst_products_become_float32_until_the_whole_is_good(tmp_path, monkeypatch, forms):
    usual = forms["int8"][1].fidelity["encoder"]
    monkeypatch.setitem(limits.COSINES, "int8", (usual["cosine_mean"] + 5e-6, 0.9))
    found = convert(tiny.shared(SIGLIP)[0], tmp_path / "out", **OPTIONS).fidelity["encoder"]
    assert 1 <= len(found["in_float32"]) <= PRODUCTS / 4
    assert found["cosine_mean"] > usual["cosine_mean"]
    monkeypatch.setitem(limits.COSINES, "int8", (1, 1))
    with pytest.raises(FidelityError, match=r"int8 sees.*try encoder_quant fp16"):
        convert(tiny.shared(SIGLIP)[0], tmp_path / "never", **OPTIONS)
    assert not (tmp_path / "never").exists()


def test_int4_that_sees_other_things_is_refused(tmp_path):
    """One weight in each block is made so large that all others round to nothing."""
    folder = tiny.copy(SIGLIP, tmp_path / "model")

    def stretch(tensors):
        for name, tensor in tensors.items():
            if "vision" in name and name.endswith("fc1.weight"):
                tensor[:, ::32] *= 200
            if "vision" in name and "layer_norm2" in name:
                tensor[::32] /= 200
        return tensors

    tiny.rewrite_tensors(folder, stretch)
    with pytest.raises(FidelityError, match=r"int4 sees.*try encoder_quant int8"):
        convert(folder, tmp_path / "out", encoder_quant="int4", **OPTIONS)


def test_the_estimate_is_what_onnx_runtime_loses():
    """The error that decides is imitated; here the real operator runs on the same numbers."""
    rng = np.random.default_rng(3)
    weight_KN = rng.standard_normal((96, 64), dtype=np.float32)
    rows_PRK = rng.standard_normal((2, 40, 96), dtype=np.float32)
    rows_PRK[..., 5] *= 30
    seen = Observation(rows_PRK=rows_PRK, low_PK=rows_PRK.min(axis=1), high_PK=rows_PRK.max(axis=1))
    int8_KN, scale_N = quantize_columns(weight_KN)
    exact = rows_PRK @ weight_KN
    found = np.stack(
        [run_product("DynamicQuantizeMatMul", {"w": int8_KN, "s": scale_N}, 64, rows) for rows in rows_PRK]
    )
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert error_of(seen, weight_KN, None) == pytest.approx(error, rel=1e-3)
    factors_K = np.where(np.arange(96) == 5, np.float32(30), np.float32(1))
    assert error_of(seen, weight_KN, factors_K) < 0.7 * error
    assert Sample(columns_KN=weight_KN, largest_K=np.abs(weight_KN).max(1)).largest_K.shape == (96,)


# ---- calibration pictures


def photographs(folder):
    from PIL import Image

    folder.mkdir()
    for name, image_HWC in zip(("china.jpg", "flower.png"), load_sample_images().images, strict=True):
        Image.fromarray(image_HWC).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_a_folder_of_pictures_takes_the_place_of_the_built_in_ones(tmp_path, forms):
    folder = photographs(tmp_path / "photos")
    manifest = convert(tiny.shared(SIGLIP)[0], tmp_path / "out", calibration=folder, **OPTIONS)
    found = manifest.fidelity["encoder"]
    assert found["pictures"] == "2 pictures of photos"
    assert found["relative_error"] != forms["int8"][1].fidelity["encoder"]["relative_error"]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("china.jpg", "flower.png")}
    assert manifest.provenance["arguments"]["calibration"] == {"files": digests}
    assert "calibration" not in forms["int8"][1].provenance["arguments"]


@pytest.mark.parametrize(
    ("prepare", "error", "words"),
    [
        (lambda folder: folder.rmdir(), FileError, "is not a folder"),
        (lambda folder: None, UsageError, "holds 0 JPEG, PNG or WebP files; between 1 and"),
        (lambda folder: [(folder / f"{i}.png").touch() for i in range(MOST_PICTURES + 1)], UsageError, "holds 33"),
        (lambda folder: (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing"), ImageError, "broken.jpg"),
    ],
)
def test_pictures_that_cannot_be_used(tmp_path, prepare, error, words):
    folder = tmp_path / "photos"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(EdgeVLMError, match=words) as caught:
        convert(tiny.shared(SIGLIP)[0], tmp_path / "out", calibration=folder, **OPTIONS)
    assert isinstance(caught.value, error)
    shutil.rmtree(folder, ignore_errors=True)
    assert not list(tmp_path.iterdir())

"""Attention in integers as ONNX Runtime runs it, and the encoders that use it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from test_kernels_attention import F32, attend, numbers
from tiny import Variant

from edgevlm import _kernels, kernels
from edgevlm.converters import convert
from edgevlm.converters.smoothing import TOLERABLE, choose_attentions
from edgevlm.encoder import Encoder
from edgevlm.errors import BackendError, DependencyError, KernelError

# ---- the operator of ONNX Runtime


def session(bias_E, axes=3, **attributes):
    node = helper.make_node("QkvAttention", ["qkv", "bias"], ["y"], domain="edgevlm", **attributes)
    graph = helper.make_graph(
        [node], "attention",
        [helper.make_tensor_value_info("qkv", TensorProto.FLOAT, [f"axis{i}" for i in range(axes)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(bias_E, "bias")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("edgevlm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(kernels.operators_library())
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (3, 70, 2, 40), (1, 300, 3, 64)])
def test_the_operator_is_the_kernel(shape):
    qkv_BSE, bias_E = numbers(*shape)
    loaded = session(bias_E, num_heads=shape[2])
    for _ in range(2):
        (found,) = loaded.run(None, {"qkv": qkv_BSE})
        assert np.array_equal(found, attend(qkv_BSE, bias_E, shape[2]))
    assert loaded.run(None, {"qkv": qkv_BSE[:0]})[0].shape == (0, shape[1], shape[2] * shape[3])


@pytest.mark.parametrize(
    ("shape", "heads", "words"),
    [((1, 5, 25), 2, "bias"), ((1, 5, 24), 3, "multiple of 3 heads"), ((5, 24), 2, "found 2 axes"),
     ((1, 1, 5, 24), 2, "found 4 axes"), ((1, 0, 24), 2, "tokens go from 1"), ((1, 5, 48), 2, "bias")],
)  # fmt: skip
def test_the_operator_refuses_sizes_that_make_no_sense(shape, heads, words):
    loaded = session(np.zeros(24, F32), axes=len(shape), num_heads=heads)
    with pytest.raises(Exception, match=words):
        loaded.run(None, {"qkv": np.zeros(shape, F32)})


def test_the_operator_needs_to_know_its_heads():
    with pytest.raises(Exception, match="num_heads"):
        session(np.zeros(24, F32))
    with pytest.raises(Exception, match="num_heads must be at least 1"):
        session(np.zeros(24, F32), num_heads=-1)


# ---- the encoder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "out"
    return out, convert(tiny.shared(Variant())[0], out, decoder_quant="f16", fidelity_tokens=0)


def kinds(out):
    return [node.op_type for node in onnx.load(out / "encoder.onnx", load_external_data=False).graph.node]


def test_int8_encoders_attend_in_integers(bundle):
    found = kinds(bundle[0])
    assert found.count("QkvAttention") == 3
    assert not {"MultiHeadAttention", "Split"} & set(found)


def test_an_attention_that_loses_too_much_stays_in_float32(tmp_path, bundle):
    """Keys with one channel that is ten thousand times larger than the others have no precision left for those."""
    folder = tiny.copy(Variant(), tmp_path / "model")

    def stretch(tensors):
        for name, tensor in tensors.items():
            for part, factor in (("q_proj", 1e-4), ("k_proj", 1e4)):
                if f"layers.1.self_attn.{part}" in name and "vision" in name:
                    tensor[3] *= factor
        return tensors

    tiny.rewrite_tensors(folder, stretch)
    found = convert(folder, tmp_path / "out", decoder_quant="f16", fidelity_tokens=0).fidelity["encoder"]
    assert found["in_float32"] == ["tower.blk.1.attention"]
    assert kinds(tmp_path / "out").count("QkvAttention") == 2
    assert kinds(tmp_path / "out").count("MultiHeadAttention") == 1
    assert bundle[1].fidelity["encoder"]["in_float32"] == []


def test_the_choice_is_by_what_was_lost():
    def run(lost):
        return {"a.attention.difference": np.float32(lost**2), "a.attention.reference": np.float32(1), "a.rows": None}

    within, beyond = (choose_attentions([run(e), run(e)])["a.attention"] for e in (0.9 * TOLERABLE, 1.1 * TOLERABLE))
    assert (within.treatment.exact, beyond.treatment.exact) == (False, True)
    assert within.error == pytest.approx(0.9 * TOLERABLE, rel=1e-5)
    assert choose_attentions([run(np.nan)])["a.attention"].treatment.exact


def test_a_library_without_operators_is_an_error_of_ours(bundle, monkeypatch):
    out, manifest = bundle
    monkeypatch.setattr(_kernels, "__file__", np._core._multiarray_umath.__file__)
    with pytest.raises(DependencyError, match="cannot load the operators of"):
        Encoder(out / "encoder.onnx", manifest.spec.encoder)


def test_a_target_that_cannot_run_is_an_error_of_ours(bundle, monkeypatch):
    out, manifest = bundle
    monkeypatch.setenv("EDGEVLM_KERNELS", "no-such-target")
    with pytest.raises((KernelError, BackendError), match="no-such-target"):
        Encoder(out / "encoder.onnx", manifest.spec.encoder)

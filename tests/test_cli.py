"""The command line as a person or a script meets it: what goes where, and that bad input gets one clear line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from pictures import smooth
from PIL import Image

from edgevlm import __version__, kernels
from edgevlm.bundle import BUILTIN
from edgevlm.cli import main
from panel.scenes import make_scene

EDGEVLM = Path(sysconfig.get_path("scripts")) / "edgevlm"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


Runner = Callable[..., Run]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    def run(*arguments: str | Path, stdin: bytes = b"") -> Run:
        monkeypatch.setattr(sys, "argv", ["edgevlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture
def panel(tmp_path: Path) -> Path:
    path = tmp_path / "panel.jpg"
    path.write_bytes(make_scene(700_000_001, "clean").jpeg)
    return path


QUESTION = "What does the display read?"
ANSWER = make_scene(700_000_001, "clean").truth.display


# ---- what works


def test_ask_answers_on_stdout_and_nothing_else(run: Runner, panel: Path) -> None:
    assert run("ask", QUESTION, "-i", panel) == Run(0, f"{ANSWER}\n", "")


def test_ask_reads_picture_or_prompt_from_stdin(run: Runner, panel: Path) -> None:
    assert run("ask", QUESTION, "-i", "-", stdin=panel.read_bytes()).out == f"{ANSWER}\n"
    assert run("ask", "-", "-i", panel, stdin=QUESTION.encode()).out == f"{ANSWER}\n"
    both = run("ask", "-", "-i", "-")
    assert (both.code, both.out) == (2, "")


def test_ask_json_is_the_documented_object_and_the_last_line(run: Runner, panel: Path) -> None:
    result = run("ask", QUESTION, "-i", panel, "--json")
    document = json.loads(result.out)
    assert document["text"] == ANSWER
    assert document["finish_reason"] == "stop"
    assert set(document) == {"text", "finish_reason", "model", "usage", "timings", "memory"}
    assert set(document["usage"]) == {
        "prompt_tokens",
        "image_tokens",
        "completion_tokens",
        "cached_tokens",
        "forced_tokens",
    }
    assert document["usage"]["image_tokens"] == 64
    assert set(document["timings"]) == {
        "load_s", "decode_image_s", "preprocess_s", "encode_s", "prefill_s", "first_token_s", "generate_s",
        "tokens_per_s",
    }  # fmt: skip
    assert all(seconds > 0 for seconds in document["timings"].values())
    assert document["memory"]["peak_rss_bytes"] > 10e6


@pytest.mark.parametrize(("budget", "image_tokens"), [("full", 64), ("16", 16), ("1000", 64)])
def test_pictures_take_no_more_than_their_budget(run: Runner, panel: Path, budget: str, image_tokens: int) -> None:
    document = json.loads(run("ask", QUESTION, "-i", panel, "--image-tokens", budget, "--json").out)
    assert document["text"] == ANSWER
    assert document["usage"]["image_tokens"] == image_tokens


def test_max_tokens_and_stop(run: Runner, panel: Path) -> None:
    cut = json.loads(run("ask", "Describe the panel.", "-i", panel, "--max-tokens", "2", "--json").out)
    assert (cut["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 2)
    whole = run("ask", "Describe the panel.", "-i", panel).out
    word = whole.split()[3]
    assert (
        run("ask", "Describe the panel.", "-i", panel, "--stop", word).out.strip() == whole[: whole.index(word)].strip()
    )


def test_a_schema_makes_the_answer_json(run: Runner, panel: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"lamp": {"enum": ["on", "off"]}}, "required": ["lamp"]}')
    asked = ("ask", QUESTION, "-i", panel, "--schema", schema, "--lookup", "3")
    assert json.loads(run(*asked).out)["lamp"] in ("on", "off")
    document = json.loads(run(*asked, "--json").out)
    assert document["data"] == json.loads(document["text"])
    assert document["usage"]["forced_tokens"] > 0
    cut = run(*asked, "--max-tokens", "1")
    assert "cut" in cut.err
    for text, words in (('{"pattern": "a+"}', "pattern"), ("{", "JSON"), ("\xff", "UTF-8")):
        schema.write_bytes(text.encode("latin-1"))
        refused = run(*asked)
        assert (refused.code, refused.out) == (2, "")
        assert words in refused.err


def test_a_picture_of_one_pixel_is_a_picture(run: Runner, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert run("ask", "Describe the panel.", "-i", tmp_path / "dot.png").code == 0


def test_text_without_a_picture(run: Runner) -> None:
    result = run("ask", QUESTION)
    assert (result.code, result.err) == (0, "")


def test_version_and_help(run: Runner) -> None:
    assert run("--version").out == f"edgevlm {__version__}\n"
    for command in ((), ("ask",), ("convert",), ("bench",), ("models",), ("models", "show")):
        shown = run(*command, "--help")
        assert shown.code == 0
        assert "Example" in shown.out
        assert all(len(line) <= 80 for line in shown.out.splitlines())


def test_the_installed_program_streams_and_survives_a_closed_pipe(panel: Path) -> None:
    result = subprocess.run([EDGEVLM, "ask", QUESTION, "-i", panel], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{ANSWER}\n", "")
    shell = f'"{EDGEVLM}" ask "Describe the panel." -i "{panel}" | head -c 1'
    closed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert len(closed.stdout) == 1
    assert "Traceback" not in closed.stderr


def test_help_imports_nothing_heavy() -> None:
    """`edgevlm --help` has to be quick: no numpy, no Pillow, no native library."""
    code = (
        "import sys; sys.argv = ['edgevlm', '--help']\n"
        "from edgevlm.cli import main\n"
        "try:\n main()\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'PIL', 'onnxruntime', 'llama_cpp', 'jinja2', 'gguf', 'onnx_ir'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


STEPS = {
    "resize": {"memory copy", "Pillow", *(f"edgevlm {target}" for target in kernels.targets())},
    "tensor": {"edgevlm", "edgevlm, resize alone", "Pillow, numpy"},
    "jpeg": {"edgevlm", "Pillow, decode alone", "Pillow, numpy"},
}


def test_bench_prints_a_card_a_table_and_json(run: Runner, tmp_path: Path) -> None:
    """Times are only asked to be positive; the pixels that are compared on the way must be equal."""
    Image.fromarray(smooth()).save(tmp_path / "photo.png")
    result = run("bench", "--preprocess", "-i", tmp_path / "photo.png", "--rounds", "2")
    assert (result.code, result.err) == (0, "")
    *table, last = result.out.splitlines()
    assert table[0].startswith(f"edgevlm {__version__}, cpu ")
    document = json.loads(last)
    assert set(document) == {"card", "rounds", "busy", "cases"}
    assert {"cpu", "target", "targets", "compiler", "numpy", "pillow"} <= set(document["card"])
    assert [(case["step"], case["resample"]) for case in document["cases"]] == [
        ("resize", "bicubic"), ("resize", "lanczos"), ("resize", "bilinear"), ("tensor", "bicubic"), ("jpeg", "bicubic")
    ]  # fmt: skip
    for case in document["cases"]:
        assert any(f"**{case['name']}**" in line for line in table)
        assert set(case["rows"]) == STEPS[case["step"]]
        for name, row in case["rows"].items():
            assert row["mpx_per_s"] > 0
            assert row["cpu_s"]["median"] >= row["cpu_s"]["best"] > 0
            assert row["wall_s"]["median"] >= row["wall_s"]["best"] > 0
            assert row["difference"] == (0 if case["step"] == "resize" and name != "memory copy" else None)
    only = run(
        "bench", "--preprocess", "-i", "-", "--rounds", "1", "--json", stdin=(tmp_path / "photo.png").read_bytes()
    )
    assert set(json.loads(only.out)) == set(document)


# ---- what is refused, with one line and the right exit code


def refused(result: Run, code: str, exit_code: int = 1, *words: str) -> None:
    assert result.out == ""
    assert result.code == exit_code, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("edgevlm: ")
    assert lines[0].endswith(f"[{code}]")
    for word in words:
        assert word in lines[0]


def bad_pictures(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    jpeg = make_scene(700_000_002).jpeg
    written = {"empty.jpg": b"", "text.jpg": b"this is not a picture at all", "cut.jpg": jpeg[: len(jpeg) // 2]}
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "animation.gif")
    return {
        "absent.jpg": (tmp_path / "absent.jpg", "file.not_found"),
        "folder": (tmp_path, "file.not_regular"),
        "empty.jpg": (tmp_path / "empty.jpg", "image.undecodable"),
        "text.jpg": (tmp_path / "text.jpg", "image.undecodable"),
        "cut.jpg": (tmp_path / "cut.jpg", "image.truncated"),
        "huge.png": (tmp_path / "huge.png", "image.too_many_pixels"),
        "animation.gif": (tmp_path / "animation.gif", "image.format"),
    }


def test_pictures_that_cannot_be_used(run: Runner, tmp_path: Path) -> None:
    pictures = bad_pictures(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for name, (path, code) in pictures.items():
        refused(run("ask", QUESTION, "-i", path), code, 1, name if name != "folder" else tmp_path.name)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_picture_for_a_text_model(run: Runner, panel: Path, smollm2: Path) -> None:
    refused(run("ask", "What is this?", "-i", panel, "-m", smollm2), "capability.no_vision")
    refused(run("ask", "Why?", "-m", smollm2, "--image-tokens", "16"), "capability.no_vision")


def test_a_prompt_longer_than_the_context(run: Runner, panel: Path) -> None:
    refused(run("ask", "word " * 500, "-i", panel, "--context", "256"), "context.too_small", 1, "256", "64 of them")


def test_models_that_are_not_there_or_damaged(run: Runner, panel: Path, tmp_path: Path) -> None:
    refused(run("ask", QUESTION, "-m", tmp_path / "absent"), "file.not_found")
    refused(run("ask", QUESTION, "-m", tmp_path), "file.not_found", 1, "bundle.json")
    refused(run("ask", QUESTION, "-m", panel), "gguf.invalid")
    for name in ("decoder.gguf", "encoder.onnx", "encoder.onnx.data"):
        bundle = tmp_path / f"flipped-{name}"
        shutil.copytree(BUILTIN, bundle)
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 4
        (bundle / name).write_bytes(data)
        refused(run("ask", QUESTION, "-i", panel, "-m", bundle), "bundle.hash_mismatch", 1, name)


def test_streams_that_cannot_be_used(panel: Path) -> None:
    """Real shells: a full disk behind stdout, closed streams, a picture without end."""
    ask = f'"{EDGEVLM}" ask "{QUESTION}" -i'
    for shell, code in (
        (f'{ask} "{panel}" > /dev/full', "storage.full"),
        (f'{ask} "{panel}" >&-', "usage.invalid"),
        (f"{ask} - <&-", "usage.invalid"),
        (f"{ask} - < /dev/zero", "usage.invalid"),
        (f'{ask} "{panel}" -m {"x" * 300}', "file.not_found"),
        (f'{ask} "{panel}" -m ""', "file.not_found"),
    ):
        result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
        assert result.returncode in (1, 2), shell
        assert result.stderr.count("\n") == 1, result.stderr
        assert f"[{code}]" in result.stderr, shell


def test_bench_measures_preprocessing_only(run: Runner, tmp_path: Path) -> None:
    refused(run("bench"), "usage.invalid", 2, "--preprocess")
    refused(run("bench", "--preprocess", "-i", tmp_path / "absent.jpg"), "file.not_found")
    assert run("bench", "--preprocess", "--rounds", "0").code == 2


def test_arguments_outside_their_range(run: Runner, panel: Path) -> None:
    for option, value in (("--max-tokens", "0"), ("--temperature", "-1"), ("--top-p", "2"), ("--threads", "0")):
        refused(run("ask", QUESTION, "-i", panel, option, value), "usage.invalid", 2)
    for budget in ("0", "-1", "nan", "abc", "", "9" * 40, "16:pool"):
        refused(run("ask", QUESTION, "-i", panel, "--image-tokens", budget), "usage.invalid", 2, "image_tokens", "full")
    for wrong in (("ask",), ("ask", QUESTION, "--max-tokens", "many"), ("nonsense",), ("ask", QUESTION, "--nonsense")):
        result = run(*wrong)
        assert (result.code, result.out) == (2, "")
        assert "Error" in result.err


CHECKPOINT = Path(__file__).parent.parent / "panel" / "checkpoint"


def edited_checkpoint(tmp_path: Path, change: Callable[..., object]) -> Path:
    """A copy of the panel checkpoint whose tensors or config were changed."""
    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, copy)
    tensors = load_file(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    change(tensors, config, torch)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


CHECKPOINTS = {
    "checkpoint.missing_tensor": lambda t, c, torch: t.pop(sorted(t)[3]),
    "checkpoint.unexpected_tensor": lambda t, c, torch: t.update({"extra.weight": torch.zeros(4)}),
    "checkpoint.unsupported": lambda t, c, torch: c.update(architectures=["NobodysModel"], model_type="nobodys"),
    "checkpoint.shape": lambda t, c, torch: t.update(
        {k: v[:-32] for k, v in t.items() if k.endswith("0.mlp.up_proj.weight")}
    ),
}


@pytest.mark.parametrize("code", CHECKPOINTS)
def test_checkpoints_that_cannot_be_converted(run: Runner, tmp_path: Path, code: str) -> None:
    checkpoint = edited_checkpoint(tmp_path, CHECKPOINTS[code])
    refused(run("convert", checkpoint, tmp_path / "out"), code)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_convert_makes_a_bundle_that_answers(run: Runner, tmp_path: Path, panel: Path) -> None:
    out = tmp_path / "bundle"
    result = run("convert", CHECKPOINT, out, "--decoder-quant", "f16", "--encoder-quant", "fp32")
    assert (result.code, result.out) == (0, "")
    said = {line[:14].strip(): line[15:] for line in reversed(result.err.splitlines())}
    assert said.keys() == {"size", "quantization", "fidelity", "took", ""}
    assert re.fullmatch(r"\d+\.\d s, at most [\d.]+ [MG]B of memory, mapped files included", said["took"])
    assert "KL divergence" in result.err
    assert run("ask", QUESTION, "-i", panel, "-m", out).out == f"{ANSWER}\n"
    assert run("convert", CHECKPOINT, panel).code == 1
    refused(run("convert", CHECKPOINT, tmp_path / "other", "--decoder-quant", "q99"), "usage.invalid", 2, "q4_k_m")


def test_an_importance_matrix_that_cannot_be_used(run: Runner, tmp_path: Path) -> None:
    wrong = tmp_path / "decoder.gguf"
    shutil.copy(BUILTIN / "decoder.gguf", wrong)
    out = tmp_path / "out"
    refused(run("convert", CHECKPOINT, out, "--imatrix", tmp_path / "absent"), "file.not_found", 1, "absent")
    refused(run("convert", CHECKPOINT, out, "--imatrix", wrong), "imatrix.invalid", 1, "llama-imatrix")
    refused(
        run("convert", CHECKPOINT, out, "--imatrix", wrong, "--decoder-quant", "f16"), "usage.invalid", 2, "only rounds"
    )
    assert os.listdir(tmp_path) == ["decoder.gguf"]


def test_types_of_single_matrices(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, word in (
        (["attn_q"], "PATTERN=TYPE"),
        (["attn=q8_0", "attn=q6_k"], "twice"),
        (["attn_q=q9"], "q8_0"),
        (["x=q8_0"], "ffn_down"),
    ):
        arguments = [part for option in options for part in ("--decoder-type", option)]
        refused(run("convert", CHECKPOINT, out, *arguments), "usage.invalid", 2, word)
    assert os.listdir(tmp_path) == []
    result = run("convert", CHECKPOINT, out, "--decoder-type", "attn_v=q6_k", "--decoder-type", "attn=q8_0")
    assert (result.code, result.out) == (0, "")
    arguments = json.loads((out / "bundle.json").read_text())["provenance"]["arguments"]
    assert arguments["decoder_types"] == {"attn_v": "q6_k", "attn": "q8_0"}


def test_auto_chooses_a_type_and_says_why(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", CHECKPOINT, out, "--decoder-quant", "auto", "--device", "pi5").code == 0
    arguments = json.loads((out / "bundle.json").read_text())["provenance"]["arguments"]
    assert arguments["decoder_quant"] == "q4_k_m"
    assert arguments["decoder_quant_auto"]["device"] == "pi5"
    assert "Raspberry Pi 5" in arguments["decoder_quant_auto"]["reason"]
    refused(run("convert", CHECKPOINT, out, "--device", "pi3"), "usage.invalid", 2, "pi4, pi5")
    refused(run("convert", CHECKPOINT, out, "--device", "pi4"), "usage.invalid", 2, "q4_k_m", "auto")


def test_a_conversion_that_loses_too_much(run: Runner, tmp_path: Path) -> None:
    options = ("--decoder-type", ".=q2_k", "--fidelity-tokens", "300", "--encoder-quant", "fp32")
    refused(run("convert", CHECKPOINT, tmp_path / "out", *options), "fidelity.exceeded", 1, "KL divergence", "q5_k_m")
    assert os.listdir(tmp_path) == []
    assert run("convert", CHECKPOINT, tmp_path / "out", *options, "--force").code == 0
    assert "beyond a limit, and forced" in run("models", "show", tmp_path / "out").out


# ---- models show


def test_models_show_says_what_a_bundle_is(run: Runner) -> None:
    shown = run("models", "show", BUILTIN)
    assert (shown.code, shown.err) == (0, "")
    assert run("models", "show") == shown
    manifest = json.loads((BUILTIN / "bundle.json").read_text())
    words = ["panel-reader", "llava", "decoder.gguf", "3.51 MB", "encoder.onnx.data", "64 tokens each", "128 x 128"]
    words += ["q8_0", "29 Q8_0", "int8", "KL divergence", "cosine", "licence", "source", "4,096 positions"]
    for word in words:
        assert word in shown.out, word
    document = json.loads(run("models", "show", BUILTIN, "--json").out)
    assert document.pop("kind") == "bundle"
    assert document == {key: manifest[key] for key in ("spec", "files", "provenance", "fidelity")}


def test_models_show_shows_the_header_of_a_gguf_file(run: Runner, smollm2: Path) -> None:
    shown = run("models", "show", smollm2)
    assert (shown.code, shown.err) == (0, "")
    for word in ("30 layers of 576", "49,152 tokens", "Q4_1", "template       yes", "134,515,008 weights"):
        assert word in shown.out, word
    document = json.loads(run("models", "show", smollm2, "--json").out)
    assert document["kind"] == "gguf"
    assert document["size"] == smollm2.stat().st_size
    assert document["metadata"]["llama.block_count"] == 30
    assert "tokenizer.chat_template" not in document["metadata"]


def test_models_show_of_what_is_no_model(run: Runner, tmp_path: Path, panel: Path) -> None:
    refused(run("models", "show", tmp_path / "absent"), "file.not_found", 1, "absent")
    refused(run("models", "show", tmp_path), "file.not_found", 1, "bundle.json")
    refused(run("models", "show", panel), "gguf.invalid")
    shutil.copytree(BUILTIN, tmp_path / "odd")
    manifest = json.loads((BUILTIN / "bundle.json").read_text())
    manifest["spec"]["name"] = "red \x1b[31m\x07"  # would colour a terminal and ring its bell
    for odd in ([], {"decoder": [1], "encoder": 5, "exceeded_limits": [7]}, {"decoder": {"types": {"Q8_0": 3}}}):
        manifest["fidelity"] = odd if odd else {}
        manifest["provenance"] = {"arguments": [], "model_card": "x", "tools": None, "imatrix": 4}
        (tmp_path / "odd" / "bundle.json").write_text(json.dumps(manifest))
        shown = run("models", "show", tmp_path / "odd")
        assert shown.code == 0
        assert "red ?[31m?" in shown.out

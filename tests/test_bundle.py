"""bundle.json as the commit record: everything that differs from it is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgevlm import spec as specs
from edgevlm.bundle import BUILTIN, MANIFEST_NAME, open_bundle
from edgevlm.errors import BundleError, EdgeVLMError, FileError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(BUILTIN, copy)
    return copy


def edit(bundle: Path, change: Any) -> None:
    path = bundle / MANIFEST_NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.spec.family == "llava"
    assert opened.path("decoder").is_file()


def test_every_file_is_guarded_against_a_flipped_bit(bundle: Path) -> None:
    for entry in open_bundle(bundle).manifest.files:
        path = bundle / entry.name
        original = path.read_bytes()
        for at in (0, len(original) // 2, len(original) - 1):
            damaged = bytearray(original)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(BundleError) as caught:
                open_bundle(bundle)
            assert caught.value.code == "bundle.hash_mismatch"
        path.write_bytes(original)
    open_bundle(bundle)


def test_missing_and_cut_files(bundle: Path) -> None:
    decoder = open_bundle(bundle).path("decoder")
    decoder.write_bytes(decoder.read_bytes()[:-1])
    with pytest.raises(BundleError, match="bytes instead of"):
        open_bundle(bundle)
    decoder.unlink()
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert caught.value.code == "bundle.missing_file"


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not a bundle"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ("", "bundle.invalid"),
        ("[]", "bundle.invalid"),
        ("{", "bundle.invalid"),
        ("[" * 100_000, "bundle.invalid"),
        ('{"format": 99}', "bundle.version"),
        ('{"format": "1"}', "bundle.invalid"),
        ('{"format": 1}', "bundle.invalid"),
    ],
)
def test_documents_that_are_not_manifests(bundle: Path, raw: str, code: str) -> None:
    (bundle / MANIFEST_NAME).write_text(raw)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert caught.value.code == code


BAD_NAMES = [
    "../decoder.gguf",
    "/etc/passwd",
    "a/b",
    ".",
    "..",
    "",
    "a\0b",
    "x" * 300,
    MANIFEST_NAME,
    "ä.gguf",
    ".hidden",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder(bundle: Path, name: str) -> None:
    edit(bundle, lambda d: d["files"][0].update(name=name))
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert caught.value.code == "bundle.invalid"


def test_data_that_the_graph_would_not_read(bundle: Path) -> None:
    """The graph names its data file itself: listing a sound copy under another name must not hide a damaged one."""
    shutil.copy(bundle / "encoder.onnx.data", bundle / "copy")
    edit(bundle, lambda d: next(f for f in d["files"] if f["role"] == "encoder-data").update(name="copy"))
    with pytest.raises(BundleError, match=r"encoder\.onnx\.data"):
        open_bundle(bundle)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    os.mkfifo(bundle / MANIFEST_NAME)
    with pytest.raises(FileError) as caught:
        open_bundle(bundle)
    assert caught.value.code == "file.not_regular"


CHANGES = {
    "unknown field": lambda d: d.update(url="x"),
    "unknown field deep inside": lambda d: d["spec"]["image"].update(gamma=2.2),
    "missing field": lambda d: d["spec"]["encoder"].pop("n_tokens"),
    "wrong type": lambda d: d["spec"]["encoder"].update(n_tokens="64"),
    "boolean for a number": lambda d: d["spec"]["encoder"].update(n_tokens=True),
    "negative size of the output": lambda d: d["spec"]["encoder"].update(n_tokens=-1),
    "a picture without height": lambda d: d["spec"]["image"].update(height_px=0),
    "a picture of 2^20 rows": lambda d: d["spec"]["image"].update(height_px=1 << 20),
    "a colour above 255": lambda d: d["spec"]["image"].update(pad_rgb=[0, 0, 999]),
    "no deviation": lambda d: d["spec"]["image"].update(std=[0.5, 0.0, 0.5]),
    "infinite number": lambda d: d["spec"]["image"].update(rescale=float("inf")),
    "unknown policy": lambda d: d["spec"]["image"].update(policy="magic"),
    "short tuple": lambda d: d["spec"]["image"].update(mean=[0.5, 0.5]),
    "sha256 of 63 digits": lambda d: d["files"][0].update(sha256="0" * 63),
    "negative size": lambda d: d["files"][0].update(size=-1),
    "unknown role": lambda d: d["files"][0].update(role="virus"),
    "no encoder": lambda d: d.update(files=[f for f in d["files"] if f["role"] != "encoder"]),
    "a file twice": lambda d: d["files"].append(d["files"][0]),
}


def _text_only(document: Any) -> None:
    """A sound description of a model that knows text only, for the mutations below."""
    document["spec"] |= {"image": None, "encoder": None, "prompt": {"image_token": None}}
    document["files"] = [file for file in document["files"] if file["role"] == "decoder"]


def test_a_bundle_without_an_encoder_opens(bundle: Path) -> None:
    edit(bundle, _text_only)
    assert open_bundle(bundle).spec.encoder is None


HALF_BLIND = {
    "files of an encoder that nothing describes": lambda d: d["files"].extend(_encoder_files(d)),
    "the graph alone": lambda d: d["files"].append(_encoder_files(d)[0]),
    "a picture's size": lambda d: d["spec"].update(image=d["old"]["spec"]["image"]),
    "an encoder without files": lambda d: d.update(spec=d["old"]["spec"]),
    "an encoder without a picture's size": lambda d: d["spec"].update(encoder=d["old"]["spec"]["encoder"]),
    "an image token": lambda d: d["spec"].update(prompt=d["old"]["spec"]["prompt"]),
}


def _encoder_files(document: Any) -> Any:
    return [file for file in document["old"]["files"] if file["role"] != "decoder"]


@pytest.mark.parametrize("change", HALF_BLIND)
def test_an_encoder_is_described_and_there_or_neither(bundle: Path, change: str) -> None:
    def damage(document: Any) -> None:
        document["old"] = json.loads(json.dumps(document))
        _text_only(document)
        HALF_BLIND[change](document)
        del document["old"]

    edit(bundle, damage)
    with pytest.raises(BundleError, match=r"together|describes none|no file has the role") as caught:
        open_bundle(bundle)
    assert caught.value.code == "bundle.invalid"


@pytest.mark.parametrize("change", CHANGES)
def test_manifests_that_say_something_else(bundle: Path, change: str) -> None:
    edit(bundle, CHANGES[change])
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert caught.value.code == "bundle.invalid"


def test_every_cut_of_the_manifest_is_refused(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(EdgeVLMError):
            open_bundle(bundle)


def test_rare_fields_are_written_only_where_they_say_something() -> None:
    """So that a new one changes no bundle that does not need it, and every spec is read back as it was."""
    spec = open_bundle(BUILTIN).spec
    written = json.loads(json.dumps(specs.to_json(spec)))
    assert written == json.loads((BUILTIN / MANIFEST_NAME).read_text())["spec"]
    assert spec.image is not None
    image = dataclasses.replace(spec.image, multiple_px=14)
    written = json.loads(json.dumps(specs.to_json(image)))
    assert set(written) - set(specs.to_json(spec.image)) == {"multiple_px"}
    assert specs.from_json(specs.ImageSpec, written) == image != spec.image

"""What a model is, for people and programs: a bundle's manifest, or the header of a plain GGUF file.

Nothing is loaded and no weight is read, so it answers at once for a model of any size; whether the files are whole is
checked when the model is loaded.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm import spec as specs
from edgevlm.bundle import BUILTIN, Manifest, read_manifest
from edgevlm.gguf import read_header

# enum ggml_type, for the types that `edgevlm.gguf` accepts
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_WIDTH = 14  # of the first column
#: The values of a section of `fidelity` that a person wants to see, and how they are worded.
_FIGURES = {
    "relative_error": "error {:.2%}",
    "kl_mean": "KL divergence {:.2g}",
    "kl_p99": "{:.2g} at the 99th percentile",
    "top1_agreement": "same first choice {:.1%}",
    "cosine_mean": "cosine {:.5f}",
    "cosine_min": "{:.5f} at worst",
}

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Description:
    """What is known of a model: `document` for programs, `rows` (name, value) for people."""

    document: dict[str, Any]
    rows: Rows

    def text(self) -> str:
        """The rows in two columns."""
        return table(self.rows)


def table(rows: Rows) -> str:
    """Rows in two columns; a name is not repeated, and no text of a file reaches a terminal's control characters."""
    lines, last = [], ""
    for name, text in rows:
        value = "".join(letter if letter.isprintable() else "?" for letter in text)
        lines.append(f"{'' if name == last else name:<{_WIDTH}} {value}".rstrip())
        last = name or last
    return "\n".join(lines)


def conversion(manifest: Manifest, *, seconds: float, peak_bytes: int) -> str:
    """What a conversion made, what it cost the model, and what it took; time and memory are in no bundle, because
    converting twice gives the same bytes."""
    took = f"{seconds:.1f} s, at most {size(peak_bytes)} of memory, mapped files included"
    rows = _size_rows(manifest) + quantization_rows(manifest) + fidelity_rows(manifest.fidelity)
    return table([*rows, ("took", took)])


def describe(model: str | os.PathLike[str] | None) -> Description:
    """Describe a bundle folder or a GGUF file; None is the built-in model.

    Raises:
        FileError: there is no such model.
        BundleError, GGUFError: it cannot be understood.
    """
    path = BUILTIN if model is None else Path(model)
    return _describe_bundle(path) if path.is_dir() else _describe_gguf(path)


def _describe_bundle(folder: Path) -> Description:
    manifest = read_manifest(folder)
    document = {
        "kind": "bundle",
        "spec": specs.to_json(manifest.spec),
        "files": [specs.to_json(entry) for entry in manifest.files],
        "provenance": manifest.provenance,
        "fidelity": manifest.fidelity,
    }
    spec, encoder, image = manifest.spec, manifest.spec.encoder, manifest.spec.image
    rows = [("name", spec.name), ("family", spec.family)]
    rows += _size_rows(manifest)
    rows += [("decoder", f"{spec.decoder.layers} layers of {spec.decoder.n_embd}, {spec.decoder.vocab:,} tokens")]
    rows += [("context", f"{spec.decoder.context_length:,} positions")]
    if encoder and image:
        rows += [("encoder", f"{encoder.tower}, {encoder.layers} layers of {encoder.hidden}")]
        rows += [("picture", f"{image.width_px} x {image.height_px} pixels, {encoder.n_tokens} tokens each")]
    rows += quantization_rows(manifest) + fidelity_rows(manifest.fidelity) + _provenance_rows(manifest.provenance)
    return Description(document, rows)


def _size_rows(manifest: Manifest) -> Rows:
    rows = [("size", f"{size(entry.size):>9}  {entry.name}") for entry in manifest.files]
    return [*rows, ("size", f"{size(sum(entry.size for entry in manifest.files)):>9}  together")]


def quantization_rows(manifest: Manifest) -> Rows:
    """The types of the weights, as asked for and as stored."""
    arguments = _object(manifest.provenance.get("arguments"))
    types = _object(_object(manifest.fidelity.get("decoder")).get("types"))
    stored = ", ".join(f"{_object(entry).get('tensors')} {kind}" for kind, entry in types.items())
    rows = [("quantization", f"decoder {arguments.get('decoder_quant', 'unknown')}{f' ({stored})' if stored else ''}")]
    if manifest.spec.encoder:
        rows.append(("quantization", f"encoder {arguments.get('encoder_quant', 'unknown')}"))
    reason = _object(arguments.get("decoder_quant_auto")).get("reason")
    return rows + ([("quantization", f"chosen because {reason}")] if reason else [])


def fidelity_rows(fidelity: dict[str, Any]) -> Rows:
    """What the conversion cost, one line for each comparison; figures that are absent are left out."""
    decoder = _object(fidelity.get("decoder"))
    rows = [("fidelity", f"decoder's weights: {decoder['kept']}")] if isinstance(decoder.get("kept"), str) else []
    sections = {
        "decoder's weights": decoder,
        "decoder's predictions": decoder.get("predictions"),
        "encoder's embeddings": fidelity.get("encoder"),
    }
    for name, section in sections.items():
        figures = [
            words.format(value)
            for key, words in _FIGURES.items()
            if isinstance(value := _object(section).get(key), (int, float))
        ]
        if figures:
            rows.append(("fidelity", f"{name}: {', '.join(figures)}"))
    beyond = fidelity.get("exceeded_limits", [])
    forced = [("fidelity", f"beyond a limit, and forced: {text}") for text in beyond if isinstance(text, str)]
    return rows + forced


def _provenance_rows(provenance: dict[str, Any]) -> Rows:
    card, tools = _object(provenance.get("model_card")), _object(provenance.get("tools"))
    origin = _object(provenance.get("origin"))
    claimed = " (the checkpoint's own claim)" if origin and "license" in card else ""
    rows = [("licence", str(card.get("license", "not stated by the checkpoint")) + claimed)]
    rows += [("based on", str(card["base_model"]))] if "base_model" in card else []
    rows += [("model", f"{origin.get('model')} ({origin.get('repository')})")] if origin else []
    rows += [("model", str(origin["notice"]))] if "notice" in origin else []
    rows += [("source", str(provenance.get("source", "unknown")))]
    imatrix = _object(provenance.get("imatrix"))
    if "name" in imatrix:
        rows.append(("imatrix", f"{imatrix['name']} (sha256 {str(imatrix.get('sha256'))[:12]}...)"))
    return [*rows, ("converted by", f"edgevlm {tools.get('edgevlm', 'unknown')}")]


def _describe_gguf(path: Path) -> Description:
    header = read_header(path)
    nbytes = path.stat().st_size
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors)
    types = {_TYPE_NAMES[kind]: count for kind, count in Counter(t.type_id for t in header.tensors).most_common()}
    metadata = {key: value for key, value in header.metadata.items() if isinstance(value, (str, int, float, bool))}
    # A template is a page of text; whether there is one is what can be said here.
    template = metadata.pop("tokenizer.chat_template", None)
    document = {
        "kind": "gguf",
        "size": nbytes,
        "weights": weights,
        "tensors": types,
        "chat_template": template is not None,
        "metadata": metadata,
    }
    known = header.metadata
    rows = [
        ("name", str(known.get("general.name", path.name))),
        ("family", f"{known['general.architecture']}, text only"),
        ("size", f"{size(nbytes)} for {weights:,} weights"),
        ("decoder", f"{known['llama.block_count']} layers of {known['llama.embedding_length']}, "
                    f"{len(known['tokenizer.ggml.tokens']):,} tokens"),
        ("context", f"{header.context_length:,} positions"),
        ("quantization", ", ".join(f"{count} {kind}" for kind, count in types.items())),
        ("template", "yes" if template is not None else "none"),
        ("licence", str(known.get("general.license", "not stated by the file"))),
    ]  # fmt: skip
    return Description(document, rows)


def size(nbytes: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def _object(value: Any) -> dict[str, Any]:
    """A section of the manifest, or nothing: what a bundle says of its making is shown, not relied on."""
    return value if isinstance(value, dict) else {}

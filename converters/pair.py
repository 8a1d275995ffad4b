"""A pair of llama.cpp's files as a source: the text model's GGUF, which is copied, and the mmproj (`mmproj.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from edgevlm.bundle import sha256_of
from edgevlm.converters import gguf_copy, gguf_file, mmproj
from edgevlm.converters.checkpoint import FileStatus, locate, status_of
from edgevlm.converters.gguf_file import StoredTensor
from edgevlm.converters.loadable import check_header, check_vocabulary, check_weights
from edgevlm.converters.mmproj import Projector
from edgevlm.converters.prepared import DecoderForecast, EncoderWeight, Fate, Prepared
from edgevlm.converters.progress import Progress
from edgevlm.converters.provenance import is_unicode, tool_versions
from edgevlm.converters.resolve import IMAGE_LITERAL, check_ranges
from edgevlm.converters.sections import invalid
from edgevlm.converters.tokenizer import choose_template
from edgevlm.converters.tokens import CONTROL, USER_DEFINED
from edgevlm.errors import CapabilityError, CheckpointError, UsageError
from edgevlm.families.schema import Family
from edgevlm.gguf import GGUFHeader, read_container, read_header
from edgevlm.messages import question
from edgevlm.prompt import ImageSlot, PromptFormat, TextPiece, render
from edgevlm.spec import DecoderSpec, ModelSpec, PromptSpec

AS_THE_SOURCE = "as the source"
_CARD = {"license": "license", "license_name": "license.name", "license_link": "license.link",
         "base_model": "base_model.0.repo_url"}  # fmt: skip


def find_pair(source: Path, mmproj_path: Path | None) -> tuple[Path, Path] | None:
    """The two files that `source` and `--mmproj` name, or None if the source is a checkpoint.

    A folder without config.json may hold exactly one text model and one mmproj.

    Raises:
        UsageError: one of the two is missing, or a folder leaves a choice.
        CheckpointError, GGUFError: a file of the folder cannot be used.
    """
    if source.is_dir():
        found = sorted(path.name for path in source.glob("*.gguf"))
        if mmproj_path is not None:
            raise UsageError(f"{source} is a folder; with --mmproj, name the text model's .gguf itself")
        if not found or (source / "config.json").exists():
            return None
        return _choose(source, [path for name in found if (path := locate(source, name))])
    if mmproj_path is not None:
        return source, mmproj_path
    if source.suffix.lower() == ".gguf":
        raise UsageError(
            f"{source} is a GGUF file; name its vision part with --mmproj, or ask it about text as it is, with -m"
        )
    return None


def _choose(folder: Path, files: list[Path]) -> tuple[Path, Path]:
    arch = {path: read_container(path, frozenset()).metadata.get("general.architecture") for path in files}
    projectors = [path for path in files if arch[path] == "clip"]
    texts = [path for path in files if arch[path] != "clip"]
    if len(texts) == len(projectors) == 1:
        return texts[0], projectors[0]
    raise UsageError(
        f"{folder} holds {len(texts)} text models and {len(projectors)} mmproj files; name one of each: "
        "`edgevlm convert TEXT.gguf OUT --mmproj MMPROJ.gguf`"
    )


def prepare(
    text: Path,
    projector: Path,
    *,
    name: str,
    source: str | None,
    template: str | None,
    known_families: tuple[Family, ...] | None,
) -> Prepared:
    """Read both files.

    Args:
        text: The text model.
        projector: The mmproj.
        name: What the model is called.
        source: Where it comes from, for the record; `name` by default.
        template: The name of one of the family's chat templates, instead of the file's own.
        known_families: Families to choose from; every one by default.

    Raises:
        FileError: a file does not exist or cannot be read.
        GGUFError: a file breaks the format, or the text model cannot be run.
        CheckpointError: the two are no pair that can be run.
        UsageError: there is no template of that name.
    """
    for path in (text, projector):
        if not is_unicode(path.name):
            raise UsageError(f"the name of {path.name!r} is no text, which no record can hold; rename the file")
    status = {path: status_of(path) for path in (text, projector)}
    header = _read_text(text)
    check_vocabulary(text, ())
    found = mmproj.read_mmproj(projector, n_embd=header.metadata["llama.embedding_length"],
                               known_families=known_families)  # fmt: skip
    prompt = PromptSpec(
        image_token=_image_token(header, found.family),
        tile_texts=found.family.vision.tile_texts if found.family.vision else None,
    )
    spec = ModelSpec(
        name=name,
        family=found.family.name,
        image=found.vision.image,
        encoder=found.vision.encoder,
        decoder=_decoder_spec(header),
        prompt=prompt,
    )
    check_ranges(spec)
    chosen = _template(header, found.family, template, prompt)
    notices = [*found.notes, *([f"the chat template is that of the family {found.family.name}"] if chosen else [])]
    return Prepared(
        spec=spec,
        vision=found.vision,
        tower={ours: _weight(tensor) for ours, tensor in found.tower.items()},
        connector={ours: _weight(tensor) for ours, tensor in found.connector.items()},
        decoder_type=AS_THE_SOURCE,
        reason="",
        decoder_bytes=gguf_copy.copied_bytes(header, chosen),
        foresee_decoder=partial(_foresee, header, chosen, found),
        write_decoder=partial(_write_decoder, header, chosen),
        compare_decoder=_compare_nothing,
        record=partial(_record, header, projector, found, source or name, chosen is not None),
        check_unchanged=partial(_check_unchanged, status),
        notices=tuple(notices),
    )


def _weight(tensor: StoredTensor) -> EncoderWeight:
    return EncoderWeight(
        name=tensor.name,
        shape=tensor.shape,
        type=tensor.type,
        nbytes=tensor.nbytes,
        read=partial(mmproj.values, tensor),
    )


def _foresee(header: GGUFHeader, template: str | None, found: Projector) -> DecoderForecast:
    fates = []
    for tensor in header.tensors:
        kind = gguf_file.type_name(tensor.type_id)
        fates.append(
            Fate(file="decoder.gguf", sources=(tensor.name,), shape=tensor.shape, source_type=kind, name=tensor.name,
                 type=kind)
        )  # fmt: skip
    fates += [Fate(file="", sources=(name,), shape=(), source_type="", name="", type="") for name in found.unused]
    nbytes = gguf_copy.copied_bytes(header, template)
    return DecoderForecast(nbytes=nbytes, memory_bytes=nbytes, fates=tuple(fates))  # llama.cpp maps all of the copy


def _read_text(path: Path) -> GGUFHeader:
    found = read_container(path, frozenset()).metadata
    if found.get("general.architecture") == "clip":
        raise CheckpointError(
            f"{path} is an mmproj file; give the text model first and the mmproj after --mmproj",
            code="checkpoint.unsupported",
        )
    return read_header(path)


def _decoder_spec(header: GGUFHeader) -> DecoderSpec:
    found = header.metadata
    return DecoderSpec(
        arch="llama",
        layers=found["llama.block_count"],
        n_embd=found["llama.embedding_length"],
        vocab=len(found["tokenizer.ggml.tokens"]),
        context_length=header.context_length,
    )


def _image_token(header: GGUFHeader, family: Family) -> str:
    """What templates print where a picture goes; a family whose pictures stand between tokens must have those."""
    around = family.vision.control_tokens if family.vision else ()
    tokens = header.metadata["tokenizer.ggml.tokens"]
    types = header.metadata.get("tokenizer.ggml.token_type") or (0,) * len(tokens)
    special = {text for text, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)}
    missing = [text for text in (IMAGE_LITERAL, *around) if around and text not in special]
    if missing:
        raise invalid(
            f"{header.path.name} lacks the control tokens {', '.join(missing)}, without which no picture can be placed"
        )
    return IMAGE_LITERAL


def _template(header: GGUFHeader, family: Family, name: str | None, prompt: PromptSpec) -> str | None:
    """The family's chat template if it must take the place of the file's own; None if that one stays."""
    own = header.chat_template
    if name is None and own is not None and _places_pictures(own, header, prompt):
        return None
    tokens = header.metadata["tokenizer.ggml.tokens"]
    wrap = family.vision.wrap if family.vision else None
    # LLaVA adds these tokens exactly to the models that it trains with them
    wraps = wrap is not None and {*wrap[1:]} <= set(tokens)
    chosen = choose_template(family, tokens, name, wraps=wraps)
    if chosen is None or not _places_pictures(chosen, header, prompt):
        raise CheckpointError(
            f"{header.path.name} has {'no chat template' if own is None else 'a chat template without pictures'}, and "
            f"the family {family.name} has none for its vocabulary; use a text model made with its vision template",
            code="checkpoint.unsupported",
        )
    return chosen


def _places_pictures(template: str, header: GGUFHeader, prompt: PromptSpec) -> bool:
    """Whether a template prints a picture, and the question with it."""
    form = PromptFormat(template=template, bos=header.token("bos"), eos=header.token("eos"), control_tokens=(),
                        image_token=prompt.image_token)  # fmt: skip
    try:
        pieces = render(question("edgevlm", [None]), form)
    except CapabilityError:
        return False
    return any(isinstance(piece, ImageSlot) for piece in pieces) and any(
        isinstance(piece, TextPiece) and "edgevlm" in piece.text for piece in pieces
    )


def _record(header: GGUFHeader, projector: Path, found: Projector, source: str, templated: bool) -> dict[str, Any]:
    text, general = header.path, header.metadata
    other = projector.name if projector.name != text.name else f"mmproj: {projector.name}"
    card = {ours: general[f"general.{key}"] for ours, key in _CARD.items() if f"general.{key}" in general}
    card = {key: text for key, text in card.items() if isinstance(text, str) and is_unicode(text)}
    return {
        "source": source,
        "source_files": {text.name: sha256_of(text), other: sha256_of(projector)},
        "model_card": card,
        "arguments": {"decoder_quant": AS_THE_SOURCE},
        "tools": tool_versions(),
        "notes": [*found.notes, *(["the chat template is the family's own"] if templated else [])],
        "unused_tensors": list(found.unused),
    }


def _compare_nothing(_out: Path, _progress: Progress) -> dict[str, Any]:
    """The weights are copied: no prediction changes."""
    return {}


def _write_decoder(header: GGUFHeader, template: str | None, out: Path, progress: Progress) -> dict[str, Any]:
    """Copy the text model, and look at the copy as the runtime will."""
    gguf_copy.copy(header, out, template)
    check_header(out)
    check_vocabulary(out, ())
    check_weights(out)
    types: dict[str, dict[str, int]] = {}
    for tensor in header.tensors:
        entry = types.setdefault(gguf_file.type_name(tensor.type_id), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return {
        "against": "the source, whose weights are copied",
        "kept": AS_THE_SOURCE,
        "types": dict(sorted(types.items())),
        "replaced": {},
    }


def _check_unchanged(status: Mapping[Path, FileStatus]) -> None:
    for path, before in status.items():
        if status_of(path) != before:
            raise CheckpointError(
                f"{path} changed while it was being read; convert it again", code="checkpoint.invalid"
            )

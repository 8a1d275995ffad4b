"""Checkpoint in, bundle out: the conversion, step by step. Needs neither torch nor transformers.

Sources, each of which becomes a `prepared.Prepared`:

huggingface.py  a checkpoint: a folder with config.json
checkpoint.py   the folder: JSON files, tensors (safetensors.py, torch_pickle.py)
resolve.py      family + JSON -> every number            mapping.py       every tensor -> its place
tokenizer.py    tokenizer files -> GGUF keys             gguf_decoder.py  the decoder's file (gguf_file.py)
decoder.py      what becomes of the decoder              imatrix.py, tensor_types.py   what steers its quantizer
targets.py      which type suits a device                quant.py         llama.cpp's quantizer
pair.py         two files of llama.cpp: the text model is copied (gguf_copy.py), the rest comes from mmproj.py

And for all:

loadable.py     the decoder's file, as the runtime sees it
encoder.py      what becomes of the encoder              onnx_vision.py   its graph (onnx_graph.py, onnx_products.py)
calibration.py  pictures to compare encoders on          smoothing.py     what int8 needs     verify.py  what it cost
fidelity.py     what it cost the answers                 limits.py        and what is too much
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.bundle import FORMAT, MANIFEST_NAME, Manifest, Role, file_entry, read_manifest, write_manifest
from edgevlm.converters import decoder, encoder, huggingface, limits, pair, quant, targets
from edgevlm.converters.encoder import EncoderPlan
from edgevlm.converters.fidelity import TOKENS
from edgevlm.converters.prepared import Prepared, Report
from edgevlm.errors import FidelityError, StorageError, UsageError
from edgevlm.families.schema import Family
from edgevlm.storage import commit_folder, require_free

DECODER, ENCODER = "decoder.gguf", "encoder.onnx"
_FILES: tuple[tuple[str, Role], ...] = (
    (DECODER, "decoder"),
    (ENCODER, "encoder"),
    (f"{ENCODER}.data", "encoder-data"),
)
DECODER_QUANTS = tuple(quant.RECIPES)
DEVICES = targets.DEVICES
DEFAULT_DECODER_QUANT = "q4_k_m"
ENCODER_QUANTS = encoder.ENCODER_QUANTS


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    decoder_quant: str | None = None,
    encoder_quant: str = "int8",
    device: str | None = None,
    decoder_types: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    name: str | None = None,
    tower: str | os.PathLike[str] | None = None,
    template: str | None = None,
    source: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    fidelity_tokens: int = TOKENS,
    report: Report | None = None,
    known_families: tuple[Family, ...] | None = None,
) -> Manifest:
    """Convert a Hugging Face checkpoint, or a pair of llama.cpp's files, into a bundle folder.

    Either `out` appears complete or nothing does: the bundle is built beside it and renamed once.

    Args:
        checkpoint: The folder with config.json and model.safetensors or pytorch_model.bin; or a text model's GGUF file,
            with `mmproj`; or a folder that holds nothing but such a pair.
        out: The folder to make.
        mmproj: llama.cpp's file with the vision part of a text model. The text model is copied, so no option about the
            decoder goes with it.
        decoder_quant: One of `DECODER_QUANTS` (`DEFAULT_DECODER_QUANT` by default), or `auto`: what suits `device` (one
            of `DEVICES`, by default this machine) and the model's sizes; why is reported and recorded.
        encoder_quant: One of `ENCODER_QUANTS`.
        device: See `decoder_quant`; only `auto` may have one.
        decoder_types: For single matrices of the decoder another type: a regular expression that is searched in their
            GGUF names -> a type such as `q6_k`. Of several that match the first decides.
        imatrix: A file of `llama-imatrix` (either form) that was made from this model, to steer the quantizer.
        calibration: A folder of pictures on which the encoder is compared, and `int8` is steered; built-in ones by
            default.
        name: What the model is called; the name of the checkpoint's folder or of the text model's file by default.
        tower: The folder of the vision tower, for a checkpoint whose tower lies in a repository of its own.
        template: The name of one of the family's chat templates, for a checkpoint that carries none; of a pair it takes
            the place of the text model's own.
        source: Where the checkpoint comes from (a repository name), for the record; `name` by default.
        overwrite: Whether an existing bundle at `out` gives way. Anything else there never does.
        force: Whether to keep a model whose error passes a limit (`limits.py`); the bundle says so then.
        fidelity_tokens: How many predictions of the decoder are compared with those of the unquantized one, on a
            built-in text; 0 compares none, which saves time and says nothing about them.
        report: Called with one line as each step begins.
        known_families: Families to choose from; every one of `edgevlm.families` by default.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: an unknown type, or options that contradict each other.
        FileError: the checkpoint, a file of the pair, the importance matrix or a picture cannot be read.
        GGUFError: a file of the pair breaks the format or cannot be run.
        ImageError: a calibration picture cannot be decoded.
        ImatrixError: the importance matrix is damaged or of another model.
        CheckpointError: the checkpoint cannot be converted.
        FidelityError: the error passes a limit, with the figures and a better choice.
        StorageError: `out` exists, or the disk is full or refuses.
        DependencyError: a package of the extra `convert` is missing.
        BackendError: llama.cpp or ONNX Runtime failed.

    Example::

        edgevlm.convert("llava-1.5-7b-hf", "llava-1.5-7b", decoder_quant="iq4_nl")
    """
    tell = report or (lambda line: None)
    encoder.check(encoder_quant)
    given, out = Path(checkpoint).absolute(), Path(out).absolute()
    files = pair.find_pair(given, None if mmproj is None else Path(mmproj).absolute())
    wishes = {"decoder_quant": decoder_quant, "device": device, "decoder_types": decoder_types, "imatrix": imatrix}
    if files:
        _refuse(wishes | {"tower": tower})
    else:
        decoder.check(decoder_quant or DEFAULT_DECODER_QUANT, device)
    _check_out(out, overwrite=overwrite)
    tell(f"reading {given}")
    if files:
        prepared = pair.prepare(
            *files, name=name or (given.name if given.is_dir() else given.stem), source=source, template=template,
            known_families=known_families, report=tell,
        )  # fmt: skip
    else:
        tower_folder = None if tower is None else Path(tower).absolute()
        model = huggingface.read(given, name or given.resolve().name, known_families, tower_folder, template)
        planned = decoder.plan(
            model.mapped,
            decoder_quant or DEFAULT_DECODER_QUANT,
            device=device,
            types=decoder_types,
            imatrix=imatrix,
            fidelity_tokens=fidelity_tokens,
        )
        prepared = huggingface.prepare(model, planned, source=source)
    seeing = encoder.plan(prepared.spec.image, encoder_quant, calibration)
    said = {**(seeing.arguments if seeing else {}), **({"force": True} if force else {})}
    record = prepared.record | {"arguments": prepared.record["arguments"] | said}
    record["arguments"] |= {"template": template} if template else {}
    return _commit(out, prepared, seeing, record, encoder_quant, overwrite=overwrite, force=force, tell=tell)


def _commit(
    out: Path,
    prepared: Prepared,
    seeing: EncoderPlan | None,
    record: dict[str, Any],
    encoder_quant: str,
    *,
    overwrite: bool,
    force: bool,
    tell: Report,
) -> Manifest:
    """Build the bundle beside `out`, and rename it."""
    # per weight of the encoder: its place in the graph, and in the float32 one to compare with
    encoder_bytes = prepared.encoder_weights * (4 if encoder_quant == "fp32" else 5)
    require_free(out, prepared.decoder_bytes + encoder_bytes + (16 << 20))
    with commit_folder(out, may_replace=_is_bundle if overwrite else None) as building:
        fidelity = _write_weights(building, prepared, seeing, tell)
        beyond = limits.exceeded(fidelity, prepared.decoder_type, encoder_quant)
        if beyond and not force:
            raise FidelityError(f"{'; '.join(beyond)}; or force it", code="fidelity.exceeded")
        prepared.check_unchanged()
        manifest = Manifest(
            format=FORMAT,
            spec=prepared.spec,
            files=tuple(file_entry(building / name, role) for name, role in _FILES if (building / name).exists()),
            provenance=record,
            fidelity={**fidelity, "exceeded_limits": beyond} if beyond else fidelity,
        )
        write_manifest(building, manifest)
        read_manifest(building)
        tell(f"committing {out}")
    return manifest


def _write_weights(building: Path, prepared: Prepared, seeing: EncoderPlan | None, tell: Report) -> dict[str, Any]:
    """Write the files of `_FILES` that the model has; returns what each part cost."""
    cost = prepared.write_decoder(building / DECODER, tell)
    if seeing is None or prepared.vision is None:
        return {"decoder": cost}
    tell(f"encoder to {seeing.quant}")
    path = building / ENCODER
    return {
        "decoder": cost,
        "encoder": encoder.write(path, seeing, prepared.vision, prepared.tower, prepared.connector),
    }


def _refuse(wishes: Mapping[str, Any]) -> None:
    """A pair's text model is copied: nothing that is said of its making can be obeyed."""
    said = [option for option, value in wishes.items() if value]
    if said:
        raise UsageError(
            f"{', '.join(said)} cannot be obeyed with an mmproj: the text model is copied as it is, because to "
            "quantize it again would lose more than it says; leave it out, or convert the original checkpoint"
        )


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise StorageError(
            f"{out} exists already; remove it, choose another name, or overwrite it", code="storage.exists"
        )
    if not _is_bundle(out):
        raise StorageError(f"{out} exists and is not a bundle; only a bundle is overwritten", code="storage.exists")


def _is_bundle(folder: Path) -> bool:
    return not folder.is_symlink() and (folder / MANIFEST_NAME).is_file()

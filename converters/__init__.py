"""Checkpoint in, bundle out: the conversion, step by step. Needs neither torch nor transformers.

checkpoint.py   the folder: JSON files, tensors (safetensors.py, torch_pickle.py)
resolve.py      family + JSON -> every number            mapping.py       every tensor -> its place
tokenizer.py    tokenizer files -> GGUF keys             gguf_decoder.py  the decoder's file (gguf_file.py)
decoder.py      what becomes of the decoder              imatrix.py, tensor_types.py   what steers its quantizer
targets.py      which type suits a device                quant.py         llama.cpp's quantizer
loadable.py     the decoder's file, as the runtime sees it
encoder.py      what becomes of the encoder              onnx_vision.py   its graph (onnx_graph.py, onnx_products.py)
calibration.py  pictures to compare encoders on          smoothing.py     what int8 needs     verify.py  what it cost
fidelity.py     what it cost the answers                 limits.py        and what is too much
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgevlm import families
from edgevlm.bundle import FORMAT, MANIFEST_NAME, Manifest, Role, file_entry, read_manifest, write_manifest
from edgevlm.converters import decoder, encoder, limits, quant, targets
from edgevlm.converters.checkpoint import Checkpoint, open_checkpoint, unchanged
from edgevlm.converters.decoder import DecoderPlan
from edgevlm.converters.encoder import EncoderPlan
from edgevlm.converters.fidelity import TOKENS
from edgevlm.converters.mapping import Mapped, map_tensors
from edgevlm.converters.provenance import general_keys, provenance
from edgevlm.converters.resolve import Resolved, resolve
from edgevlm.converters.tokenizer import Vocabulary, choose_template, read_tokens, read_vocabulary
from edgevlm.errors import CheckpointError, FidelityError, StorageError, UsageError
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
ENCODER_QUANTS = encoder.ENCODER_QUANTS

Report = Callable[[str], None]


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    decoder_quant: str = "q4_k_m",
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
    """Convert a Hugging Face checkpoint folder into a bundle folder.

    Either `out` appears complete or nothing does: the bundle is built beside it and renamed once.

    Args:
        checkpoint: The folder with config.json and model.safetensors or pytorch_model.bin.
        out: The folder to make.
        decoder_quant: One of `DECODER_QUANTS`, or `auto`: what suits `device` (one of `DEVICES`, by default this
            machine) and the model's sizes; why is reported and recorded.
        encoder_quant: One of `ENCODER_QUANTS`.
        device: See `decoder_quant`; only `auto` may have one.
        decoder_types: For single matrices of the decoder another type: a regular expression that is searched in their
            GGUF names -> a type such as `q6_k`. Of several that match the first decides.
        imatrix: A file of `llama-imatrix` (either form) that was made from this model, to steer the quantizer.
        calibration: A folder of pictures on which the encoder is compared, and `int8` is steered; built-in ones by
            default.
        name: What the model is called; the checkpoint folder's name by default.
        tower: The folder of the vision tower, for a checkpoint whose tower lies in a repository of its own.
        template: The name of one of the family's chat templates, for a checkpoint that carries none.
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
        FileError: the checkpoint, the importance matrix or a picture cannot be read.
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
    decoder.check(decoder_quant, device)
    encoder.check(encoder_quant)
    folder, out = Path(checkpoint).absolute(), Path(out).absolute()
    _check_out(out, overwrite=overwrite)
    tell(f"reading {folder}")
    model = _read(folder, name or folder.resolve().name, known_families, tower and Path(tower).absolute(), template)
    planned = decoder.plan(
        model.mapped,
        decoder_quant,
        device=device,
        types=decoder_types,
        imatrix=imatrix,
        fidelity_tokens=fidelity_tokens,
    )
    seeing = encoder.plan(model.resolved.spec.image, encoder_quant, calibration)
    arguments = {**planned.arguments, **(seeing.arguments if seeing else {}), **({"force": True} if force else {})}
    arguments |= {"template": template} if template else {}
    record = provenance(model.checkpoint, source=source or model.resolved.spec.name, arguments=arguments)
    record |= planned.record() | model.origin()
    if model.tower is not None:
        record["tower"] = {"source": model.tower.folder.resolve().name, "source_files": model.tower.hashes()}
    require_free(out, _bytes_needed(model.mapped, planned, encoder_quant))
    with commit_folder(out, may_replace=_is_bundle if overwrite else None) as building:
        fidelity = _write_weights(building, model, planned, seeing, tell)
        beyond = limits.exceeded(fidelity, planned.recipe.name, encoder_quant)
        if beyond and not force:
            raise FidelityError(f"{'; '.join(beyond)}; or force it", code="fidelity.exceeded")
        model.check_unchanged()
        manifest = Manifest(
            format=FORMAT,
            spec=model.resolved.spec,
            files=tuple(file_entry(building / name, role) for name, role in _FILES if (building / name).exists()),
            provenance={**record, "unused_tensors": list(model.mapped.unused)},
            fidelity={**fidelity, "exceeded_limits": beyond} if beyond else fidelity,
        )
        write_manifest(building, manifest)
        read_manifest(building)
        tell(f"committing {out}")
    return manifest


@dataclass(frozen=True)
class _Model:
    """A checkpoint that has been understood."""

    checkpoint: Checkpoint
    resolved: Resolved
    vocabulary: Vocabulary
    mapped: Mapped
    tower: Checkpoint | None
    family: Family

    def origin(self) -> dict[str, Any]:
        """Whose model this is, for the record, in our words and not in the checkpoint's."""
        known = self.family.origin
        return {"origin": {key: text for key, text in asdict(known).items() if text}} if known else {}

    def check_unchanged(self) -> None:
        for opened in (self.checkpoint, self.tower):
            if opened is not None and not unchanged(opened):
                raise CheckpointError(
                    f"{opened.folder} changed while it was being read; convert it again", code="checkpoint.invalid"
                )


def _read(
    folder: Path,
    name: str,
    known_families: tuple[Family, ...] | None,
    tower_folder: Path | None = None,
    template: str | None = None,
) -> _Model:
    checkpoint = open_checkpoint(folder)
    family = families.find(_architectures(checkpoint), known_families, checkpoint.config)
    tower = _open_tower(family, checkpoint, tower_folder)
    tokens = read_tokens(checkpoint)
    vision = family.vision
    processor = (tower or checkpoint).image_processor(optional=bool(vision.slices)) if vision else None
    resolved = resolve(
        family, checkpoint.config, processor, tokens.texts, name=name, tower=tower.config if tower else None
    )
    llama = resolved.llama
    vocabulary = read_vocabulary(
        checkpoint,
        tokens,
        rows=resolved.spec.decoder.vocab,
        ids={"bos": llama.bos, "eos": llama.eos, "padding": llama.pad},
        template=choose_template(family, checkpoint.config, tokens, template),
    )
    tensors = dict(checkpoint.tensors)
    if tower is not None:
        tensors |= {f"tower:{name}": tensor for name, tensor in tower.tensors.items()}
    return _Model(checkpoint, resolved, vocabulary, map_tensors(family, resolved, tensors), tower, family)


def _open_tower(family: Family, checkpoint: Checkpoint, folder: Path | None) -> Checkpoint | None:
    """The checkpoint of the tower, exactly if the family has one."""
    separate = family.vision is not None and family.vision.separate
    if separate and folder is None:
        named = str(checkpoint.config.get("mm_vision_tower"))[:120]
        raise UsageError(f"the tower of this checkpoint lies apart, in {named!r}; download it and name it with --tower")
    if folder is not None and not separate:
        raise UsageError(f"a checkpoint of the family {family.name} holds its tower itself; leave --tower out")
    return None if folder is None else open_checkpoint(folder)


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


def _architectures(opened: Checkpoint) -> list[str]:
    """What config.json calls the model's class, in either of its two places."""
    found, classes = opened.config.get("architectures"), opened.config.get("auto_map")
    named = classes.get("AutoModelForCausalLM") if isinstance(classes, dict) else None
    if found is None and isinstance(named, str):
        found = [named.rpartition(".")[2]]
    return [str(name) for name in found] if isinstance(found, list) else []


def _bytes_needed(mapped: Mapped, decoder: DecoderPlan, encoder_quant: str) -> int:
    """What the conversion writes at its peak, roughly: intermediate files included."""
    encoder = sum(source.tensor.bits.size for source in [*mapped.tower.values(), *mapped.connector.values()])
    return decoder.peak_bytes + encoder * (4 if encoder_quant == "fp32" else 5) + (16 << 20)


def _write_weights(
    building: Path, model: _Model, planned: DecoderPlan, seeing: EncoderPlan | None, tell: Report
) -> dict[str, dict[str, Any]]:
    """Write the files of `_FILES` that the model has; returns what each part cost."""
    origin = model.family.origin
    if origin and origin.notice:
        tell(origin.notice)
    tell(f"decoder to {planned.recipe.name}" + (f": {planned.reason}" if planned.reason else ""))
    resolved = model.resolved
    general = general_keys(model.checkpoint, resolved.spec.name, origin)
    cost = decoder.write(building / DECODER, planned, model.mapped, resolved, model.vocabulary, general, tell)
    if seeing is None or resolved.vision is None:
        return {"decoder": cost}
    tell(f"encoder to {seeing.quant}")
    mapped = model.mapped
    return {
        "decoder": cost,
        "encoder": encoder.write(building / ENCODER, seeing, resolved.vision, mapped.tower, mapped.connector),
    }

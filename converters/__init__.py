"""Checkpoint in, bundle out: the conversion, step by step. Needs neither torch nor transformers.

checkpoint.py   the folder: JSON files, tensors (safetensors.py, torch_pickle.py)
resolve.py      family + JSON -> every number            mapping.py       every tensor -> its place
tokenizer.py    tokenizer files -> GGUF keys             gguf_decoder.py  the decoder's file (gguf_file.py)
decoder.py      what becomes of the decoder              imatrix.py, tensor_types.py   what steers its quantizer
targets.py      which type suits a device                quant.py         llama.cpp's quantizer
loadable.py     the decoder's file, as the runtime sees it
encoder.py      what becomes of the encoder              onnx_vision.py   the encoder's graph (onnx_graph.py)
verify.py       what it cost (calibration.py)            forecast.py      all this without writing anything
fidelity.py     what it cost the answers                 limits.py        and what is too much
progress.py     how far it is                            pages.py         mapped pages, given back after use
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

from edgevlm import families, spec
from edgevlm.bundle import FORMAT, MANIFEST_NAME, FileEntry, Manifest, Role, read_manifest, write_manifest
from edgevlm.converters import decoder, encoder, forecast, limits, quant, targets
from edgevlm.converters.checkpoint import Checkpoint, open_checkpoint, unchanged
from edgevlm.converters.decoder import DecoderPlan
from edgevlm.converters.fidelity import TOKENS
from edgevlm.converters.forecast import Forecast
from edgevlm.converters.mapping import Mapped, map_tensors
from edgevlm.converters.onnx_vision import EncoderQuant
from edgevlm.converters.progress import Advance, Progress, Report
from edgevlm.converters.provenance import general_keys, provenance
from edgevlm.converters.resolve import Resolved, resolve
from edgevlm.converters.tokenizer import Vocabulary, choose_template, read_tokens, read_vocabulary
from edgevlm.errors import CheckpointError, FidelityError, StorageError, UsageError
from edgevlm.families.schema import Family
from edgevlm.journal import Journal
from edgevlm.storage import commit_folder, remove_abandoned, require_free, storage_errors

DECODER, ENCODER = "decoder.gguf", "encoder.onnx"
_FILES: tuple[tuple[str, Role], ...] = (
    (DECODER, "decoder"),
    (ENCODER, "encoder"),
    (f"{ENCODER}.data", "encoder-data"),
)
DECODER_QUANTS = tuple(quant.RECIPES)
DEVICES = targets.DEVICES
ENCODER_QUANTS: tuple[EncoderQuant, ...] = ("int8", "fp32")


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    decoder_quant: str = "q4_k_m",
    encoder_quant: str = "int8",
    device: str | None = None,
    decoder_types: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    name: str | None = None,
    tower: str | os.PathLike[str] | None = None,
    template: str | None = None,
    source: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    fidelity_tokens: int = TOKENS,
    report: Report | None = None,
    advance: Advance | None = None,
    known_families: tuple[Family, ...] | None = None,
) -> Manifest:
    """Convert a Hugging Face checkpoint folder into a bundle folder.

    Either `out` appears complete or nothing does: the bundle is built beside it and renamed once. After a kill, the
    same call goes on with what was finished; any other conversion to `out` removes it.

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
        name: What the model is called; the checkpoint folder's name by default.
        tower: The folder of the vision tower, for a checkpoint whose tower lies in a repository of its own.
        template: The name of one of the family's chat templates, for a checkpoint that carries none.
        source: Where the checkpoint comes from (a repository name), for the record; `name` by default.
        overwrite: Whether an existing bundle at `out` gives way. Anything else there never does.
        force: Whether to keep a model whose error passes a limit (`limits.py`); the bundle says so then.
        fidelity_tokens: How many predictions of the decoder are compared with those of the unquantized one, on a
            built-in text; 0 compares none, which saves time and says nothing about them.
        report: Called with one line as each step begins.
        advance: Called often as a step goes on, with (done, total, unit); the unit is `bytes` or `tokens`.
        known_families: Families to choose from; every one of `edgevlm.families` by default.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: an unknown type, or options that contradict each other.
        FileError: the checkpoint or the importance matrix does not exist.
        ImatrixError: the importance matrix is damaged or of another model.
        CheckpointError: the checkpoint cannot be converted.
        FidelityError: the error passes a limit, with the figures and a better choice.
        StorageError: `out` exists, or the disk is full or refuses.
        DependencyError: a package of the extra `convert` is missing.
        BackendError: llama.cpp or ONNX Runtime failed.

    Example::

        edgevlm.convert("llava-1.5-7b-hf", "llava-1.5-7b", decoder_quant="iq4_nl")
    """
    progress = Progress(report, advance)
    _check_quants(decoder_quant, encoder_quant, device)
    out = Path(out).absolute()
    _check_out(out, overwrite=overwrite)
    plan = _plan(
        checkpoint,
        progress,
        decoder_quant=decoder_quant,
        encoder_quant=encoder_quant,
        device=device,
        decoder_types=decoder_types,
        imatrix=imatrix,
        name=name,
        tower=tower,
        template=template,
        source=source,
        force=force,
        fidelity_tokens=fidelity_tokens,
        known_families=known_families,
    )
    with commit_folder(out, may_replace=_is_bundle if overwrite else None, key=plan.key()) as building:
        manifest = _build(building, plan, progress, force=force)
        progress.step(f"committing {out}")
    return manifest


class Options(TypedDict, total=False):
    """The options of `convert` that decide what comes out."""

    decoder_quant: str
    encoder_quant: str
    device: str | None
    decoder_types: Mapping[str, str] | None
    imatrix: str | os.PathLike[str] | None
    name: str | None
    tower: str | os.PathLike[str] | None
    template: str | None
    source: str | None
    force: bool
    fidelity_tokens: int
    known_families: tuple[Family, ...] | None


def dry_run(checkpoint: str | os.PathLike[str], **options: Unpack[Options]) -> Forecast:
    """Say what `convert` would do, without writing anything: everything is read and checked but the weights' values.

    Args:
        checkpoint, options: As for `convert`.

    Returns:
        Sizes of the files, to the byte; what it takes; and what becomes of each tensor.

    Raises:
        EdgeVLMError: as `convert` would.

    Example::

        edgevlm.converters.dry_run("llava-1.5-7b-hf", decoder_quant="iq4_nl").total_bytes
    """
    plan = _plan(checkpoint, Progress(), **options)
    model = plan.model
    return forecast.predict(
        model.mapped, model.resolved, plan.decoder, plan.encoder_quant, disk_bytes=plan.bytes_needed()
    )


@dataclass(frozen=True)
class _Plan:
    """A conversion that can begin."""

    model: _Model
    decoder: DecoderPlan
    encoder_quant: EncoderQuant
    arguments: dict[str, Any]
    source: str

    @cached_property
    def record(self) -> dict[str, Any]:
        """The section `provenance` as far as it is known before any weight is converted; reads every source file."""
        model = self.model
        record = provenance(model.checkpoint, source=self.source, arguments=self.arguments) | self.decoder.record()
        if model.tower is not None:
            record["tower"] = {"source": model.tower.folder.resolve().name, "source_files": model.tower.hashes()}
        return record

    def key(self) -> str:
        """Equal for conversions that give the same bytes: sources by their hashes, arguments, versions of the tools."""
        described = [self.record, spec.to_json(self.model.resolved.spec), self.decoder.fidelity_tokens]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def bytes_needed(self) -> int:
        """What the conversion writes at its peak, roughly: intermediate files included."""
        mapped = self.model.mapped
        encoder = sum(source.tensor.bits.size for source in [*mapped.tower.values(), *mapped.connector.values()])
        return self.decoder.peak_bytes + encoder * (4 if self.encoder_quant == "fp32" else 5) + (16 << 20)


def _check_quants(decoder_quant: str, encoder_quant: str, device: str | None) -> None:
    decoder.check(decoder_quant, device)
    if encoder_quant not in ENCODER_QUANTS:
        raise UsageError(f"encoder_quant is {encoder_quant!r}, it must be one of {', '.join(ENCODER_QUANTS)}")


def _plan(
    checkpoint: str | os.PathLike[str],
    progress: Progress,
    *,
    decoder_quant: str = "q4_k_m",
    encoder_quant: str = "int8",
    device: str | None = None,
    decoder_types: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    name: str | None = None,
    tower: str | os.PathLike[str] | None = None,
    template: str | None = None,
    source: str | None = None,
    force: bool = False,
    fidelity_tokens: int = TOKENS,
    known_families: tuple[Family, ...] | None = None,
) -> _Plan:
    """Read and check everything but the weights' values."""
    _check_quants(decoder_quant, encoder_quant, device)
    folder = Path(checkpoint).absolute()
    progress.step(f"reading {folder}")
    tower_folder = None if tower is None else Path(tower).absolute()
    model = _read(folder, name or folder.resolve().name, known_families, tower_folder, template)
    planned = decoder.plan(
        model.mapped,
        model.resolved,
        model.vocabulary,
        general_keys(model.checkpoint, model.resolved.spec.name),
        decoder_quant,
        device=device,
        types=decoder_types,
        imatrix=imatrix,
        fidelity_tokens=fidelity_tokens,
        progress=progress,
    )
    arguments = {**planned.arguments, "encoder_quant": encoder_quant, **({"force": True} if force else {})}
    arguments |= {"template": template} if template else {}
    return _Plan(model, planned, encoder_quant, arguments, source or model.resolved.spec.name)  # type: ignore[arg-type]


def _build(building: Path, plan: _Plan, progress: Progress, *, force: bool) -> Manifest:
    """Write all files of a bundle, as far as they are not there."""
    journal = Journal(building)
    require_free(building, plan.bytes_needed() - sum(path.stat().st_size for path in building.iterdir()))
    fidelity = _write_weights(building, journal, plan, progress)
    beyond = limits.exceeded(fidelity, plan.decoder.recipe.name, plan.encoder_quant)
    if beyond and not force:
        raise FidelityError(f"{'; '.join(beyond)}; or force it", code="fidelity.exceeded")
    plan.model.check_unchanged()
    manifest = Manifest(
        format=FORMAT,
        spec=plan.model.resolved.spec,
        files=_entries(building, journal),
        provenance={**plan.record, "unused_tensors": list(plan.model.mapped.unused)},
        fidelity={**fidelity, "exceeded_limits": beyond} if beyond else fidelity,
    )
    write_manifest(building, manifest)
    read_manifest(building)
    return manifest


@dataclass(frozen=True)
class _Model:
    """A checkpoint that has been understood."""

    checkpoint: Checkpoint
    resolved: Resolved
    vocabulary: Vocabulary
    mapped: Mapped
    tower: Checkpoint | None

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
    processor = (tower or checkpoint).image_processor() if family.vision else None
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
    return _Model(checkpoint, resolved, vocabulary, map_tensors(family, resolved, tensors), tower)


def _open_tower(family: Family, checkpoint: Checkpoint, folder: Path | None) -> Checkpoint | None:
    """The checkpoint of the tower, exactly if the family has one."""
    separate = family.vision is not None and family.vision.separate
    if separate and folder is None:
        named = str(checkpoint.config.get("mm_vision_tower"))[:120]
        raise UsageError(f"the tower of this checkpoint lies apart, in {named!r}; download it and name it with --tower")
    if folder is not None and not separate:
        raise UsageError(f"a checkpoint of the family {family.name} holds its tower itself; leave --tower out")
    return None if folder is None else open_checkpoint(folder)


def _entries(building: Path, journal: Journal) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(name=name, size=(building / name).stat().st_size, sha256=journal.hashes[name], role=role)
        for name, role in _FILES
        if name in journal.hashes
    )


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    with storage_errors(out):
        remove_abandoned(out)  # a process that was killed between its commit and its last act leaves a lock
    if not overwrite:
        raise StorageError(
            f"{out} exists already; remove it, choose another name, or overwrite it", code="storage.exists"
        )
    if not _is_bundle(out):
        raise StorageError(f"{out} exists and is not a bundle; only a bundle is overwritten", code="storage.exists")


def _is_bundle(folder: Path) -> bool:
    return not folder.is_symlink() and (folder / MANIFEST_NAME).is_file()


def _architectures(opened: Checkpoint) -> list[str]:
    found = opened.config.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []


def _write_weights(building: Path, journal: Journal, plan: _Plan, progress: Progress) -> dict[str, dict[str, Any]]:
    """Write the files of `_FILES` that the model has; returns what each part cost."""
    final, planned, vision = building / DECODER, plan.decoder, plan.model.resolved.vision
    progress.step(f"decoder to {planned.recipe.name}" + (f": {planned.reason}" if planned.reason else ""))
    cost = journal.step("decoder", (DECODER,), lambda: decoder.write(final, planned, progress))
    predictions = journal.step("predictions", (), lambda: decoder.predictions(final, planned, progress))
    fidelity = {"decoder": {**cost, **({"predictions": predictions} if predictions else {})}}
    if vision:
        progress.step(f"encoder to {plan.encoder_quant}")
        fidelity["encoder"] = journal.step(
            "encoder",
            (ENCODER, f"{ENCODER}.data"),
            lambda: encoder.write(building / ENCODER, plan.model.mapped, vision, plan.encoder_quant, progress),
        )
    return fidelity

"""A source in, a bundle out: the conversion, step by step. Needs neither torch nor transformers.

huggingface.py  a checkpoint as a source                 pair.py          llama.cpp's text GGUF with its mmproj.py
prepared.py     what both are then
checkpoint.py   the folder: JSON files, tensors (safetensors.py, torch_pickle.py)
resolve.py      family + JSON -> every number            mapping.py       every tensor -> its place
tokenizer.py    tokenizer files -> GGUF keys             gguf_decoder.py  the decoder's file (gguf_file.py)
decoder.py      what becomes of the decoder              imatrix.py, tensor_types.py   what steers its quantizer
targets.py      which type suits a device                quant.py         llama.cpp's quantizer
loadable.py     the decoder's file, as the runtime sees it               finite.py   NaN in any stored type
encoder.py      what becomes of the encoder              onnx_vision.py   its graph (onnx_graph.py, onnx_products.py)
calibration.py  pictures to compare encoders on          smoothing.py     what int8 needs     verify.py  what it cost
fidelity.py     what it cost the answers                 limits.py        and what is too much
forecast.py     all this without writing anything        catalog.py       the same for published models
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

from edgevlm import spec
from edgevlm.bundle import FORMAT, MANIFEST_NAME, FileEntry, Manifest, Role, read_manifest, write_manifest
from edgevlm.converters import decoder, encoder, forecast, huggingface, limits, pair, quant, targets
from edgevlm.converters.encoder import EncoderPlan
from edgevlm.converters.fidelity import TOKENS
from edgevlm.converters.forecast import Forecast
from edgevlm.converters.prepared import Prepared
from edgevlm.converters.progress import Advance, Progress, Report
from edgevlm.errors import FidelityError, StorageError, UsageError
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
DEFAULT_DECODER_QUANT = "q4_k_m"
DEVICES = targets.DEVICES
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
    advance: Advance | None = None,
    known_families: tuple[Family, ...] | None = None,
) -> Manifest:
    """Convert a Hugging Face checkpoint, or a pair of llama.cpp's files, into a bundle folder.

    Either `out` appears complete or nothing does: the bundle is built beside it and renamed once. After a kill, the
    same call goes on with what was finished; any other conversion to `out` removes it.

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
        advance: Called often as a step goes on, with (done, total, unit); the unit is `bytes` or `tokens`.
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
    options = Options(
        mmproj=mmproj,
        decoder_quant=decoder_quant,
        encoder_quant=encoder_quant,
        device=device,
        decoder_types=decoder_types,
        imatrix=imatrix,
        calibration=calibration,
        name=name,
        tower=tower,
        template=template,
        source=source,
        force=force,
        fidelity_tokens=fidelity_tokens,
        known_families=known_families,
    )
    progress, out = Progress(report, advance), Path(out).absolute()
    _check(options)
    _check_out(out, overwrite=overwrite)
    plan = _plan(Path(checkpoint).absolute(), options, progress)
    with commit_folder(out, may_replace=_is_bundle if overwrite else None, key=plan.key()) as building:
        manifest = _build(building, plan, progress, force=force)
        progress.step(f"committing {out}")
    return manifest


class Options(TypedDict, total=False):
    """The options of `convert` that decide what comes out."""

    mmproj: str | os.PathLike[str] | None
    decoder_quant: str | None
    encoder_quant: str
    device: str | None
    decoder_types: Mapping[str, str] | None
    imatrix: str | os.PathLike[str] | None
    calibration: str | os.PathLike[str] | None
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
        Sizes of the files; what it takes; and what becomes of each tensor.

    Raises:
        EdgeVLMError: as `convert` would.

    Example::

        edgevlm.converters.dry_run("llava-1.5-7b-hf", decoder_quant="iq4_nl").total_bytes
    """
    _check(options)
    plan = _plan(Path(checkpoint).absolute(), options, Progress())
    return forecast.predict(plan.prepared, plan.seeing, disk_bytes=plan.bytes_needed())


@dataclass(frozen=True)
class _Plan:
    """A conversion that can begin. `said` are its arguments but for those of the decoder."""

    prepared: Prepared
    seeing: EncoderPlan | None
    said: Mapping[str, Any]
    fidelity_tokens: int

    @cached_property
    def record(self) -> dict[str, Any]:
        """The section `provenance`."""
        record = self.prepared.record()
        return {**record, "arguments": {**record["arguments"], **self.said}}

    def key(self) -> str:
        """Equal for conversions that give the same bytes: sources by their hashes, arguments, versions of the tools."""
        described = [self.record, spec.to_json(self.prepared.spec), self.fidelity_tokens]
        # not sorted: of `decoder_types` the first that matches decides
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def bytes_needed(self) -> int:
        """What the conversion writes at its peak, roughly: intermediate files included."""
        # of each of the encoder's numbers its place in the graph, and in the float32 one to compare with
        each = 4 if self.seeing and self.seeing.quant == "fp32" else 6
        return self.prepared.decoder_bytes + self.prepared.encoder_weights * each + (16 << 20)


def _check(options: Options) -> None:
    """Refuse what can be refused by looking at the options."""
    encoder.check(options.get("encoder_quant", "int8"))
    if not options.get("mmproj"):
        decoder.check(options.get("decoder_quant") or DEFAULT_DECODER_QUANT, options.get("device"))


def _plan(given: Path, options: Options, progress: Progress) -> _Plan:
    """Read and check everything but the weights' values."""
    mmproj = options.get("mmproj")
    files = pair.find_pair(given, None if mmproj is None else Path(mmproj).absolute())
    if files:
        _refuse(options)
    progress.step(f"reading {given}")
    prepared = _of_pair(given, files, options) if files else _of_checkpoint(given, options, progress)
    seeing = encoder.plan(prepared.spec.image, options.get("encoder_quant", "int8"), options.get("calibration"))
    said: dict[str, Any] = dict(seeing.arguments) if seeing else {}
    said |= {key: options[key] for key in ("force", "template") if options.get(key)}  # type: ignore[literal-required]
    return _Plan(prepared, seeing, said, options.get("fidelity_tokens", TOKENS))


def _of_pair(given: Path, files: tuple[Path, Path], options: Options) -> Prepared:
    return pair.prepare(
        *files,
        name=options.get("name") or (given.name if given.is_dir() else given.stem),
        source=options.get("source"),
        template=options.get("template"),
        known_families=options.get("known_families"),
    )


def _of_checkpoint(given: Path, options: Options, progress: Progress) -> Prepared:
    tower = options.get("tower")
    model = huggingface.read(
        given,
        options.get("name") or given.resolve().name,
        options.get("known_families"),
        None if tower is None else Path(tower).absolute(),
        options.get("template"),
    )
    planned = decoder.plan(
        model.mapped,
        model.resolved,
        model.vocabulary,
        model.general_keys(),
        options.get("decoder_quant") or DEFAULT_DECODER_QUANT,
        device=options.get("device"),
        types=options.get("decoder_types"),
        imatrix=options.get("imatrix"),
        fidelity_tokens=options.get("fidelity_tokens", TOKENS),
        progress=progress,
    )
    return huggingface.prepare(model, planned, source=options.get("source"))


def _refuse(options: Options) -> None:
    """A pair's text model is copied: nothing that is said of its making can be obeyed."""
    wishes = ("decoder_quant", "device", "decoder_types", "imatrix", "tower")
    said = [wish for wish in wishes if options.get(wish)]
    if said:
        raise UsageError(
            f"{', '.join(said)} cannot be obeyed with an mmproj: the text model is copied as it is, because to "
            "quantize it again would lose more than it says; leave it out, or convert the original checkpoint"
        )


def _build(building: Path, plan: _Plan, progress: Progress, *, force: bool) -> Manifest:
    """Write all files of a bundle, as far as they are not there."""
    journal, prepared = Journal(building), plan.prepared
    for notice in prepared.notices:
        progress.step(notice)
    require_free(building, plan.bytes_needed() - sum(path.stat().st_size for path in building.iterdir()))
    fidelity = _write_weights(building, journal, plan, progress)
    beyond = limits.exceeded(fidelity, prepared.decoder_type, plan.seeing.quant if plan.seeing else "")
    if beyond and not force:
        raise FidelityError(f"{'; '.join(beyond)}; or force it", code="fidelity.exceeded")
    prepared.check_unchanged()
    manifest = Manifest(
        format=FORMAT,
        spec=prepared.spec,
        files=_entries(building, journal),
        provenance=plan.record,
        fidelity={**fidelity, "exceeded_limits": beyond} if beyond else fidelity,
    )
    write_manifest(building, manifest)
    read_manifest(building)
    return manifest


def _write_weights(building: Path, journal: Journal, plan: _Plan, progress: Progress) -> dict[str, dict[str, Any]]:
    """Write the files of `_FILES` that the model has; returns what each part cost."""
    prepared, final, graph = plan.prepared, building / DECODER, building / ENCODER
    progress.step(f"decoder {prepared.decoder_type}" + (f": {prepared.reason}" if prepared.reason else ""))
    cost = journal.step("decoder", (DECODER,), lambda: prepared.write_decoder(final, progress))
    predictions = journal.step("predictions", (), lambda: prepared.compare_decoder(final, progress))
    fidelity = {"decoder": {**cost, **({"predictions": predictions} if predictions else {})}}
    seeing, vision = plan.seeing, prepared.vision
    if seeing and vision:
        progress.step(f"encoder to {seeing.quant}")
        fidelity["encoder"] = journal.step(
            "encoder",
            (ENCODER, f"{ENCODER}.data"),
            lambda: encoder.write(graph, seeing, vision, prepared.tower, prepared.connector, progress),
        )
    return fidelity


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
        remove_abandoned(out, committed=True)
    if not overwrite:
        raise StorageError(
            f"{out} exists already; remove it, choose another name, or overwrite it", code="storage.exists"
        )
    if not _is_bundle(out):
        raise StorageError(f"{out} exists and is not a bundle; only a bundle is overwritten", code="storage.exists")


def _is_bundle(folder: Path) -> bool:
    return not folder.is_symlink() and (folder / MANIFEST_NAME).is_file()

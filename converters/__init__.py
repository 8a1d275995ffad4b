"""Checkpoint in, bundle out: the conversion, step by step. Needs neither torch nor transformers.

checkpoint.py   the folder: JSON files, tensors (safetensors.py, torch_pickle.py)
resolve.py      family + JSON -> every number            mapping.py       every tensor -> its place
tokenizer.py    tokenizer files -> GGUF keys             gguf_decoder.py  the decoder's file (gguf_file.py, quant.py)
onnx_vision.py  the encoder's graph (onnx_graph.py)      verify.py        what it cost (calibration.py)
loadable.py     the decoder's file, as the runtime sees it
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm import families
from edgevlm.bundle import FORMAT, MANIFEST_NAME, Manifest, Role, file_entry, read_manifest, write_manifest
from edgevlm.converters import gguf_decoder, quant, verify
from edgevlm.converters.checkpoint import Checkpoint, open_checkpoint, unchanged
from edgevlm.converters.loadable import check_header, check_vocabulary
from edgevlm.converters.mapping import Mapped, Source, map_tensors
from edgevlm.converters.onnx_vision import EncoderQuant, build_encoder
from edgevlm.converters.provenance import general_keys, provenance
from edgevlm.converters.quant import Recipe
from edgevlm.converters.resolve import Resolved, ResolvedVision, resolve
from edgevlm.converters.tokenizer import Vocabulary, choose_template, read_tokens, read_vocabulary
from edgevlm.converters.weights import as_float32
from edgevlm.errors import CheckpointError, StorageError, UsageError
from edgevlm.families.schema import Family
from edgevlm.storage import commit_folder, require_free

DECODER, ENCODER = "decoder.gguf", "encoder.onnx"
DECODER_QUANTS = tuple(quant.RECIPES)
ENCODER_QUANTS: tuple[EncoderQuant, ...] = ("int8", "fp32")

Report = Callable[[str], None]


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    decoder_quant: str = "q4_k_m",
    encoder_quant: str = "int8",
    name: str | None = None,
    tower: str | os.PathLike[str] | None = None,
    template: str | None = None,
    source: str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    known_families: tuple[Family, ...] | None = None,
) -> Manifest:
    """Convert a Hugging Face checkpoint folder into a bundle folder.

    Either `out` appears complete or nothing does: the bundle is built beside it and renamed once.

    Args:
        checkpoint: The folder with config.json and model.safetensors or pytorch_model.bin.
        out: The folder to make.
        decoder_quant: One of `DECODER_QUANTS`.
        encoder_quant: One of `ENCODER_QUANTS`.
        name: What the model is called; the checkpoint folder's name by default.
        tower: The folder of the vision tower, for a checkpoint whose tower lies in a repository of its own.
        template: The name of one of the family's chat templates, for a checkpoint that carries none.
        source: Where the checkpoint comes from (a repository name), for the record; `name` by default.
        overwrite: Whether an existing bundle at `out` gives way. Anything else there never does.
        report: Called with one line as each step begins.
        known_families: Families to choose from; every one of `edgevlm.families` by default.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: an unknown type.
        FileError: the checkpoint does not exist.
        CheckpointError: the checkpoint cannot be converted.
        StorageError: `out` exists, or the disk is full or refuses.
        DependencyError: a package of the extra `convert` is missing.
        BackendError: llama.cpp or ONNX Runtime failed.

    Example::

        edgevlm.convert("llava-1.5-7b-hf", "llava-1.5-7b", decoder_quant="iq4_nl")
    """
    tell = report or (lambda line: None)
    wanted = quant.recipe(decoder_quant)
    if encoder_quant not in ENCODER_QUANTS:
        raise UsageError(f"encoder_quant is {encoder_quant!r}, it must be one of {', '.join(ENCODER_QUANTS)}")
    folder, out = Path(checkpoint).absolute(), Path(out).absolute()
    _check_out(out, overwrite=overwrite)
    tell(f"reading {folder}")
    tower_folder = None if tower is None else Path(tower).absolute()
    model = _read(folder, name or folder.resolve().name, known_families, tower_folder, template)
    arguments = {"decoder_quant": wanted.name, "encoder_quant": encoder_quant}
    arguments |= {"template": template} if template else {}
    record = provenance(model.checkpoint, source=source or model.resolved.spec.name, arguments=arguments)
    if model.tower is not None:
        record["tower"] = {"source": model.tower.folder.resolve().name, "source_files": model.tower.hashes()}
    require_free(out, _bytes_needed(model.mapped, wanted, encoder_quant))
    with commit_folder(out, may_replace=_is_bundle if overwrite else None) as building:
        tell(f"decoder to {wanted.name}")
        files: list[tuple[str, Role]] = [(DECODER, "decoder")]
        fidelity = {"decoder": _convert_decoder(building, model, wanted)}
        if model.resolved.vision:
            tell(f"encoder to {encoder_quant}")
            fidelity["encoder"] = _convert_encoder(building, model, model.resolved.vision, encoder_quant)
            files += [(ENCODER, "encoder"), (f"{ENCODER}.data", "encoder-data")]
        model.check_unchanged()
        manifest = Manifest(
            format=FORMAT,
            spec=model.resolved.spec,
            files=tuple(file_entry(building / name, role) for name, role in files),
            provenance={**record, "unused_tensors": list(model.mapped.unused)},
            fidelity=fidelity,
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
    found = opened.config.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []


def _bytes_needed(mapped: Mapped, wanted: Recipe, encoder_quant: str) -> int:
    """What the conversion writes at its peak, roughly: intermediate files included."""
    decoder = [source.tensor.bits for source in gguf_decoder.sources(mapped).values()]
    matrices = sum(bits.size for bits in decoder)
    stored = 0 if wanted.direct else sum(bits.nbytes for bits in decoder)
    encoder = sum(source.tensor.bits.size for source in [*mapped.tower.values(), *mapped.connector.values()])
    return stored + int(matrices * wanted.bits / 8) + encoder * (4 if encoder_quant == "fp32" else 5) + (16 << 20)


def _convert_decoder(building: Path, model: _Model, wanted: Recipe) -> dict[str, object]:
    """Write decoder.gguf, by way of a file at the checkpoint's own precision unless the recipe only rounds."""
    resolved, mapped, vocabulary = model.resolved, model.mapped, model.vocabulary
    general = general_keys(model.checkpoint, resolved.spec.name)
    tensors = gguf_decoder.plan(mapped, resolved, wanted)
    final, exact = building / DECODER, building / "decoder.exact.gguf"
    written = final if wanted.direct else exact
    gguf_decoder.write(written, resolved, vocabulary, tensors, wanted.file_type, general)
    check_header(written)  # before llama.cpp reads it, which ends the process on some values
    check_vocabulary(written, vocabulary.stops)
    if not wanted.direct:
        estimate = int(sum(math.prod(tensor.shape) for tensor in tensors) * wanted.bits / 8)
        quant.quantize(exact, final, wanted, size_estimate=estimate)
        exact.unlink()
        check_header(final)
    return verify.decoder_fidelity(final, gguf_decoder.exact_matrices(mapped), wanted)


def _convert_encoder(building: Path, model: _Model, vision: ResolvedVision, encoder_quant: str) -> dict[str, object]:
    """Write encoder.onnx and its data; the float32 graph is built as well when int8 has to be compared with it."""
    tower, connector = Reader(model.mapped.tower), Reader(model.mapped.connector)
    build_encoder(building / ENCODER, vision, tower, connector, encoder_quant)  # type: ignore[arg-type]
    for reader in (tower, connector):
        reader.check_all_used()
    if encoder_quant == "fp32":
        return {"against": "the checkpoint's weights", "relative_error": 0.0}
    exact = building / "exact.onnx"
    build_encoder(exact, vision, tower, connector, "fp32")
    cost = verify.encoder_fidelity(building / ENCODER, exact, vision.image, vision.encoder)
    exact.unlink()
    exact.with_name("exact.onnx.data").unlink()
    return cost


class Reader:
    """Weights by our own names, as float32; remembers which were asked for."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._unread = set(sources)

    def __call__(self, name: str) -> NDArray[np.float32]:
        self._unread.discard(name)
        return as_float32(self._sources[name].tensor)

    def check_all_used(self) -> None:
        """A declared weight that no layer function reads is our bug: the graph would compute something else."""
        assert not self._unread, f"weights without a place in the graph: {sorted(self._unread)}"

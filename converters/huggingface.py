"""A Hugging Face checkpoint as a source: its folder, understood as a model of one of the families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgevlm import families
from edgevlm.converters import decoder, forecast
from edgevlm.converters.checkpoint import Checkpoint, open_checkpoint, unchanged
from edgevlm.converters.decoder import DecoderPlan
from edgevlm.converters.mapping import Mapped, Source, map_tensors
from edgevlm.converters.prepared import EncoderWeight, EncoderWeights, Prepared
from edgevlm.converters.progress import Progress
from edgevlm.converters.provenance import general_keys, provenance
from edgevlm.converters.resolve import Resolved, resolve
from edgevlm.converters.tokenizer import Vocabulary, choose_template, read_tokens, read_vocabulary
from edgevlm.converters.weights import as_float32
from edgevlm.errors import CheckpointError, UsageError
from edgevlm.families.schema import Family


@dataclass(frozen=True)
class Model:
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

    def general_keys(self) -> dict[str, str]:
        """`general.*` keys of the decoder's file."""
        return general_keys(self.checkpoint, self.resolved.spec.name, self.family.origin)

    def check_unchanged(self) -> None:
        """Refuse a checkpoint of which a file has changed since it was opened.

        Raises:
            CheckpointError: `checkpoint.invalid`.
        """
        for opened in (self.checkpoint, self.tower):
            if opened is not None and not unchanged(opened):
                raise CheckpointError(
                    f"{opened.folder} changed while it was being read; convert it again", code="checkpoint.invalid"
                )


def read(
    folder: Path,
    name: str,
    known_families: tuple[Family, ...] | None = None,
    tower_folder: Path | None = None,
    template: str | None = None,
) -> Model:
    """Read a checkpoint; its weights stay on the disk.

    Args:
        folder: The checkpoint.
        name: What the model is called.
        known_families: Families to choose from; every one by default.
        tower_folder: The tower's own checkpoint, for a family whose tower lies apart.
        template: The name of one of the family's chat templates, for a checkpoint that carries none.

    Raises:
        FileError, CheckpointError: the checkpoint cannot be converted.
        UsageError: a tower or a template that does not go with it.
    """
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
    wrap = vision.wrap if vision else None
    wraps = wrap is not None and checkpoint.config.get(wrap[0]) is True
    vocabulary = read_vocabulary(
        checkpoint,
        tokens,
        rows=resolved.spec.decoder.vocab,
        ids={"bos": llama.bos, "eos": llama.eos, "padding": llama.pad},
        template=choose_template(family, set(tokens.texts.values()), template, wraps=wraps),
    )
    tensors = dict(checkpoint.tensors)
    if tower is not None:
        tensors |= {f"tower:{name}": tensor for name, tensor in tower.tensors.items()}
    return Model(checkpoint, resolved, vocabulary, map_tensors(family, resolved, tensors), tower, family)


def prepare(model: Model, planned: DecoderPlan, *, source: str | None) -> Prepared:
    """What `convert` needs of a checkpoint.

    Args:
        model: The checkpoint.
        planned: What becomes of its decoder.
        source: Where it comes from, for the record; the model's name by default.
    """
    resolved, mapped, origin = model.resolved, model.mapped, model.family.origin
    return Prepared(
        spec=resolved.spec,
        vision=resolved.vision,
        tower=encoder_weights(mapped.tower),
        connector=encoder_weights(mapped.connector),
        decoder_type=planned.recipe.name,
        reason=planned.reason,
        decoder_bytes=planned.peak_bytes,
        foresee_decoder=partial(forecast.of_decoder, mapped, resolved, planned),
        write_decoder=partial(_write_decoder, planned),
        compare_decoder=partial(_compare_decoder, planned),
        record=partial(_record, model, planned, source or resolved.spec.name),
        check_unchanged=model.check_unchanged,
        notices=(origin.notice,) if origin and origin.notice else (),
    )


def encoder_weights(sources: Mapping[str, Source]) -> EncoderWeights:
    """The weights of a tower or a connector, by our own names."""
    return {
        name: EncoderWeight(
            name=source.tensor.name,
            shape=source.tensor.shape,
            type=source.tensor.dtype,
            nbytes=source.tensor.bits.nbytes,
            read=partial(as_float32, source.tensor),
        )
        for name, source in sources.items()
    }


def _record(model: Model, planned: DecoderPlan, source: str) -> dict[str, Any]:
    record = provenance(model.checkpoint, source=source, arguments=dict(planned.arguments))
    record |= planned.record() | model.origin()
    if model.tower is not None:
        record["tower"] = {"source": model.tower.folder.resolve().name, "source_files": model.tower.hashes()}
    return {**record, "unused_tensors": list(model.mapped.unused)}


def _write_decoder(planned: DecoderPlan, out: Path, progress: Progress) -> dict[str, Any]:
    return decoder.write(out, planned, progress)


def _compare_decoder(planned: DecoderPlan, out: Path, progress: Progress) -> dict[str, Any]:
    return decoder.predictions(out, planned, progress)


def _open_tower(family: Family, checkpoint: Checkpoint, folder: Path | None) -> Checkpoint | None:
    """The checkpoint of the tower, exactly if the family has one."""
    separate = family.vision is not None and family.vision.separate
    if separate and folder is None:
        named = str(checkpoint.config.get("mm_vision_tower"))[:120]
        raise UsageError(f"the tower of this checkpoint lies apart, in {named!r}; download it and name it with --tower")
    if folder is not None and not separate:
        raise UsageError(f"a checkpoint of the family {family.name} holds its tower itself; leave --tower out")
    return None if folder is None else open_checkpoint(folder)


def _architectures(opened: Checkpoint) -> list[str]:
    """What config.json calls the model's class, in either of its two places."""
    found, classes = opened.config.get("architectures"), opened.config.get("auto_map")
    named = classes.get("AutoModelForCausalLM") if isinstance(classes, dict) else None
    if found is None and isinstance(named, str):
        found = [named.rpartition(".")[2]]
    return [str(name) for name in found] if isinstance(found, list) else []

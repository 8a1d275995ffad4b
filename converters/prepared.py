"""What `convert` needs of a source that has been understood, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.progress import Progress
from edgevlm.converters.resolve import ResolvedVision
from edgevlm.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class EncoderWeight:
    """A weight of a tower or a connector.

    Attributes:
        name, shape, type: In the source.
        nbytes: What it takes there.
        read: Gives its values, float32, finite.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    read: Callable[[], NDArray[np.float32]]


#: By our own names.
EncoderWeights = Mapping[str, EncoderWeight]


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What becomes of some tensors of a source, mostly of one.

    Attributes:
        file: Of the bundle; empty for what is left out.
        sources: Names in the source; none for what is computed.
        shape, source_type: Of the first of them.
        name, type: In the file.
    """

    file: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    source_type: str
    name: str
    type: str


@dataclass(frozen=True, kw_only=True)
class DecoderForecast:
    """What becomes of a decoder.

    Attributes:
        nbytes: Size of decoder.gguf.
        memory_bytes: What its largest step takes.
        fates: Of its tensors, and of those that are left out.
    """

    nbytes: int
    memory_bytes: int
    fates: tuple[Fate, ...]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A source, ready to be written as a bundle.

    Attributes:
        spec: What the runtime will obey.
        vision: The numbers of tower and connector; None if the model knows text only.
        tower, connector: Their weights.
        decoder_type: How the decoder's weights are stored, in a word.
        reason: Why so, if it was chosen; else empty.
        decoder_bytes: What writing the decoder takes on the disk, at most.
        foresee_decoder: Says what becomes of the decoder.
        write_decoder: Writes the decoder to a path that does not exist, and returns what that cost.
        compare_decoder: Compares a written decoder's predictions with the source's; empty if there is nothing to say.
        record: Gives the section `provenance`, whose `arguments` are still the decoder's alone; reads every file of
            the source.
        check_unchanged: Raises a CheckpointError if a file of the source is another one by now.
        notices: What the user should know, told once.
    """

    spec: ModelSpec
    vision: ResolvedVision | None
    tower: EncoderWeights
    connector: EncoderWeights
    decoder_type: str
    reason: str
    decoder_bytes: int
    foresee_decoder: Callable[[], DecoderForecast]
    write_decoder: Callable[[Path, Progress], dict[str, Any]]
    compare_decoder: Callable[[Path, Progress], dict[str, Any]]
    record: Callable[[], dict[str, Any]]
    check_unchanged: Callable[[], None]
    notices: tuple[str, ...] = ()

    @property
    def encoder_weights(self) -> int:
        """How many numbers tower and connector have."""
        return sum(int(np.prod(one.shape)) for part in (self.tower, self.connector) for one in part.values())

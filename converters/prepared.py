"""What `convert` needs of a source that has been understood, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.resolve import ResolvedVision
from edgevlm.spec import ModelSpec

Report = Callable[[str], None]
#: By our own name of a weight what gives its values as float32.
Values = Mapping[str, Callable[[], NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A source, ready to be written as a bundle.

    Attributes:
        spec: What the runtime will obey.
        vision: The numbers of tower and connector; None if the model knows text only.
        tower, connector: Their weights.
        encoder_weights: How many numbers those are.
        decoder_type: How the decoder's weights are stored, in a word.
        decoder_bytes: What writing the decoder takes on the disk, at most.
        write_decoder: Writes the decoder to a path that does not exist, and returns what that cost.
        record: The section `provenance`, whose `arguments` are still the decoder's alone.
        check_unchanged: Raises a CheckpointError if a file of the source is another one by now.
    """

    spec: ModelSpec
    vision: ResolvedVision | None
    tower: Values
    connector: Values
    encoder_weights: int
    decoder_type: str
    decoder_bytes: int
    write_decoder: Callable[[Path, Report], dict[str, Any]]
    record: dict[str, Any]
    check_unchanged: Callable[[], None]

"""Types for single matrices of the decoder, chosen by patterns of their names.

A pattern is a regular expression that is searched in a tensor's GGUF name, as in llama.cpp's `--tensor-type`; of
several that match a tensor the first decides. Patterns are resolved here, and llama.cpp gets whole names: its own
regular expressions are of another dialect, and one that matches nothing or a type that does not fit passes in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgevlm.converters import gguf_file
from edgevlm.errors import UsageError

#: Types that llama.cpp can make of any matrix, most precise first. (IQ2, IQ1 and IQ3_XXS need an importance matrix.)
TYPES = (
    "F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K",
    "IQ3_S", "Q2_K",
)  # fmt: skip


def resolve(patterns: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The type of each matrix that a pattern matches.

    Args:
        patterns: Pattern -> type, in order; types in either case.
        shapes: Shape of each matrix of the model by GGUF name, rows last.

    Returns:
        GGUF name -> ggml type.

    Raises:
        UsageError: an unknown type, a broken pattern, one that decides nothing, or a type whose blocks do not divide
            the rows of a matrix that it was chosen for.
    """
    chosen: dict[str, str] = {}
    for pattern, kind in patterns.items():
        wanted = f"decoder type {pattern}={kind}"
        if not isinstance(pattern, str) or not isinstance(kind, str) or kind.upper() not in TYPES:
            raise UsageError(f"{wanted}: the type must be one of {', '.join(TYPES).lower()}")
        try:
            matches = [name for name in shapes if re.search(pattern, name)]
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f"{wanted}: the pattern is not a regular expression ({error})") from error
        if not pattern or not matches:
            raise UsageError(f"{wanted}: no matrix has such a name; there are {_examples(shapes)}")
        fresh = [name for name in matches if name not in chosen]
        if not fresh:
            raise UsageError(f"{wanted}: earlier patterns decide all its {len(matches)} matrices; put it before them")
        block = gguf_file.block_size(kind.upper())
        odd = next((name for name in fresh if shapes[name][-1] % block), None)
        if odd:
            raise UsageError(
                f"{wanted}: {odd} has rows of {shapes[odd][-1]}, the type needs a multiple of {block}; "
                f"choose one with smaller blocks, such as q8_0 or f16"
            )
        chosen |= dict.fromkeys(fresh, kind.upper())
    return chosen


def _examples(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A name of each kind, the block's number left open."""
    kinds = list(dict.fromkeys(re.sub(r"^blk\.\d+\.", "blk.N.", name) for name in shapes))
    return ", ".join(kinds)

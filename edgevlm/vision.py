"""Pictures to embeddings, each computed once: a cache in memory, and one on disk if there is a folder for it.

A picture is known by its pixels, its embeddings by the pixels and everything that turns them into numbers: the
preprocessing, the encoder's files with the connector in them, and the libraries' versions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevlm import spec as specs
from edgevlm.answer import Timings
from edgevlm.budget import Budget, reduce_rows
from edgevlm.bundle import Bundle
from edgevlm.encoder import Encoder
from edgevlm.errors import CapabilityError
from edgevlm.image import load_image, read_image
from edgevlm.kept import Kept
from edgevlm.layout import ImageLayout, Rows, image_layout
from edgevlm.native import trim
from edgevlm.preprocess import preprocess_batches
from edgevlm.splice import Plan, PlannedImage
from edgevlm.threads import Threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    ImageSource = str | os.PathLike[str] | bytes | Image | NDArray[np.uint8]

#: Sources whose pixels' key is remembered, so that the next question about the same file need not decode it.
_KNOWN_SOURCES = 256
_DIGEST_BYTES = 16


@dataclass(eq=False)
class Picture:
    """A picture of the prompt: `key` names what the decoder is fed for it, `layout` says where that goes.

    `known_as` and `n_rows` are the key and the number of all its embeddings, of which a budget may leave fewer.
    `source` is a file's content, with what messages call it, or an array; never a path, because what a path leads to
    may change. `image_HWC` are its pixels as long as somebody may need them.
    """

    source: tuple[bytes, str] | NDArray[np.uint8]
    key: str
    layout: ImageLayout
    known_as: str
    n_rows: int
    image_HWC: NDArray[np.uint8] | None = None

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3]; decoded once more if nobody kept them."""
        if self.image_HWC is not None:
            return self.image_HWC
        return load_image(self.source[0], name=self.source[1]) if isinstance(self.source, tuple) else self.source


class Vision:
    """The half of a model that sees.

    Args:
        bundle: A bundle that has an encoder.
        open_encoder: Loads the encoder; called with `threads` at the first picture that no cache knows, and again after
            `release`.
        cache_bytes: Most bytes of embeddings to hold in memory; the least recently used go first.
        kept: The cache on disk, or None.
        budget: What is left of each picture's embeddings, or None for all. Caches keep all.
        make_room: Called before the encoder is loaded, if there is no room for it beside the decoder; `done` then gives
            it back.
        threads: For the encoder; None is the default.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_encoder: Callable[..., Encoder],
        *,
        cache_bytes: int,
        kept: Kept | None = None,
        budget: Budget | None = None,
        make_room: Callable[[], None] | None = None,
        threads: Threads | None = None,
    ) -> None:
        assert bundle.spec.image is not None
        self.image_spec = bundle.spec.image
        self._spec = bundle.spec
        self._open_encoder = open_encoder
        self._encoder: Encoder | None = None
        self._identity = _identity(bundle)
        self._embeds = Embeddings(cache_bytes)
        self._kept = kept
        self._budget = budget
        self._make_room = make_room
        self._threads = threads
        self._sources: OrderedDict[str, tuple[str, ImageLayout, str, int]] = OrderedDict()

    def load(self) -> Encoder:
        """The encoder, loaded if it is not.

        Raises:
            BackendError, DependencyError: it cannot be loaded.
        """
        if self._encoder is None:
            if self._make_room:
                self._make_room()
            self._encoder = self._open_encoder(threads=self._threads)
        return self._encoder

    def use_threads(self, threads: Threads) -> None:
        """Load the encoder with these numbers of threads from now on."""
        if threads != self._threads:
            self._threads = threads
            self.release()

    def release(self) -> None:
        """Give the encoder's memory back; embeddings stay."""
        if self._encoder is not None:
            self._encoder = None
            trim()

    def done(self) -> None:
        """The pictures of a question are encoded: release an encoder that takes turns with the decoder."""
        if self._make_room:
            self.release()

    def forget(self) -> None:
        """Forget all pictures."""
        self._embeds.clear()
        self._sources.clear()

    def close(self) -> None:
        """Give everything back."""
        self.release()
        self.forget()

    @property
    def cached(self) -> tuple[int, int]:
        """(pictures, bytes) whose embeddings are in memory."""
        return len(self._embeds), self._embeds.nbytes

    def look(self, source: ImageSource, timings: Timings) -> Picture:
        """Find out which picture this is; a file that was seen before is not decoded again.

        Raises:
            FileError, ImageError: as `load_image` does.
            UsageError: the budget has fewer tokens than the picture has tiles.
        """
        import numpy as np

        with timings.measure("decode_image_s"):
            if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
                # A copy: a camera's next frame goes into the same memory, before this one is encoded.
                image_HWC = np.array(load_image(source))
                return Picture(image_HWC, *self._known(image_HWC))
            content, name = read_image(source)
            seen = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
            if seen in self._sources:
                self._sources.move_to_end(seen)
                return Picture((content, name), *self._sources[seen])
            image_HWC = load_image(content, name=name)
            self._sources[seen] = self._known(image_HWC)
            if len(self._sources) > _KNOWN_SOURCES:
                self._sources.popitem(last=False)
            return Picture((content, name), *self._sources[seen], image_HWC)

    def embed(self, picture: Picture, timings: Timings) -> NDArray[np.float32]:
        """What the decoder is fed for a picture, float32 [n, n_embd], read-only.

        Raises:
            BackendError: the encoder failed.
        """
        rows_ND = self._all_rows(picture, timings)
        return reduce_rows(rows_ND, self._spec, self._budget) if self._budget else rows_ND

    def _all_rows(self, picture: Picture, timings: Timings) -> NDArray[np.float32]:
        """The picture's embeddings, float32 [n_rows, n_embd], read-only: from a cache, or else computed."""
        found = self._embeds.get(picture.known_as)
        if found is not None:
            picture.image_HWC = None
        else:
            found = self._from_disk(picture) if self._kept else None
            if found is None:
                found = self._encode(picture, timings)
                if self._kept:
                    self._kept.put_embeds(picture.known_as, self._identity, found)
            self._embeds.put(picture.known_as, found)
        return found

    def pixels(self, source: ImageSource) -> list[NDArray[np.float32]]:
        """The encoder's input: float32 [T, 3, H, W] for each size of tiles."""
        return preprocess_batches(load_image(source), self.image_spec)

    def _encode(self, picture: Picture, timings: Timings) -> NDArray[np.float32]:
        import numpy as np

        with timings.measure("decode_image_s"):
            image_HWC = picture.pixels()
        with timings.measure("preprocess_s"):
            batches = preprocess_batches(image_HWC, self.image_spec)
        del image_HWC
        picture.image_HWC = None  # 36 MB of a camera's picture, while the encoder runs
        with timings.measure("load_s"):
            encoder = self.load()
        with timings.measure("encode_s"):
            embeds_TND = np.concatenate([encoder.encode_each(tiles_TCHW) for tiles_TCHW in batches])
        rows_ND: NDArray[np.float32] = embeds_TND.reshape(-1, embeds_TND.shape[-1])
        if len(rows_ND) != picture.n_rows:
            raise ValueError(f"the picture has {len(rows_ND)} rows, {picture.n_rows} were planned")
        rows_ND.flags.writeable = False  # it is shared by everybody who asks for this picture
        return rows_ND

    def _from_disk(self, picture: Picture) -> NDArray[np.float32] | None:
        assert self._kept is not None
        assert self._spec.encoder is not None
        shape = (picture.n_rows, self._spec.encoder.n_embd)
        return self._kept.embeds(picture.known_as, self._identity, shape)

    def _known(self, image_HWC: NDArray[np.uint8]) -> tuple[str, ImageLayout, str, int]:
        """What a `Picture` of these pixels says besides them: `key`, `layout`, `known_as`, `n_rows`."""
        height, width = image_HWC.shape[:2]
        layout = image_layout(height, width, self._spec, self._budget)
        n_rows = _n_rows(image_layout(height, width, self._spec))
        digest = hashlib.blake2b(self._identity.encode(), digest_size=_DIGEST_BYTES)
        digest.update(repr(image_HWC.shape).encode())
        for start in range(0, len(image_HWC), 256):  # Pillow leaves pixels four bytes apart; a copy of all is large
            digest.update(image_HWC[start : start + 256].tobytes())
        known_as = key = digest.hexdigest()
        if self._budget and _n_rows(layout) < n_rows:
            key = self._budget.key(known_as)
        return key, layout, known_as, n_rows


class Embeddings:
    """Embeddings in memory, at most `limit_bytes` of them; the least recently used are dropped first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self._rows: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> NDArray[np.float32] | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: str, rows_ND: NDArray[np.float32]) -> None:
        """Hold rows [n, n_embd]; what is larger than the whole cache is not held."""
        if rows_ND.nbytes > self.limit_bytes or key in self._rows:
            return
        self._rows[key] = rows_ND
        self.nbytes += rows_ND.nbytes
        while self.nbytes > self.limit_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def clear(self) -> None:
        self._rows.clear()
        self.nbytes = 0


def embeds_of(
    eyes: Callable[[], Vision], left: Plan, pictures: Sequence[Picture], timings: Timings
) -> dict[int, tuple[str, NDArray[np.float32]]]:
    """Key and embeddings of each picture that is still to be decoded, by its number; `eyes` refuses a text model.

    Raises:
        BackendError: the encoder failed.
        CapabilityError: the model has none.
    """
    wanted = sorted({segment.index for segment in left if isinstance(segment, PlannedImage)})
    try:
        return {index: (pictures[index].key, eyes().embed(pictures[index], timings)) for index in wanted}
    finally:
        if wanted:
            eyes().done()


def no_vision(name: str) -> CapabilityError:
    """The error for a picture that was shown to a text model."""
    return CapabilityError(
        f"{name} is a text-only model and cannot see pictures; ask without them or choose a vision model",
        code="capability.no_vision",
    )


def _n_rows(layout: ImageLayout) -> int:
    return sum(part.count for part in layout if isinstance(part, Rows))


def _identity(bundle: Bundle) -> str:
    """Everything that turns pixels into embeddings, as a digest."""
    spec = bundle.spec
    assert spec.image is not None
    assert spec.encoder is not None
    parts = {
        "image": specs.to_json(spec.image),
        "encoder": specs.to_json(spec.encoder),
        "files": {entry.role: entry.sha256 for entry in bundle.manifest.files if entry.role != "decoder"},
        "versions": {name: importlib.metadata.version(name) for name in ("edgevlm", "onnxruntime", "pillow")},
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()

"""Pixels to embeddings: the vision tower and connector as one ONNX graph. The only import of `onnxruntime`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm import kernels
from edgevlm.ending import check_not_ending, native_lock
from edgevlm.errors import BackendError, DependencyError
from edgevlm.spec import EncoderSpec
from edgevlm.threads import ThreadsLike, resolve_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INPUT_NAME = "pixels_TCHW"
OUTPUT_NAME = "embeds_TND"


class Encoder:
    """A loaded encoder graph.

    Args:
        path: The ONNX file; its weights lie beside it.
        spec: Sizes that the output must have.
        threads: Threads of the intra-op pool; None takes every core that there is for us.
        repack: Whether ONNX Runtime makes copies of the weights in the layout of its kernels. Without them the weights
            stay pages of the file, which the system may drop; products take somewhat longer.

    Raises:
        DependencyError: onnxruntime is missing, or it does not take our operators.
        KernelError: `EDGEVLM_KERNELS` names a target that cannot run.
        BackendError: the graph cannot be loaded.
        UsageError: `threads` is outside its range.
    """

    def __init__(
        self, path: str | os.PathLike[str], spec: EncoderSpec, *, threads: ThreadsLike = None, repack: bool = True
    ) -> None:
        self.spec = spec
        self._busy = native_lock()
        with self._busy:
            check_not_ending()
            self._session = _open_session(Path(path), resolve_threads(threads).encode, repack)

    def encode(self, tiles_TCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode tiles.

        Args:
            tiles_TCHW: float32 [T, 3, height_px, width_px], normalised; of any size for `siglip_strip`.

        Returns:
            `embeds_TND`, float32 [T, n_tokens, n_embd]: what the decoder is fed.

        Raises:
            BackendError: the graph failed or gave another shape or non-finite numbers.
        """
        import numpy as np

        (embeds_TND,) = self._run([OUTPUT_NAME], tiles_TCHW)
        expected = (len(tiles_TCHW), self.spec.n_tokens, self.spec.n_embd)
        if embeds_TND.shape != expected or embeds_TND.dtype != np.float32:
            raise BackendError(
                f"the encoder gave {embeds_TND.dtype} {embeds_TND.shape}, the bundle promises float32 {expected}; "
                "convert the checkpoint again",
                code="backend.failed",
            )
        # llama.cpp does not check rows: a NaN would spread through the whole context unnoticed.
        if not np.isfinite(embeds_TND).all():
            raise BackendError("the encoder gave numbers that are not finite", code="backend.failed")
        return embeds_TND  # type: ignore[no-any-return]

    def outputs(self, tiles_TCHW: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """All outputs of the graph by name; a converter's graphs have more than the embeddings.

        Raises:
            BackendError: the graph failed.
        """
        values = self._run(None, tiles_TCHW)
        # Copies: the values lie in ONNX Runtime's arena, and a small one would keep all of it when the session is gone.
        names = (output.name for output in self._session.get_outputs())
        return {name: value.copy() for name, value in zip(names, values, strict=True)}

    def encode_each(self, tiles_TCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode tiles one after the other; arguments, result and errors are those of `encode`.

        This is how pictures are encoded. What int8 activations lose does not depend on the neighbours, as all that is
        encoded at once shares one scale; and memory does not grow with the tiles: the attention weights of SigLIP-B/16
        at 512 pixels take 50 MB for each. Tiles never see each other, so nothing else changes.
        """
        import numpy as np

        embeds_TND = np.empty((len(tiles_TCHW), self.spec.n_tokens, self.spec.n_embd), dtype=np.float32)
        for i in range(len(tiles_TCHW)):
            embeds_TND[i : i + 1] = self.encode(tiles_TCHW[i : i + 1])
        return embeds_TND

    def _run(self, names: list[str] | None, tiles_TCHW: NDArray[np.float32]) -> list[Any]:
        with self._busy:
            check_not_ending()
            try:
                return self._session.run(names, {INPUT_NAME: tiles_TCHW})  # type: ignore[no-any-return]
            except Exception as error:  # onnxruntime raises its own pybind classes, without a common base
                raise BackendError(
                    f"the encoder failed on {tiles_TCHW.shape}: {error}", code="backend.failed"
                ) from error


def _open_session(path: Path, threads: int, repack: bool) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DependencyError(
            f"onnxruntime cannot be loaded ({error}); install it with `pip install onnxruntime`",
            code="dependency.missing",
        ) from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a vision tower is a chain
    # A pattern lays a run's memory out anew while the first run's is still held: 38 MB more from the second picture of
    # SigLIP-B/16-512 on, and no faster.
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # fatal only: failures become exceptions, which we translate
    # As the graph is written. By default what only leads to an output comes last, and what it reads is kept until then:
    # the inputs of all products, in the graph that a converter observes.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # Idle threads that spin would take the cores from the decoder, which runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not repack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    library = kernels.operators_library()
    try:
        options.register_custom_ops_library(library)
    except Exception as error:  # as above: no common base class
        raise DependencyError(
            f"onnxruntime {ort.__version__} cannot load the operators of {library} ({error}); "
            "install edgevlm again, and onnxruntime 1.28.3 or later",
            code="dependency.version",
        ) from error
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above: no common base class
        raise BackendError(f"onnxruntime cannot load {path}: {error}", code="backend.load") from error

"""The stages in order, with a timing for each: bytes -> pixels -> embeddings -> segments -> tokens -> text."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgevlm import prompt as prompts
from edgevlm.answer import Answer, Timings, Usage
from edgevlm.bundle import Bundle
from edgevlm.decoder import Decoder
from edgevlm.encoder import Encoder
from edgevlm.errors import CapabilityError, UsageError
from edgevlm.generate import Generation
from edgevlm.image import load_image
from edgevlm.layout import ImageLayout, image_layout
from edgevlm.machine import peak_rss_bytes
from edgevlm.options import GenerateOptions
from edgevlm.preprocess import preprocess_batches
from edgevlm.spec import ImageSpec, PromptSpec
from edgevlm.splice import Plan, PlannedImage, plan, prompt_tokens, splice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    ImageSource = str | os.PathLike[str] | bytes | Image | NDArray[np.uint8]


class Stream:
    """An answer on its way: iterate over its pieces of text, once; `answer` is set when they are exhausted.

    Leaving the loop early ends the generation.
    """

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self.answer: Answer | None = None
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.answer = self.answer or end.value
            raise StopIteration from None


class Model:
    """A loaded model, made by `edgevlm.load()`. Use it as a context manager, or call `close()`.

    It answers one question at a time and must not be used from several threads at once.
    """

    def __init__(self, name: str, decoder: Decoder, bundle: Bundle | None, encoder: Encoder | None) -> None:
        self.name = name
        self.spec = bundle.spec if bundle else None
        self.load_s = 0.0
        self._decoder = decoder
        self._encoder = encoder
        self._format = _prompt_format(name, decoder, self.spec.prompt if self.spec else PromptSpec())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory. Closing twice is harmless."""
        self._decoder.close()
        self._encoder = None

    def ask(
        self, prompt: str, images: Sequence[ImageSource] = (), *, system: str | None = None, **options: Any
    ) -> Answer:
        """Answer one question about any number of pictures.

        Args:
            prompt: The question; pictures come before it.
            images: Paths, encoded bytes, PIL images or uint8 arrays (HW or HWC), in order.
            system: A system message.
            options: Fields of `GenerateOptions`: `max_tokens`, `temperature`, `stop` and so on.

        Raises:
            EdgeVLMError: one of the classes in `edgevlm.errors`.
        """
        stream = self.stream(prompt, images, system=system, **options)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), *, system: str | None = None, **options: Any
    ) -> Stream:
        """As `ask`, but yields the answer's text piece by piece; arguments are checked before the first piece."""
        self._decoder.check_open()
        for name, text in (("prompt", prompt), ("system", "" if system is None else system)):
            if not isinstance(text, str):
                raise UsageError(f"{name} must be a text, found {type(text).__name__}")
        if not isinstance(images, (list, tuple)):
            raise UsageError(f"images must be a list, found {type(images).__name__}; write images=[picture]")
        if images:
            self._vision()
        try:
            checked = GenerateOptions(**options)
        except TypeError as error:
            raise UsageError(str(error).replace("GenerateOptions.__init__()", "ask()")) from None
        return Stream(self._run(prompt, images, system, checked))

    def preprocess(self, image: ImageSource) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """The tensor that the encoder would be fed: float32 [T, 3, height_px, width_px].

        For a model that cuts pictures into slices of their own shape (`spec.image.policy` is `slices`) a list: the
        whole picture, and the slices if there are any, float32 [T, 3, H, W] each.
        """
        spec, _ = self._vision()
        batches = self._pixels(self._picture(image, Timings()), Timings())
        return batches if spec.policy == "slices" else batches[0]

    def embed_image(self, image: ImageSource) -> NDArray[np.float32]:
        """What the decoder would be fed for a picture: float32 [n_tokens, n_embd]."""
        self._vision()
        return self._embed(self._picture(image, Timings()), Timings())

    # ---- the stages

    def _run(
        self, prompt: str, images: Sequence[ImageSource], system: str | None, options: GenerateOptions
    ) -> Generator[str, None, Answer]:
        timings = Timings(load_s=self.load_s)
        started = time.perf_counter()
        pictures = [self._picture(image, timings) for image in images]
        # Counted before anything is encoded: a prompt that does not fit costs next to nothing.
        segments = self._plan(prompt, [self._layout(image_HWC) for image_HWC in pictures], system)
        embeds = [self._embed(image_HWC, timings) for image_HWC in pictures]
        with timings.measure("prefill_s"):
            self._decoder.prefill(splice(segments, embeds))
        usage_prompt = self._decoder.n_past
        generation = Generation(self._decoder, options, prompt_tokens(segments))
        pieces = []
        for piece in generation:
            pieces.append(piece)
            yield piece
        timings.first_token_s = generation.first_token_at - started
        timings.generate_s = generation.seconds
        timings.tokens_per_s = generation.tokens_per_s
        return Answer(
            text="".join(pieces),
            finish_reason=generation.finish_reason,
            model=self.name,
            usage=Usage(
                prompt_tokens=usage_prompt,
                image_tokens=sum(map(len, embeds)),
                completion_tokens=len(generation.tokens),
            ),
            timings=timings,
            peak_rss_bytes=peak_rss_bytes(),
            logprobs=None if options.logprobs is None else tuple(generation.logprobs),
        )

    def _plan(self, prompt: str, layouts: Sequence[ImageLayout], system: str | None) -> Plan:
        messages = prompts.user_messages(prompt, len(layouts), system)
        pieces = prompts.render(messages, self._format)
        segments = plan(pieces, self._decoder.vocabulary.tokenize, bos=self._format.bos, layouts=layouts)
        if not segments:
            raise CapabilityError(
                f"the chat template of {self.name} makes nothing of this prompt", code="capability.no_template"
            )
        self._decoder.reset()
        n_image_rows = sum(len(segment) for segment in segments if isinstance(segment, PlannedImage))
        self._decoder.check_room(sum(map(len, segments)), of_images=n_image_rows)
        return segments

    def _picture(self, image: ImageSource, timings: Timings) -> NDArray[np.uint8]:
        with timings.measure("decode_image_s"):
            return load_image(image)

    def _layout(self, image_HWC: NDArray[np.uint8]) -> ImageLayout:
        assert self.spec is not None
        return image_layout(image_HWC.shape[0], image_HWC.shape[1], self.spec)

    def _pixels(self, image_HWC: NDArray[np.uint8], timings: Timings) -> list[NDArray[np.float32]]:
        spec, _ = self._vision()
        with timings.measure("preprocess_s"):
            return preprocess_batches(image_HWC, spec)

    def _embed(self, image_HWC: NDArray[np.uint8], timings: Timings) -> NDArray[np.float32]:
        import numpy as np

        _, encoder = self._vision()
        batches = self._pixels(image_HWC, timings)
        with timings.measure("encode_s"):
            embeds_TND = np.concatenate([encoder.encode_each(tiles_TCHW) for tiles_TCHW in batches])
        return embeds_TND.reshape(-1, embeds_TND.shape[-1])

    def _vision(self) -> tuple[ImageSpec, Encoder]:
        self._decoder.check_open()
        if self.spec is None or self.spec.image is None or self._encoder is None:
            raise CapabilityError(
                f"{self.name} is a text-only model and cannot see pictures; ask without them or choose a vision model",
                code="capability.no_vision",
            )
        return self.spec.image, self._encoder


def _prompt_format(name: str, decoder: Decoder, literals: PromptSpec) -> prompts.PromptFormat:
    template = decoder.header.chat_template
    if template is None:
        raise CapabilityError(
            f"{name} carries no chat template; use a model that was trained for conversation",
            code="capability.no_template",
        )
    return prompts.PromptFormat(
        template=template,
        bos=decoder.header.token("bos"),
        eos=decoder.header.token("eos"),
        control_tokens=decoder.vocabulary.control_tokens,
        image_token=literals.image_token,
        between_parts=literals.between_parts,
    )

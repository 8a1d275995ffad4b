"""Text and tokens: the vocabulary of a GGUF model, asked through llama.cpp's C functions."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from edgevlm.errors import UsageError
from edgevlm.gguf import GGUFHeader

#: llama.cpp splits most vocabularies' text by std::regex, which recurses once per character of a run and overflows the
#: stack near 26,000 characters; these pre-tokenizers have hand-written splitters (`unicode.cpp`).
_SAFE_PRE = frozenset({"llama3", "llama-v3", "llama-bpe", "gpt-2", "gpt2", "qwen2"})
_LONGEST_RUN = 8192


class Vocabulary:
    """The tokens of a loaded model; it lives as long as the model.

    Args:
        llama: The module of C functions.
        model: The loaded model.
        header: What its file says.
        using: Entered around native functions: raises when the model is closed, and keeps it from being closed. They
            would read freed memory.
    """

    def __init__(
        self, llama: Any, model: Any, header: GGUFHeader, using: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._llama = llama
        self._vocab = llama.llama_model_get_vocab(model)
        self._header = header
        self._using = using
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.control_tokens = self._control_tokens()
        #: Tokens that no answer may hold; see `ban`.
        self.banned: frozenset[int] = frozenset()
        self._end_tokens: list[int] | None = None

    def tokenize(self, text: str, add_bos: bool, parse_special: bool) -> list[int]:
        """Token ids of a text. `add_bos` obeys the vocabulary's own rule whether it has one at all.

        Raises:
            UsageError: a run of one kind of character is too long for this vocabulary's splitter.
        """
        self._check_runs(text)
        raw = text.encode("utf-8")
        capacity = len(raw) + 8
        while True:
            tokens = (ctypes.c_int32 * capacity)()
            with self._using():
                count = self._llama.llama_tokenize(self._vocab, raw, len(raw), tokens, capacity, add_bos, parse_special)
            if count >= 0:
                return tokens[:count]
            capacity = -count

    def _check_runs(self, text: str) -> None:
        if len(text) <= _LONGEST_RUN or self._header.metadata["tokenizer.ggml.model"] == "llama":
            return
        if self._header.metadata.get("tokenizer.ggml.pre") in _SAFE_PRE:
            return
        # Combining marks belong to letters in some splitters, so whatever is not white space counts as one kind.
        longest = max(len(run.group()) for run in re.finditer(r"\s+|\S+", text))
        if longest > _LONGEST_RUN:
            raise UsageError(
                f"the prompt has a run of {longest} characters without {'a word' if text.isspace() else 'a space'}; "
                f"this model's tokenizer takes {_LONGEST_RUN}; insert spaces or shorten it"
            )

    def _control_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that steer the model: user text must never become one of them.

        llama.cpp decides this by text as well as by the file's token types (`llama-vocab.cpp`), so it is asked; only
        about tokens that may qualify, since a vocabulary has a hundred thousand.
        """
        llama, metadata = self._llama, self._header.metadata
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata.get("tokenizer.ggml.token_type", (1,) * len(tokens))
        candidates = (
            index
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind not in (1, 6) or (token[0] in "<[" and token[-1] in ">]")
        )
        return tuple(
            tokens[index]
            for index in candidates
            if llama.llama_vocab_get_attr(self._vocab, index) & llama.LLAMA_TOKEN_ATTR_CONTROL
            or llama.llama_vocab_is_eog(self._vocab, index)
        )

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for control tokens. They need not be whole characters."""
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token {token} is outside the vocabulary of {self.n_vocab}")
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            with self._using():
                count = self._llama.llama_token_to_piece(self._vocab, token, buffer, capacity, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            capacity = -count

    def ban(self, texts: Iterable[str]) -> None:
        """Never draw the control tokens of these texts, except those that end a turn.

        A picture's place holders are in the vocabulary and mean nothing in an answer; they have no bytes, so one would
        not be seen, but the model would see it from then on.
        """
        control = set(self.control_tokens)
        ids = {token for text in texts for token in self.tokenize(text, False, True) if self._text(token) in control}
        self.banned = frozenset(token for token in ids if not self.is_end(token))

    def _text(self, token: int) -> str:
        """What the file calls a token; of a control token its spelling."""
        return str(self._header.metadata["tokenizer.ggml.tokens"][token])

    def end_tokens(self) -> list[int]:
        """All tokens for which `is_end` holds, in order."""
        if self._end_tokens is None:
            is_end = self._llama.llama_vocab_is_eog
            with self._using():
                self._end_tokens = [token for token in range(self.n_vocab) if is_end(self._vocab, token)]
        return self._end_tokens

    def is_end(self, token: int) -> bool:
        """Whether the model ends its turn with this token (end of text, turn or message)."""
        with self._using():
            return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

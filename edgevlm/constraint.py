"""A grammar over tokens: which may come next, and which must."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from typing import TYPE_CHECKING

from edgevlm.schema import Format
from edgevlm.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Forced bytes that are tokenized at once; some tokenizers take no longer runs.
_MOST_FORCED = 4096
#: First byte of a token that has none.
_NO_BYTE = 256


class Constraint:
    """What an answer may be, and how far it is; a rule for the sampler.

    Control tokens may never come, the tokens that end a turn only where the document is whole.
    """

    def __init__(self, form: Format, vocabulary: Vocabulary) -> None:
        self._state = form.start()
        self._vocabulary = vocabulary
        self._table: _Table | None = None

    @property
    def complete(self) -> bool:
        """Whether the document is whole and cannot go on."""
        return not self._state.next_bytes

    @property
    def may_end(self) -> bool:
        """Whether the document is whole, even if it can go on: 12 may become 123."""
        return self._state.may_end

    def take(self, piece: bytes) -> None:
        """Go on by the bytes of a token that was allowed."""
        following = self._state.advance(piece)
        assert following is not None
        self._state = following

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""
        if self._vocabulary.is_end(token):
            return self._state.may_end
        piece = self._vocabulary.piece(token)
        return bool(piece) and self._state.advance(piece) is not None

    def possible(self) -> NDArray[np.bool_]:
        """bool [n_vocab]: False for tokens whose first byte may not come next."""
        import numpy as np

        table = self._tables()
        bits = self._state.next_bytes.to_bytes(33, "little")  # the bit of _NO_BYTE stays 0
        fits = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(bool)
        mask_V: NDArray[np.bool_] = fits.take(table.first_bytes_V)
        mask_V[self._vocabulary.end_tokens()] = self._state.may_end
        return mask_V

    def allowed(self) -> NDArray[np.bool_]:
        """bool [n_vocab]: exactly the tokens that may come next; by walking those that begin alike together."""
        import numpy as np

        table = self._tables()
        mask_V = np.zeros(len(table.first_bytes_V), bool)
        left = [(0, len(table.pieces), 0, self._state)]
        while left:
            start, stop, depth, state = left.pop()
            while start < stop and len(table.pieces[start]) == depth:  # the shortest come first
                mask_V[table.tokens[start]] = depth > 0
                start += 1
            while start < stop:
                prefix = table.pieces[start][: depth + 1]
                following = state.advance(prefix[-1:])
                beyond = prefix[:-1] + bytes([prefix[-1] + 1]) if prefix[-1] < 0xFF else None
                end = bisect_left(table.pieces, beyond, start, stop) if beyond else stop
                if following is not None:
                    left.append((start, end, depth + 1, following))
                start = end
        mask_V[self._vocabulary.end_tokens()] = self._state.may_end
        return mask_V

    def forced(self) -> list[int]:
        """Tokens of the bytes that must come next, if there are any.

        A space at their end is left to the model: in most vocabularies it belongs to the next word, and a token that
        only holds the space is not what the model has learnt to go on from.
        """
        forced = self._state.forced()[:_MOST_FORCED]
        after = self._state.advance(forced)
        if forced.endswith(b" ") and after is not None and not after.may_end:
            forced = forced[:-1]
        try:
            text = forced.decode("utf-8")
        except UnicodeDecodeError as error:
            # Alternatives may part, and tokens end, within a character: whole ones only.
            text = forced[: error.start].decode("utf-8")
        if not text:
            return []
        forced = text.encode()
        tokens = self._vocabulary.tokenize(text, False, False)
        if b"".join(map(self._vocabulary.piece, tokens)) == forced:
            return tokens
        return self._tables().split(forced)  # a tokenizer that puts a space before every text

    def _tables(self) -> _Table:
        if self._table is None:
            if self._vocabulary not in _tables:
                _tables[self._vocabulary] = _Table(self._vocabulary)
            self._table = _tables[self._vocabulary]
        return self._table


class _Table:
    """The bytes of all tokens, in order; made when a token is refused for the first time.

    Attributes:
        pieces: Bytes of each token that has some, sorted.
        tokens: The tokens, in the same order.
        first_bytes_V: intp [n_vocab], the type that numpy indexes with.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        import numpy as np

        found = [vocabulary.piece(token) for token in range(vocabulary.n_vocab)]
        ends = set(vocabulary.end_tokens())
        ordered = sorted((piece, token) for token, piece in enumerate(found) if piece and token not in ends)
        self.pieces = [piece for piece, _ in ordered]
        self.tokens = [token for _, token in ordered]
        self.first_bytes_V = np.array([piece[0] if piece else _NO_BYTE for piece in found], np.intp)
        self._by_piece: dict[bytes, int] = {}
        for piece, token in reversed(ordered):
            self._by_piece[piece] = token  # of equals, the smallest token
        self._longest = max(map(len, self.pieces), default=0)

    def split(self, data: bytes) -> list[int]:
        """Tokens of some bytes, each as long as possible; none if the vocabulary cannot spell them."""
        tokens, at = [], 0
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                token = self._by_piece.get(data[at : at + length])
                if token is not None:
                    break
            else:
                return []
            tokens.append(token)
            at += length
        return tokens


_tables: weakref.WeakKeyDictionary[Vocabulary, _Table] = weakref.WeakKeyDictionary()

"""What quantization did to a decoder's answers: its predictions beside those of the unquantized file, on a fixed text.

Both files run in llama.cpp side by side, a few rows of logits at a time, with their weights mapped and not copied: the
comparison takes some 300 MB beyond the mapped files however large the model is. Nothing in it depends on time or on the
number of threads (each number is summed by one of them).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.decoder import Decoder
from edgevlm.errors import UsageError
from edgevlm.gguf import read_header

#: Own text: prose, dialogue, instructions, tables, code and mathematics, in eleven languages.
TEXT = Path(__file__).parent / "sample.txt"
TOKENS = 2048  # compared by default: for a model of 1B some minutes on two cores
_MOST_TOKENS = 1 << 16
WINDOW = 512  # positions before the context is forgotten: as much as a picture and a question take
_LOGITS = 1 << 24  # of each model in memory at once, as numbers of 4 bytes


def check_tokens(n_tokens: int) -> None:
    """Refuse a number of tokens that cannot be compared.

    Raises:
        UsageError: not between 0 (compare nothing) and 65536.
    """
    if type(n_tokens) is not int or not 0 <= n_tokens <= _MOST_TOKENS:
        raise UsageError(f"fidelity_tokens must be between 0 and {_MOST_TOKENS}, found {n_tokens!r}")


def compare(
    exact: Path,
    found: Path,
    *,
    n_tokens: int = TOKENS,
    threads: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Compare the next-token distributions of two files of the same model.

    Args:
        exact: The reference.
        found: The same model, quantized.
        n_tokens: Positions to compare; the text may end before.
        threads: Threads of both; every usable CPU by default.
        advance: Told how many more positions were compared.

    Returns:
        `kl_mean` and `kl_p99` (99th percentile), in nats, of the Kullback-Leibler divergence of `found` from `exact`
        over all positions; `top1_agreement`, how often both hold the same token likeliest; `tokens`, the positions.

    Raises:
        BackendError: llama.cpp cannot load or run one of them.
    """
    divergences, agreements = [], []
    with closing(_open(exact, threads)) as reference, closing(_open(found, threads)) as quantized:
        for ids in _windows(reference, n_tokens):
            reference.reset()
            quantized.reset()
            rows = rows_at_once(reference.n_vocab)
            for start in range(0, len(ids), rows):
                chunk = ids[start : start + rows]
                pairs = list(zip(reference.score(chunk), quantized.score(chunk), strict=True))
                for reference_V, quantized_V in pairs[1 if start == 0 else 0 :]:  # nothing is predicted from the start
                    divergences.append(divergence(reference_V, quantized_V))
                    agreements.append(int(reference_V.argmax() == quantized_V.argmax()))
                if advance:
                    advance(len(chunk) - (start == 0))
    return {
        "against": "the unquantized decoder, on the built-in text",
        "tokens": len(divergences),
        "kl_mean": _digits(float(np.mean(divergences))),
        "kl_p99": _digits(float(np.quantile(divergences, 0.99))),
        "top1_agreement": round(float(np.mean(agreements)), 4),
    }


def nothing_lost() -> dict[str, Any]:
    """The section for a file that holds the checkpoint's numbers unchanged: there is nothing to compare."""
    return {
        "against": "itself: no number was changed",
        "tokens": 0,
        "kl_mean": 0.0,
        "kl_p99": 0.0,
        "top1_agreement": 1.0,
    }


def divergence(reference_V: NDArray[np.float32], found_V: NDArray[np.float32]) -> float:
    """Kullback-Leibler divergence, in nats, of the distribution of `found_V` from that of `reference_V` (logits)."""
    log_p_V, log_q_V = log_softmax(reference_V), log_softmax(found_V)
    # Rounding can bring equal distributions below zero.
    return max(0.0, float(np.dot(np.exp(log_p_V), log_p_V - log_q_V)))


def log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities that logits stand for, float64."""
    shifted_V = logits_V.astype(np.float64) - float(logits_V.max())
    shifted_V -= np.log(np.exp(shifted_V).sum())
    return shifted_V


def _open(path: Path, threads: int | None) -> Decoder:
    """Plain attention in float32: flash attention rounds to float16, which is no cost of the weights' types."""
    header = read_header(path)
    rows = rows_at_once(len(header.metadata["tokenizer.ggml.tokens"]))
    context = min(WINDOW, header.context_length)
    return Decoder(path, context=context, threads=threads, kv_type="f32", scored=rows, repack=False)


def rows_at_once(n_vocab: int) -> int:
    """Positions whose logits are in memory at a time."""
    return max(16, min(WINDOW, _LOGITS // n_vocab))


def _windows(decoder: Decoder, n_tokens: int) -> list[tuple[int, ...]]:
    """The text's tokens in windows, each behind the token that begins a text (or behind the text's own first)."""
    ids = decoder.vocabulary.tokenize(TEXT.read_text(encoding="utf-8"), False, False)[: n_tokens + 1]
    metadata = decoder.header.metadata
    begins = metadata.get("tokenizer.ggml.add_bos_token", False)
    first, body = ([metadata["tokenizer.ggml.bos_token_id"]], ids[:n_tokens]) if begins else (ids[:1], ids[1:])
    size = min(WINDOW, decoder.n_context) - 1
    return [(*first, *body[i : i + size]) for i in range(0, len(body), size)]


def _digits(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.2e}")

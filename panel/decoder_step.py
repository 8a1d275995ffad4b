"""Steps 2 and 3: projector and decoder learn to answer, several questions of a picture packed into one sequence.

A packed question attends to the picture and to itself only, and its positions continue those of the
picture: to the model it is exactly a conversation of one turn. In a share of the sequences the questions
follow each other as turns of one conversation instead, and attend to all that came before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from panel.model import IMAGE_TOKENS
from panel.questions import NO_PICTURE_ANSWER, Question, sample_question
from panel.tokens import BOS, CHAT_TEMPLATE, EOT, IMAGE, PAD
from panel.truth import PanelTruth

MULTI_TURN_SHARE = 0.2
NO_PICTURE_SHARE = 0.1
#: What a picture is asked, by training step: all of the first, and a random choice of so many of the second. Display
#: and gauge are learned while the tower still moves; the many ways to ask about lamps get their turn afterwards.
ASKED = {
    "decoder": (("display", "gauge"), ("lamps_on", "lamp_state", "lamp_count", "lit_count", "describe"), 1),
    "answers": (
        ("lamp_state", "lamp_state", "lamp_state", "lamp_count"),
        ("display", "display", "gauge", "lamps_on", "lit_count", "describe"),
        2,
    ),
}
VALUE_WEIGHT = 2.0  # loss weight of a digit or point: the hard part of an answer
STATE_WEIGHT = 4.0  # of the first token about one lamp: it alone decides between yes, no and "there is no such lamp"
SENTENCE_WEIGHT = 0.4  # of the words around the values in a description

PREFIX, PADDING = 0, -1  # segments that are no question


@dataclass(frozen=True)
class Batch:
    """Packed sequences, padded on the right. `weights_BT` belong to the token at that place, as a target."""

    ids_BT: torch.Tensor  # int64
    positions_BT: torch.Tensor  # int64
    weights_BT: torch.Tensor  # float32; 0 where nothing is learned
    allowed_B1TT: torch.Tensor  # bool; [b, 0, i, j]: may i attend to j


class Packer:
    """Turns truths into packed token sequences that are, piece by piece, what the chat template renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, step: str) -> None:
        self._tokenizer = tokenizer
        # The tower's step packs nothing; any entry does.
        self._always, self._also, self._n_also = ASKED.get(step, ASKED["decoder"])
        self._image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self._pad_id = tokenizer.convert_tokens_to_ids(PAD)
        self._value_ids = {tokenizer.convert_tokens_to_ids(char) for char in "0123456789."}
        self._encoded: dict[str, list[int]] = {}
        marker = "QUESTION"
        content = [{"type": "image"}, {"type": "text", "text": marker}]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=CHAT_TEMPLATE,
            add_generation_prompt=True,
            tokenize=False,
        )
        # <bos><user header> | <image> | question | <eot><assistant header>
        header, rest = rendered.split(IMAGE)
        self._user = header.removeprefix(BOS)
        self._assistant = rest.removeprefix(marker)
        self.prefix_ids = self._ids(header) + [self._image_id] * IMAGE_TOKENS

    def _ids(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._encoded[text]

    def _turn(self, question: Question, follows: bool) -> tuple[list[int], list[float]]:
        """Ids and target weights of one question and its answer; `follows` an earlier turn."""
        prompt = self._ids((self._user if follows else "") + question.text + self._assistant)
        answer = self._ids(question.answer + EOT)
        words = SENTENCE_WEIGHT if question.kind == "describe" else 1.0
        weights = [VALUE_WEIGHT if token in self._value_ids else words for token in answer]
        if question.kind == "lamp_state":
            weights[0] = STATE_WEIGHT
        return prompt + answer, [0.0] * len(prompt) + weights

    def _sequence(self, truth: PanelTruth, rng: random.Random) -> dict[str, list]:
        kinds = [*self._always, *rng.sample(self._also, self._n_also)]
        rng.shuffle(kinds)
        questions = [sample_question(truth, kind, rng) for kind in kinds]
        multi_turn = rng.random() < MULTI_TURN_SHARE
        n_prefix = len(self.prefix_ids)
        row = {
            "ids": list(self.prefix_ids),
            "positions": list(range(n_prefix)),
            "segments": [PREFIX] * n_prefix,
            "weights": [0.0] * n_prefix,
            "blind": [False] * n_prefix,
        }

        def append(ids: list[int], weights: list[float], segment: int, start: int, blind: bool) -> None:
            row["ids"] += ids
            row["weights"] += weights
            row["segments"] += [segment] * len(ids)
            row["positions"] += range(start, start + len(ids))
            row["blind"] += [blind] * len(ids)

        for index, question in enumerate(questions):
            ids, weights = self._turn(question, follows=multi_turn and index > 0)
            start = len(row["ids"]) if multi_turn else n_prefix
            append(ids, weights, 1 if multi_turn else 1 + index, start, blind=False)
        if not multi_turn and rng.random() < NO_PICTURE_SHARE:
            asked = sample_question(truth, rng.choice(kinds), rng)
            ids, weights = self._turn(Question("no_picture", asked.text, NO_PICTURE_ANSWER), follows=False)
            append(ids, weights, 1 + len(questions), n_prefix - IMAGE_TOKENS, blind=True)
        return row

    def pack(self, truths: list[PanelTruth], rng: random.Random) -> Batch:
        """Pack random questions about each truth."""
        rows = [self._sequence(truth, rng) for truth in truths]
        length = max(len(row["ids"]) for row in rows)

        def padded(key: str, fill: float, dtype: type) -> np.ndarray:
            return np.array([row[key] + [fill] * (length - len(row[key])) for row in rows], dtype)

        ids_BT = padded("ids", self._pad_id, np.int64)
        segments_BT = padded("segments", PADDING, np.int64)
        blind_BT = padded("blind", False, np.bool_)
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        shared_BTT = (segments_BT == PREFIX)[:, None, :]
        hidden_BTT = blind_BT[:, :, None] & (ids_BT == self._image_id)[:, None, :]
        allowed_BTT = np.tril(same_BTT | shared_BTT) & ~hidden_BTT
        return Batch(
            ids_BT=torch.from_numpy(ids_BT),
            positions_BT=torch.from_numpy(padded("positions", 0, np.int64)),
            weights_BT=torch.from_numpy(padded("weights", 0.0, np.float32)),
            allowed_B1TT=torch.from_numpy(allowed_BTT[:, None]),
        )


def answer_loss(model: LlavaForConditionalGeneration, features_BTC: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted mean cross entropy of the answers' tokens, given the tower's features."""
    image_BTC = model.model.multi_modal_projector(features_BTC)
    embeddings_BTC = model.get_input_embeddings()(batch.ids_BT)
    is_image_BT = batch.ids_BT == model.config.image_token_index
    embeddings_BTC = embeddings_BTC.masked_scatter(is_image_BT[..., None], image_BTC)
    hidden_BTC = model.model.language_model(
        inputs_embeds=embeddings_BTC,
        attention_mask=batch.allowed_B1TT,
        position_ids=batch.positions_BT,
        use_cache=False,
    ).last_hidden_state
    # Only the places that predict something go through the output matrix.
    learned_BT = batch.weights_BT[:, 1:] > 0
    logits_NV = model.lm_head(hidden_BTC[:, :-1][learned_BT])
    losses_N = F.cross_entropy(logits_NV, batch.ids_BT[:, 1:][learned_BT], reduction="none")
    weights_N = batch.weights_BT[:, 1:][learned_BT]
    return (losses_N * weights_N).sum() / weights_N.sum()

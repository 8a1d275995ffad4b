"""Step 1: the tower alone learns to see, under throw-away heads.

Trained end to end from scratch, the model answers the most frequent answer for a very long time: the
decoder's loss says little about pixels until the decoder can already read. Direct labels say it at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from panel.scenes import Landmark
from panel.truth import GAUGE_MAX, LAMP_COLOURS, MAX_DIGITS, PanelTruth

BLANK = 10  # class of a digit position behind the last digit
GAUGE_SPREAD = 1.2  # standard deviation, in gauge units, of the soft target: a near miss is nearly right
GRID = 8  # tokens along a side of the picture

# Widths of what is read from the whole picture, in the order in which the logits are concatenated.
PICTURE_WIDTHS = {
    "digits": MAX_DIGITS * 11,
    "point": MAX_DIGITS,  # after how many digits; 0 is no point
    "gauge": GAUGE_MAX + 1,
    "lamps": len(LAMP_COLOURS) * 3,  # absent, off, on
}
# Widths of what is read from a single token; all but the kind count only at the centre of such a part.
PART_KINDS = ("none", "digit", "gauge", "lamp")
TOKEN_WIDTHS = {
    "kind": len(PART_KINDS),
    "digit": 10,
    "index": MAX_DIGITS,
    "point": 2,
    "gauge": GAUGE_MAX + 1,
    "lamp": len(LAMP_COLOURS) * 2,
}


@dataclass(frozen=True)
class Labels:
    """Class indices, int64: per picture, and per token as (T,) rows with -1 where there is nothing to say."""

    digits_BD: torch.Tensor
    point_B: torch.Tensor
    gauge_B: torch.Tensor
    lamps_BL: torch.Tensor
    tokens_BT: dict[str, torch.Tensor]  # keys of TOKEN_WIDTHS


def labels_of(truths: list[PanelTruth], landmarks: list[list[Landmark]], motions_B23: np.ndarray) -> Labels:
    """Labels of pictures that were moved by `motions_B23`, see `augment`."""
    digits, points, lamps = [], [], []
    for truth in truths:
        shown = [int(char) for char in truth.display if char != "."]
        digits.append(shown + [BLANK] * (MAX_DIGITS - len(shown)))
        points.append(max(truth.display.find("."), 0))
        states = (truth.lamp(colour) for colour in LAMP_COLOURS)
        lamps.append([0 if lamp is None else 1 + lamp.lit for lamp in states])
    gauges = [truth.gauge for truth in truths]
    whole = (torch.tensor(values) for values in (digits, points, gauges, lamps))
    return Labels(*whole, tokens_BT=_token_labels(landmarks, motions_B23))


def _token_labels(landmarks: list[list[Landmark]], motions_B23: np.ndarray) -> dict[str, torch.Tensor]:
    labels = {name: np.full((len(landmarks), GRID * GRID), -1, np.int64) for name in TOKEN_WIDTHS}
    labels["kind"][:] = 0
    for row, (parts, motion_23) in enumerate(zip(landmarks, motions_B23, strict=True)):
        # A motion tells where a moved picture's pixel came from; a part goes the other way.
        sources_2N = np.array([[part.x for part in parts], [part.y for part in parts]])
        moved_2N = np.linalg.solve(motion_23[:, :2], sources_2N - motion_23[:, 2:])
        columns_N, rows_N = np.clip((moved_2N + 1) / 2 * GRID, 0, GRID - 1).astype(int)
        for part, token in zip(parts, rows_N * GRID + columns_N, strict=True):
            labels["kind"][row, token] = PART_KINDS.index(part.kind)
            labels[part.kind][row, token] = part.value
            if part.kind == "digit":
                labels["index"][row, token] = part.index
                labels["point"][row, token] = part.point
    return {name: torch.from_numpy(values) for name, values in labels.items()}


class Heads(nn.Module):
    """Linear read-outs of the tower's tokens: of all of them side by side, of their mean, and of each alone.

    The last learns first: what is at a token's own place needs the fewest steps to be seen. The mean is
    there for the decoder: it asks the tower to write every fact where attention of any shape finds it.
    """

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        outputs = sum(PICTURE_WIDTHS.values())
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.all_tokens = nn.Linear(n_tokens * width, outputs)
        self.mean_token = nn.Linear(width, outputs)
        self.each_token = nn.Linear(width, sum(TOKEN_WIDTHS.values()))

    def forward(self, features_BTC: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits: (B, sum of PICTURE_WIDTHS) of all tokens and of their mean, (B, T, sum of TOKEN_WIDTHS) of each."""
        normed_BTC = self.norm(features_BTC)
        return {
            "all_tokens": self.all_tokens(normed_BTC.flatten(1)),
            "mean_token": self.mean_token(normed_BTC.mean(1)),
            "each_token": self.each_token(normed_BTC),
        }


def _split(logits_BO: torch.Tensor) -> dict[str, torch.Tensor]:
    sizes = list(PICTURE_WIDTHS.values())
    parts = dict(zip(PICTURE_WIDTHS, logits_BO.split(sizes, dim=1), strict=True))
    parts["digits"] = parts["digits"].unflatten(1, (MAX_DIGITS, 11))
    parts["lamps"] = parts["lamps"].unflatten(1, (len(LAMP_COLOURS), 3))
    return parts


def _gauge_loss(logits_NG: torch.Tensor, gauge_N: torch.Tensor) -> torch.Tensor:
    steps_G = torch.arange(GAUGE_MAX + 1)
    distance_NG = (steps_G[None] - gauge_N[:, None]).float()
    target_NG = torch.softmax(-0.5 * (distance_NG / GAUGE_SPREAD) ** 2, dim=1)
    return F.cross_entropy(logits_NG, target_NG)


def _picture_loss(logits_BO: torch.Tensor, labels: Labels) -> torch.Tensor:
    parts = _split(logits_BO)
    return (
        2.0 * F.cross_entropy(parts["digits"].flatten(0, 1), labels.digits_BD.flatten())
        + 0.5 * F.cross_entropy(parts["point"], labels.point_B)
        + 0.5 * _gauge_loss(parts["gauge"], labels.gauge_B)
        + F.cross_entropy(parts["lamps"].flatten(0, 1), labels.lamps_BL.flatten())
    )


def _token_loss(logits_BTO: torch.Tensor, labels: Labels) -> torch.Tensor:
    sizes = list(TOKEN_WIDTHS.values())
    loss = torch.zeros(())
    for name, part_BTO in zip(TOKEN_WIDTHS, logits_BTO.split(sizes, dim=2), strict=True):
        label_BT = labels.tokens_BT[name]
        said_BT = label_BT >= 0
        if name == "gauge":
            loss = loss + _gauge_loss(part_BTO[said_BT], label_BT[said_BT])
        else:
            weight = 2.0 if name in ("kind", "digit") else 1.0
            loss = loss + weight * F.cross_entropy(part_BTO[said_BT], label_BT[said_BT])
    return loss


def heads_loss(logits: dict[str, torch.Tensor], labels: Labels) -> dict[str, torch.Tensor]:
    """Weighted cross entropy of each of the three heads."""
    return {
        "all_tokens": 0.5 * _picture_loss(logits["all_tokens"], labels),
        "mean_token": 0.1 * _picture_loss(logits["mean_token"], labels),
        "each_token": _token_loss(logits["each_token"], labels),
    }


@torch.no_grad()
def heads_accuracy(logits_BO: torch.Tensor, labels: Labels) -> dict[str, float]:
    """Shares of pictures with the whole display, the gauge within 3 units, and all lamps right."""
    parts = _split(logits_BO)
    digits_B = (parts["digits"].argmax(2) == labels.digits_BD).all(1)
    display_B = digits_B & (parts["point"].argmax(1) == labels.point_B)
    gauge_B = (parts["gauge"].argmax(1) - labels.gauge_B).abs() <= 3
    lamps_B = (parts["lamps"].argmax(2) == labels.lamps_BL).all(1)
    named = {"display": display_B, "gauge": gauge_B, "lamps": lamps_B}
    return {name: round(right_B.float().mean().item(), 4) for name, right_B in named.items()}


def augment(pixels_BCHW: torch.Tensor, rng: random.Random, strength: float) -> tuple[torch.Tensor, np.ndarray]:
    """Shift, turn and zoom pictures a little, and change contrast: pixels (B, 3, 128, 128) in -1..1.

    Half of them keep their geometry, because resampling softens and the model must know sharp pictures too.
    The second result is (B, 2, 3): the map from a place in the new picture (-1..1) to that in the old one.
    """
    batch = pixels_BCHW.shape[0]
    noise = np.random.default_rng(rng.getrandbits(64))
    moved = noise.random(batch) < 0.5
    angle_B = noise.uniform(-0.06, 0.06, batch) * strength
    zoom_B = 1 + noise.uniform(-0.05, 0.05, batch) * strength
    theta_B23 = np.zeros((batch, 2, 3), np.float32)
    theta_B23[:, 0, 0] = theta_B23[:, 1, 1] = np.cos(angle_B) * zoom_B
    theta_B23[:, 0, 1] = -np.sin(angle_B) * zoom_B
    theta_B23[:, 1, 0] = np.sin(angle_B) * zoom_B
    theta_B23[:, :, 2] = noise.uniform(-0.05, 0.05, (batch, 2)) * strength
    theta_B23[~moved] = np.eye(2, 3, dtype=np.float32)
    out_BCHW = pixels_BCHW.clone()
    if moved.any():
        chosen = pixels_BCHW[moved]
        grid = F.affine_grid(torch.from_numpy(theta_B23[moved]), list(chosen.shape), align_corners=False)
        out_BCHW[moved] = F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)
    gain_B = torch.from_numpy(noise.uniform(1 - 0.12 * strength, 1 + 0.12 * strength, batch).astype(np.float32))
    return (out_BCHW * gain_B[:, None, None, None]).clamp(-1, 1), theta_B23

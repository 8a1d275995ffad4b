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

from panel.truth import GAUGE_MAX, LAMP_COLOURS, MAX_DIGITS, PanelTruth

BLANK = 10  # class of a digit position behind the last digit
GAUGE_SPREAD = 1.2  # standard deviation, in gauge units, of the soft target: a near miss is nearly right

# Widths of the heads' outputs, in the order in which they are concatenated.
WIDTHS = {
    "digits": MAX_DIGITS * 11,
    "point": MAX_DIGITS,  # after how many digits; 0 is no point
    "gauge": GAUGE_MAX + 1,
    "lamps": len(LAMP_COLOURS) * 3,  # absent, off, on
}


@dataclass(frozen=True)
class Labels:
    """Class indices per picture, int64."""

    digits_BD: torch.Tensor
    point_B: torch.Tensor
    gauge_B: torch.Tensor
    lamps_BL: torch.Tensor


def labels_of(truths: list[PanelTruth]) -> Labels:
    digits, points, lamps = [], [], []
    for truth in truths:
        shown = [int(char) for char in truth.display if char != "."]
        digits.append(shown + [BLANK] * (MAX_DIGITS - len(shown)))
        points.append(max(truth.display.find("."), 0))
        states = (truth.lamp(colour) for colour in LAMP_COLOURS)
        lamps.append([0 if lamp is None else 1 + lamp.lit for lamp in states])
    gauges = [truth.gauge for truth in truths]
    return Labels(*(torch.tensor(values) for values in (digits, points, gauges, lamps)))


class Heads(nn.Module):
    """Linear read-outs of the tower's tokens: one of all tokens side by side, one of their mean.

    The first learns quickly. The second is there for the decoder: it asks the tower to write every fact
    where attention of any shape finds it.
    """

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        outputs = sum(WIDTHS.values())
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.all_tokens = nn.Linear(n_tokens * width, outputs)
        self.mean_token = nn.Linear(width, outputs)

    def forward(self, features_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, sum of WIDTHS) of both read-outs."""
        normed_BTC = self.norm(features_BTC)
        return self.all_tokens(normed_BTC.flatten(1)), self.mean_token(normed_BTC.mean(1))


def _split(logits_BO: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = dict(zip(WIDTHS, logits_BO.split(list(WIDTHS.values()), dim=1)))
    parts["digits"] = parts["digits"].unflatten(1, (MAX_DIGITS, 11))
    parts["lamps"] = parts["lamps"].unflatten(1, (len(LAMP_COLOURS), 3))
    return parts


def heads_loss(logits_BO: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Sum of the mean cross entropies of all labels."""
    parts = _split(logits_BO)
    steps = torch.arange(GAUGE_MAX + 1)
    distance_BG = (steps[None] - labels.gauge_B[:, None]).float()
    target_BG = torch.softmax(-0.5 * (distance_BG / GAUGE_SPREAD) ** 2, dim=1)
    return (
        2.0 * F.cross_entropy(parts["digits"].flatten(0, 1), labels.digits_BD.flatten())
        + 0.5 * F.cross_entropy(parts["point"], labels.point_B)
        + 0.5 * F.cross_entropy(parts["gauge"], target_BG)
        + F.cross_entropy(parts["lamps"].flatten(0, 1), labels.lamps_BL.flatten())
    )


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


def augment(pixels_BCHW: torch.Tensor, rng: random.Random, strength: float) -> torch.Tensor:
    """Shift, turn and zoom pictures a little, and change contrast: pixels (B, 3, 128, 128) in -1..1.

    Half of them keep their geometry, because resampling softens and the model must know sharp pictures too.
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
    out_BCHW = pixels_BCHW.clone()
    if moved.any():
        chosen = pixels_BCHW[moved]
        grid = F.affine_grid(torch.from_numpy(theta_B23[moved]), list(chosen.shape), align_corners=False)
        out_BCHW[moved] = F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)
    gain_B = torch.from_numpy(noise.uniform(1 - 0.12 * strength, 1 + 0.12 * strength, batch).astype(np.float32))
    return (out_BCHW * gain_B[:, None, None, None]).clamp(-1, 1)

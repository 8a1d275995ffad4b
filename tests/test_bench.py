"""The arithmetic of benchmarks. How fast anything is, no test asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevlm import kernels
from edgevlm.bench import (
    DEFAULT_CASES,
    Case,
    Local,
    Report,
    Sample,
    Spread,
    compare,
    edgevlm_calls,
    encode_jpeg,
    picture_for,
    pillow_calls,
    synthetic_photo,
)

CASE = Case(height=24, width=36, side_px=8)


@dataclass
class Told:
    """A contender whose results are known beforehand."""

    wall_s: float
    cpu_s: float
    value: int | None
    turns: list[int]

    def turn(self, calls: int) -> list[Sample]:
        self.turns.append(calls)
        return [Sample(self.wall_s, self.cpu_s)] * calls

    def pixels(self) -> NDArray[Any] | None:
        return None if self.value is None else np.full((8, 8, 3), self.value, dtype=np.uint8)


def test_spread() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(best=1, median=3, quartile_range=2)


def test_rows_come_from_alternating_turns() -> None:
    ours, pillow, copy = Told(3e-3, 1e-3, 7, []), Told(5e-3, 4e-3, 9, []), Told(1e-3, 1e-3, None, [])
    rows = compare(CASE, {"ours": ours, "Pillow": pillow, "memory copy": copy}, rounds=3)
    assert ours.turns == pillow.turns == copy.turns
    assert len(ours.turns) == 3
    assert rows["ours"].cpu_s == Spread(1e-3, 1e-3, 0)
    assert rows["ours"].mpx_per_s == pytest.approx(24 * 36 / 1e6 / 1e-3)
    assert {name: row.difference for name, row in rows.items()} == {"ours": 2, "Pillow": 0, "memory copy": None}

    report = Report(card={"cpu": "a slow one"}, rounds=3, results={CASE: rows})
    assert report.busy == pytest.approx(9 / 6)
    assert "| ours | 1.00 | 1.00 | 0.00 | 3.00 | 1 | 4.0 | others, by up to 2 |" in report.text()
    assert "calls took 1.5 times as long as they ran" in report.text()


@pytest.mark.parametrize("step", ["resize", "tensor", "jpeg"])
def test_contenders_do_the_same_work(step: Any) -> None:
    """What is compared for speed must come to the same; numpy's order of operations rounds differently."""
    case = Case(height=24, width=36, side_px=8, step=step)
    photo_HWC = synthetic_photo(24, 36)
    jpeg = encode_jpeg(photo_HWC)
    calls = edgevlm_calls(case, photo_HWC, jpeg) | pillow_calls(case, photo_HWC, jpeg)
    results = {name: Local(call).pixels() for name, call in calls.items() if "alone" not in name}
    assert len(results) == (len(kernels.targets()) + 1 if step == "resize" else 2)
    first, *others = results.values()
    for other in others:
        assert first is not None
        assert other is not None
        assert first.shape == other.shape == (8, 8, 3)
        assert np.abs(first.astype(float) - other).max() <= (0 if step == "resize" else 1e-6)


def test_pictures_are_of_the_size_of_the_case() -> None:
    photo_HWC = synthetic_photo(300, 400)
    assert np.array_equal(photo_HWC, synthetic_photo(300, 400))
    assert photo_HWC.std() > 20
    for case in DEFAULT_CASES:
        small = Case(height=case.height // 10, width=case.width // 10)
        assert picture_for(small, photo_HWC).shape == (small.height, small.width, 3)

"""Training pictures, rendered ahead of time into shards that both training steps reuse.

``python -m panel.dataset --shards 40`` writes `shard_00000.npy` and so on: uint8 pictures (N, 3, 128, 128),
resized exactly as the model's processor does. Labels are not stored: a truth follows from its seed.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image

from panel.scenes import Landmark, find_landmarks, make_scene
from panel.truth import PanelTruth, sample_truth

IMAGE_SIDE = 128
SHARD_LENGTH = 1024
# Seeds below this one are never trained on: tests, examples and the evaluation take theirs from there.
TRAIN_FIRST_SEED = 1_000_000_000


def picture_CHW(image: Image.Image) -> np.ndarray:
    """Resize a picture as the model's processor does: uint8 (3, 128, 128)."""
    resized = image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


def shard_seeds(index: int) -> range:
    """Seeds of the scenes in shard `index`."""
    first = TRAIN_FIRST_SEED + index * SHARD_LENGTH
    return range(first, first + SHARD_LENGTH)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.npy"


def write_shard(folder: Path, index: int) -> None:
    """Render one shard; the file appears under its name only when it is whole."""
    images_NCHW = np.stack([picture_CHW(make_scene(seed).image()) for seed in shard_seeds(index)])
    partial = folder / f".{index:05d}.{os.getpid()}.npy"
    np.save(partial, images_NCHW)
    partial.replace(shard_path(folder, index))


class Shards:
    """The shards of a folder: pictures, truths and landmarks, indexed through all of them."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("shard_*.npy"))
        self._shards_NCHW = [np.load(path, mmap_mode="r") for path in paths]
        seeds = [seed for path in paths for seed in shard_seeds(int(path.stem.split("_")[1]))]
        self.truths: list[PanelTruth] = [sample_truth(random.Random(seed)) for seed in seeds]
        self.landmarks: list[list[Landmark]] = [find_landmarks(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self.truths)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (N, 3, 128, 128) pictures at these indices."""
        return np.stack([self._shards_NCHW[i // SHARD_LENGTH][i % SHARD_LENGTH] for i in indices])


def main() -> None:
    parser = argparse.ArgumentParser(description="Render training pictures.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shards", type=int, required=True, help=f"number of shards of {SHARD_LENGTH} pictures")
    parser.add_argument("--worker", default="0/1", metavar="I/N", help="render only every N-th shard, from the I-th")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    first, step = (int(part) for part in args.worker.split("/"))
    for index in range(first, args.shards, step):
        if not shard_path(args.out, index).exists():
            write_shard(args.out, index)


if __name__ == "__main__":
    main()

"""How fast pictures become an encoder's input: `edgevlm bench --preprocess`, and what `make bench-kernels` builds on.

Whatever is compared takes turns inside one run, so that everything else that the machine does hits all alike. A busy
machine inflates wall time by the time that others run and CPU time only by the caches that they empty, so ratios are
ratios of CPU time; all work is single-threaded. Apart from `image.py` the only file that imports Pillow: to time it.
"""

from __future__ import annotations

import io
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgevlm.machine import cpu_name, usable_cpus
from edgevlm.spec import ImageSpec, Resample
from edgevlm.versions import versions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.image import ImageSource

#: Fewest and most timed calls of a turn: short calls are repeated, so that a turn outlasts a glitch of the machine.
_CALLS = (2, 20)
#: More wall time than this for each second of CPU time, and the report says that the machine was busy.
_BUSY = 1.1

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One piece of work: a picture of `height` x `width` becomes `side_px` x `side_px`.

    As uint8 pixels (`resize`), as the normalized float32 planes that an encoder takes (`tensor`), or as those from the
    bytes of a JPEG file (`jpeg`).
    """

    height: int
    width: int
    side_px: int = 384
    resample: Resample = "bicubic"
    step: Literal["resize", "tensor", "jpeg"] = "resize"

    @property
    def name(self) -> str:
        start = "JPEG of " if self.step == "jpeg" else ""
        end = "" if self.step == "resize" else ", normalized CHW"
        return f"{start}{self.width}x{self.height} to {self.side_px}x{self.side_px} {self.resample}{end}"

    @property
    def megapixels(self) -> float:
        return self.height * self.width / 1e6

    @property
    def spec(self) -> ImageSpec:
        """What `preprocess` is asked for: SigLIP's way, the whole picture with mean and deviation 0.5."""
        half = (0.5, 0.5, 0.5)
        return ImageSpec(
            policy="stretch",
            height_px=self.side_px,
            width_px=self.side_px,
            resample=self.resample,
            rescale=1 / 255,
            mean=half,
            std=half,
        )


def cases_of(height: int, width: int) -> list[Case]:
    """What is measured on one picture."""
    size = partial(Case, height=height, width=width)
    filters: tuple[Resample, ...] = ("bicubic", "lanczos", "bilinear")
    return [*(size(resample=resample) for resample in filters), size(step="tensor"), size(step="jpeg")]


#: A photo of a phone, the same upright, and a small picture.
DEFAULT_CASES = (
    *cases_of(3000, 4000),
    Case(height=4000, width=3000),
    Case(height=480, width=640, side_px=224),
)


@dataclass(frozen=True)
class Sample:
    """One call: how long it took, and how long the processor worked on it."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Spread:
    best: float
    median: float
    quartile_range: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of two values or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(min(values), median, high - low)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one case. `difference` is the largest of any sample from Pillow's, in steps of 1/255.

    `calls_cpu_s` are the single times behind `cpu_s`. Calls of the same index in two rows ran within one turn of each
    other, so their ratios hold on a machine whose speed changes.
    """

    cpu_s: Spread
    calls_cpu_s: tuple[float, ...]
    wall_s: Spread
    mpx_per_s: float
    difference: int | None


class Contender(Protocol):
    def turn(self, calls: int) -> list[Sample]:
        """Time so many calls."""

    def pixels(self) -> NDArray[Any] | None:
        """What it makes of the picture, (H, W, C); None if that is not a picture."""


@dataclass(frozen=True)
class Local:
    """A contender in this process."""

    call: Call

    def turn(self, calls: int) -> list[Sample]:
        self.call()  # not timed: brings code and picture back into the caches that others have used since
        samples = []
        for _ in range(calls):
            wall, cpu = time.perf_counter(), time.process_time()
            self.call()
            samples.append(Sample(time.perf_counter() - wall, time.process_time() - cpu))
        return samples

    def pixels(self) -> NDArray[Any] | None:
        import numpy as np

        result = self.call()
        if result is None:
            return None
        array = np.asarray(result)
        return array[0].transpose(1, 2, 0) if array.ndim == 4 else array


def compare(case: Case, contenders: Mapping[str, Contender], rounds: int) -> dict[str, Row]:
    """Time contenders in alternating turns. One of them must be called "Pillow" if pixels are compared."""
    import numpy as np

    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    calls = max(_CALLS[0], min(_CALLS[1], round(12 / case.megapixels)))
    for _ in range(rounds):
        for name, contender in contenders.items():
            samples[name] += contender.turn(calls)

    differences: dict[str, int] = {}
    if case.step == "resize":
        pixels = {name: contender.pixels() for name, contender in contenders.items()}
        reference = np.asarray(pixels["Pillow"], dtype=np.int16)
        differences = {
            name: int(np.abs(found - reference).max()) for name, found in pixels.items() if found is not None
        }
    rows = {}
    for name, taken in samples.items():
        calls_cpu_s = tuple(sample.cpu_s for sample in taken)
        cpu_s = Spread.of(calls_cpu_s)
        rows[name] = Row(
            cpu_s=cpu_s,
            calls_cpu_s=calls_cpu_s,
            wall_s=Spread.of([sample.wall_s for sample in taken]),
            mpx_per_s=case.megapixels / cpu_s.median,
            difference=differences.get(name),
        )
    return rows


def copy_calls(case: Case, image_HWC: NDArray[np.uint8], jpeg: bytes) -> dict[str, Call]:
    """The physical yardstick: to read the source once and write it once, into memory that is there already."""
    import numpy as np

    return {"memory copy": partial(np.copyto, np.zeros_like(image_HWC), image_HWC)} if case.step == "resize" else {}


def edgevlm_calls(case: Case, image_HWC: NDArray[np.uint8], jpeg: bytes) -> dict[str, Call]:
    """Ours; every target for the resize, the active one for what is around it."""
    from edgevlm import kernels
    from edgevlm.image import load_image
    from edgevlm.preprocess import preprocess

    resize = partial(kernels.resize, image_HWC, case.side_px, case.side_px, case.resample)
    if case.step == "resize":
        return {f"edgevlm {target}": partial(resize, target=target) for target in kernels.targets()}
    if case.step == "tensor":
        return {"edgevlm": partial(preprocess, image_HWC, case.spec), "edgevlm, resize alone": resize}
    return {"edgevlm": lambda: preprocess(load_image(jpeg), case.spec)}


def pillow_calls(case: Case, image_HWC: NDArray[np.uint8], jpeg: bytes, name: str = "Pillow") -> dict[str, Call]:
    """Pillow, or whatever is installed in its place; numpy normalizes."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(image_HWC)

    def decode() -> Image.Image:
        with Image.open(io.BytesIO(jpeg)) as opened:
            opened.load()
        return opened

    def resize(source: Image.Image) -> Image.Image:
        return source.resize((case.side_px, case.side_px), Image.Resampling[case.resample.upper()])

    def normalize(resized: Image.Image) -> NDArray[np.float32]:
        scaled_HWC = np.asarray(resized, dtype=np.float32) / 127.5 - 1
        return np.ascontiguousarray(scaled_HWC.transpose(2, 0, 1)[None])

    if case.step == "resize":
        return {name: lambda: resize(image)}
    if case.step == "tensor":
        return {f"{name}, numpy": lambda: normalize(resize(image))}
    return {f"{name}, decode alone": decode, f"{name}, numpy": lambda: normalize(resize(decode()))}


def synthetic_photo(height: int, width: int) -> NDArray[np.uint8]:
    """Soft shapes with a sensor's noise on them, the same in every run. (H, W, 3), sides of at least 1."""
    import numpy as np

    from edgevlm import kernels

    draw = np.random.default_rng(0).integers
    shapes_HWC = kernels.resize(draw(256, size=(height // 64 + 2, width // 64 + 2, 3), dtype=np.uint8), height, width)
    noise_HWC = draw(-8, 9, size=shapes_HWC.shape, dtype=np.int16)
    photo_HWC: NDArray[np.uint8] = np.clip(shapes_HWC + noise_HWC, 0, 255).astype(np.uint8)
    return photo_HWC


def picture_for(case: Case, photo_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The photo, turned and cut to the size of the case."""
    import numpy as np

    turn = (case.height > case.width) != (photo_HWC.shape[0] > photo_HWC.shape[1])
    return np.ascontiguousarray((np.rot90(photo_HWC) if turn else photo_HWC)[: case.height, : case.width])


def encode_jpeg(image_HWC: NDArray[np.uint8]) -> bytes:
    """As a camera would store it: quality 90."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=90)
    return file.getvalue()


def card(*packages: str) -> dict[str, str | int]:
    """What numbers belong to: versions, processor, what the kernels make of it."""
    from edgevlm import kernels

    found = versions(*packages)
    return {
        "edgevlm": found.pop("edgevlm"),
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "target": kernels.active_target(),
        "targets": " ".join(kernels.targets()),
        "compiler": kernels.compiler(),
        "python": platform.python_version(),
        **found,
    }


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was measured in one run."""

    card: Mapping[str, str | int]
    rounds: int
    results: Mapping[Case, Mapping[str, Row]]

    @property
    def busy(self) -> float:
        """Wall time for each second of CPU time: 1 on a quiet machine."""
        rows = [row for rows in self.results.values() for row in rows.values()]
        return sum(row.wall_s.median for row in rows) / sum(row.cpu_s.median for row in rows)

    def text(self) -> str:
        """For people: the card, and a table in Markdown."""
        lines = [
            ", ".join(f"{name} {value}" for name, value in self.card.items()),
            f"One thread, {self.rounds} alternating turns each. CPU times in ms; spread is the quartile range.",
            "",
            "| | best | median | spread | wall, median | Mpx/s | speed / Pillow's | pixels |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for case, rows in self.results.items():
            lines.append(f"| **{case.name}** | | | | | | | |")
            pillow = rows.get("Pillow") or rows["Pillow, numpy"]
            for name, row in rows.items():
                times = (row.cpu_s.best, row.cpu_s.median, row.cpu_s.quartile_range, row.wall_s.median)
                cells = [
                    name,
                    *(f"{1e3 * seconds:.2f}" for seconds in times),
                    f"{row.mpx_per_s:.0f}",
                    f"{pillow.cpu_s.median / row.cpu_s.median:.1f}",
                    {None: "", 0: "equal", 1: "off by 1"}.get(row.difference, f"others, by up to {row.difference}"),
                ]
                lines.append(f"| {' | '.join(cells)} |")
        if self.busy > _BUSY:
            lines += ["", f"Measured on a busy machine: calls took {self.busy:.1f} times as long as they ran."]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "card": dict(self.card),
            "rounds": self.rounds,
            "busy": self.busy,
            "cases": [
                {"name": case.name, **asdict(case), "rows": {name: asdict(row) for name, row in rows.items()}}
                for case, rows in self.results.items()
            ],
        }


def bench_preprocess(
    source: ImageSource | None = None, *, rounds: int = 15, report: Callable[[str], object] | None = None
) -> Report:
    """Time our targets beside Pillow.

    Args:
        source: A picture, as `load_image` takes it, to measure on. Default: a synthetic photo of 12 megapixels, also
            upright, and a small part of it.
        rounds: Turns of each contender, at least 1.
        report: Told what is measured next.

    Raises:
        FileError, ImageError: As `load_image` does.
    """
    from edgevlm.image import load_image

    if source is None:
        photo_HWC, cases = synthetic_photo(3000, 4000), DEFAULT_CASES
    else:
        photo_HWC = load_image(source)
        cases = tuple(cases_of(*photo_HWC.shape[:2]))
    jpeg = encode_jpeg(photo_HWC)
    results = {}
    for case in cases:
        if report:
            report(case.name)
        image_HWC = picture_for(case, photo_HWC)
        calls: dict[str, Call] = {}
        for make in (copy_calls, edgevlm_calls, pillow_calls):
            calls |= make(case, image_HWC, jpeg)
        results[case] = compare(case, {name: Local(call) for name, call in calls.items()}, rounds)
    return Report(card=card("numpy", "pillow"), rounds=rounds, results=results)

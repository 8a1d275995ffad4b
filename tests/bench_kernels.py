"""Compares the image kernels with their rivals, and with what they should reach: `make bench-kernels`.

    python tests/bench_kernels.py [--rounds N] [GROUP=PYTHON]...

Rivals that clash live in environments of their own, so each group of contenders gets a worker: a process of this file
under that environment's Python. The workers take short turns, so that all contenders see the same machine; while one
runs, the others wait. Prints a card, a table, a line for each goal, and as the last line all of it as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # a rival's environment has no edgevlm, but needs what of it is plain Python

from edgevlm.bench import (  # noqa: E402
    DEFAULT_CASES,
    Call,
    Case,
    Contender,
    Local,
    Report,
    Row,
    Sample,
    card,
    compare,
    copy_calls,
    edgevlm_calls,
    encode_jpeg,
    picture_for,
    pillow_calls,
)
from edgevlm.spec import Resample  # noqa: E402

Array = NDArray[Any]


# ---- the rivals; each function gives calls by name, and raises ImportError where its library is missing


def torch_calls(case: Case, image_HWC: Array, jpeg: bytes) -> dict[str, Call]:
    """The uint8 path with antialiasing that torchvision uses, on channels_last as a decoder leaves them."""
    import torch
    from torch.nn.functional import interpolate

    torch.set_num_threads(1)
    if case.step != "resize" or case.resample == "lanczos":
        return {}
    image_NCHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    side = (case.side_px, case.side_px)
    return {"torch": partial(interpolate, image_NCHW, side, mode=case.resample, antialias=True)}


def opencv_calls(case: Case, image_HWC: Array, jpeg: bytes) -> dict[str, Call]:
    """Other pixels by design: INTER_AREA averages; INTER_CUBIC reads 16 pixels per output, without antialiasing."""
    import cv2

    cv2.setNumThreads(1)
    if case.step != "resize" or case.resample != "bicubic":
        return {}
    side = (case.side_px, case.side_px)
    return {
        f"OpenCV {name}": partial(cv2.resize, image_HWC, side, interpolation=flag)
        for name, flag in (("area", cv2.INTER_AREA), ("cubic", cv2.INTER_CUBIC))
    }


def hf_calls(case: Case, image_HWC: Array, jpeg: bytes) -> dict[str, Call]:
    """The processors of transformers in Rust; a resize always ends in float32 CHW."""
    import hf_processors_rs

    numbers: dict[Resample, int] = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
    normalized = case.step != "resize"
    config = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": case.side_px, "width": case.side_px},
        "resample": numbers[case.resample],
        "do_rescale": normalized,
        "do_normalize": normalized,
        "image_mean": case.spec.mean,
        "image_std": case.spec.std,
    }
    process = hf_processors_rs.AutoImageProcessor.from_dict(config, backend="pil")
    return {"hf-processors-rs": partial(process, jpeg if case.step == "jpeg" else image_HWC, num_threads=1)}


def simd_calls(case: Case, image_HWC: Array, jpeg: bytes) -> dict[str, Call]:
    """pillow-simd is called PIL as well; the resize is what it does better."""
    importlib.metadata.version("pillow-simd")  # raises PackageNotFoundError, an ImportError: not Pillow by mistake
    return pillow_calls(case, image_HWC, jpeg, "pillow-simd") if case.step == "resize" else {}


Maker = Callable[[Case, Array, bytes], dict[str, Call]]
#: Who shares an environment.
GROUPS: dict[str, tuple[Maker, ...]] = {
    "edgevlm": (copy_calls, edgevlm_calls, pillow_calls, torch_calls),
    "rivals": (opencv_calls, hf_calls),
    "pillow-simd": (simd_calls,),
}
#: Whose versions go on the card.
PACKAGES = ("pillow", "pillow-simd", "torch", "opencv-python-headless", "hf-processors-rs")


# ---- a worker: requests and replies are lines of JSON on stdin and stdout


def work(group: str, folder: Path) -> None:
    """Answer requests until stdin ends."""
    photo_HWC, jpeg = np.load(folder / "photo.npy"), (folder / "photo.jpg").read_bytes()
    calls: dict[str, Call] = {}
    missing: set[str] = set()

    def case(**fields: Any) -> list[str]:
        calls.clear()
        case = Case(**fields)
        image_HWC = picture_for(case, photo_HWC)
        for make in GROUPS[group]:
            try:
                calls.update(make(case, image_HWC, jpeg))
            except ImportError as error:
                if str(error) not in missing:
                    print(f"not measured: {error}", file=sys.stderr)
                missing.add(str(error))
        return list(calls)

    def turn(name: str, n: int) -> list[Any]:
        return [asdict(sample) for sample in Local(calls[name]).turn(n)]

    def pixels(name: str) -> str | None:
        array = Local(calls[name]).pixels()
        if array is None:
            return None
        path = folder / f"{group}.npy"
        np.save(path, array)
        return str(path)

    requests: dict[str, Callable[..., Any]] = {"case": case, "turn": turn, "pixels": pixels, "versions": versions}
    with io.TextIOWrapper(os.fdopen(os.dup(1), "wb")) as replies:
        os.dup2(2, 1)  # whatever a library prints must not get between the replies
        for line in sys.stdin:
            name, arguments = json.loads(line)
            print(json.dumps(requests[name](**arguments)), file=replies, flush=True)


def versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@dataclass(frozen=True)
class Worker:
    process: subprocess.Popen[str]

    def ask(self, request: str, **arguments: Any) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin
        assert stdout
        print(json.dumps([request, arguments]), file=stdin, flush=True)
        return json.loads(stdout.readline())


@contextmanager
def worker(python: str, group: str, folder: Path) -> Iterator[Worker]:
    command = [python, __file__, "--worker", group, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Worker(process)  # leaving closes its stdin, so it ends


@dataclass(frozen=True)
class Remote:
    """A contender in a worker."""

    worker: Worker
    name: str

    def turn(self, calls: int) -> list[Sample]:
        return [Sample(**sample) for sample in self.worker.ask("turn", name=self.name, n=calls)]

    def pixels(self) -> Array | None:
        path = self.worker.ask("pixels", name=self.name)
        return None if path is None else np.load(path)


# ---- what the kernels must reach


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`ours` takes at most `factor` times as long as `rival`, and `plus_ms` more.

    The median over the turns decides, each turn compared with itself: the speed of shared machines changes from one
    turn to the next by more than most goals allow. Ratio or difference of the two best times is shown.
    """

    case: Case
    ours: str
    rival: str
    factor: float
    plus_ms: float = 0
    stretch: bool = False

    def verdict(self, rows: Mapping[str, Row]) -> str:
        words = f"{self.case.name}: {self.ours} at most {self.factor:.3g} x {self.rival}" + (
            f" + {self.plus_ms:g} ms" if self.plus_ms else ""
        )
        if self.stretch:
            words += " (stretch goal)"
        if missing := {self.ours, self.rival} - set(rows):
            return f"SKIP {words}: {', '.join(sorted(missing))} was not measured"
        ours, rival = rows[self.ours], rows[self.rival]
        turns = zip(ours.calls_cpu_s, rival.calls_cpu_s, strict=True)
        found = statistics.median(self._cost(*turn) for turn in turns)
        limit, unit = (self.plus_ms, " ms") if self.plus_ms else (self.factor, " x")
        best = self._cost(ours.cpu_s.best, rival.cpu_s.best)
        return f"{'PASS' if found <= limit else 'MISS'} {words}: {found:.3g}{unit}, best {best:.3g}{unit}"

    def _cost(self, ours_s: float, rival_s: float) -> float:
        return (ours_s - self.factor * rival_s) * 1e3 if self.plus_ms else ours_s / rival_s


def goals(best: str) -> list[Goal]:
    """`best` is the fastest target of this machine."""
    bicubic, lanczos, bilinear, tensor, jpeg, _, small = DEFAULT_CASES
    found = [Goal(case=bicubic, ours="edgevlm avx2", rival="Pillow", factor=1 / 4.5)]
    for case in (bicubic, lanczos, bilinear):
        found.append(Goal(case=case, ours=best, rival="pillow-simd", factor=0.9))
        found.append(Goal(case=case, ours="edgevlm avx2", rival="pillow-simd", factor=1.3))
    return [
        *found,
        Goal(case=small, ours=best, rival="Pillow", factor=1 / 7),
        Goal(case=tensor, ours="edgevlm", rival="edgevlm, resize alone", factor=1.1),
        Goal(case=jpeg, ours="edgevlm", rival="Pillow, decode alone", factor=1, plus_ms=12),
        Goal(case=bicubic, ours=best, rival="memory copy", factor=1, stretch=True),
    ]


# ---- the run


def photo() -> NDArray[np.uint8]:
    """12 megapixels of photographs side by side: real edges and real noise, as no enlargement has them."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    sources = [load_sample_image("china.jpg"), data.astronaut(), load_sample_image("flower.jpg"), data.coffee()]
    squares = [source[:400, :400] for source in sources]
    rows = [np.concatenate([squares[(x + y) % len(squares)] for x in range(10)], axis=1) for y in range(8)]
    return np.ascontiguousarray(np.concatenate(rows)[:3000])


def main(pythons: Mapping[str, str], rounds: int) -> None:
    """Measure all cases with one worker for each entry of `pythons`."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        photo_HWC = photo()
        np.save(folder / "photo.npy", photo_HWC)
        (folder / "photo.jpg").write_bytes(encode_jpeg(photo_HWC))
        workers = [stack.enter_context(worker(python, group, folder)) for group, python in pythons.items()]
        versions = {name: version for w in workers for name, version in w.ask("versions").items()}
        results = {}
        for case in DEFAULT_CASES:
            print(case.name, file=sys.stderr)
            contenders: dict[str, Contender] = {
                name: Remote(w, name) for w in workers for name in w.ask("case", **asdict(case))
            }
            results[case] = compare(case, contenders, rounds)
    about = card("numpy")
    report = Report(card=about | versions, rounds=rounds, results=results)
    verdicts = [goal.verdict(results[goal.case]) for goal in goals(f"edgevlm {about['target']}")]
    print(report.text(), *verdicts, sep="\n")
    print(json.dumps(report.to_json() | {"goals": verdicts}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rounds", type=int, default=15)
        parser.add_argument("environments", nargs="*", metavar="GROUP=PYTHON")
        options = parser.parse_args()
        others = dict(entry.split("=", 1) for entry in options.environments)
        main({"edgevlm": sys.executable, **others}, options.rounds)

"""The kernels, the encoder's input and output, and whole answers on emulated arm64 computers, against this machine.

`make test-arm64` prepares the computers and runs this file, which plain pytest does not find. Nothing expected is
stored: this machine computes it in the same run. Each comparison has a twin that must fail.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulation import COMPUTERS, KERNELS_CHECK, REPOSITORY, Computer
from numpy.typing import NDArray
from PIL import Image
from test_kernels_mutants import ARM64, Mutant, Workshop, assert_found, named
from test_preprocess import PHOTOGRAPHS, SPECS

from edgevlm.bundle import BUILTIN, open_bundle
from edgevlm.machine import usable_cpus
from edgevlm.spec import to_json
from panel.questions import KINDS, sample_question
from panel.scenes import make_scene

Array = NDArray[Any]

PROBE = Path(__file__).with_name("probe.py")
N_PANELS = 20
#: Neither trained on nor used by another test.
FIRST_SEED = 810_000_000
ASK = ("-m", "edgevlm", "ask", "What does the display read?", "--image", "examples/panel.jpg")
KERNEL_TESTS = (
    "tests/test_kernels.py", "tests/test_kernels_tiles.py", "tests/test_kernels_frames.py",
    "tests/test_kernels_attention.py",
)  # fmt: skip
#: Of a resize, as a share of scalar's. The aim for every target is a quarter, which this one does not reach.
MOST_INSTRUCTIONS = {"neon": 0.27}
#: Without tests/conftest.py, which names packages that the computers lack, and without this machine's cache.
PYTEST = ("-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "--quiet")

on_each_computer = pytest.mark.parametrize("computer", COMPUTERS, ids=[computer.name for computer in COMPUTERS])


@dataclasses.dataclass(frozen=True)
class Found:
    """What one machine makes of the task's pictures; see probe.py."""

    tensors: list[str]
    embeds_PND: Array
    answers: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Found:
        with np.load(path) as arrays:
            return cls(arrays["tensors"].tolist(), arrays["embeds"], [json.loads(line) for line in arrays["answers"]])


@dataclasses.dataclass(frozen=True)
class Runs:
    """What takes long, by the computer's name; all started at once."""

    here: Future[Found]
    probes: dict[str, Future[Found]]
    tests: dict[str, Future[str]]


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("arm64")
    write_task(folder)

    def probe_here() -> Found:
        result = folder / "here.npz"
        subprocess.run([sys.executable, PROBE, folder, result], check=True, cwd=REPOSITORY)
        return Found.read(result)

    def probe(computer: Computer) -> Found:
        result = folder / f"{computer.name}.npz"
        computer.python(PROBE, folder, result)
        return Found.read(result)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        yield Runs(
            here=pool.submit(probe_here),
            probes={computer.name: pool.submit(probe, computer) for computer in COMPUTERS},
            tests={c.name: pool.submit(c.python, *PYTEST, *KERNEL_TESTS) for c in COMPUTERS},
        )


def write_task(folder: Path) -> None:
    """Panels with a question each, photographs for every policy, and last the first panel with one pixel damaged."""
    spec = to_json(open_bundle(BUILTIN).spec.image)
    panels, tensors = [], []
    for number in range(N_PANELS):
        scene = make_scene(FIRST_SEED + number)
        question = sample_question(scene.truth, KINDS[number % len(KINDS)], random.Random(number))
        name = f"panel{number}.jpg"
        (folder / name).write_bytes(scene.jpeg)
        panels.append((name, question.text))
        tensors.append((name, spec))
    for number, photograph_HWC in enumerate(PHOTOGRAPHS.values()):
        if photograph_HWC.shape[1] > 200 * photograph_HWC.shape[0]:
            continue  # no longer a picture to `load_image`
        name = f"photograph{number}.png"
        Image.fromarray(photograph_HWC).save(folder / name, compress_level=1)
        tensors += [(name, to_json(policy)) for policy in SPECS.values()]
    damaged_HWC = np.array(Image.open(folder / "panel0.jpg"))
    damaged_HWC[100, 100] ^= 255
    Image.fromarray(damaged_HWC).save(folder / "damaged.png")
    tensors.append(("damaged.png", spec))
    (folder / "task.json").write_text(json.dumps({"panels": panels, "tensors": tensors}))


# ---- the computers ----


def targets(computer: Computer) -> list[str]:
    """The kernels' targets that this CPU runs, slowest first."""
    return computer.python("-c", "import edgevlm; print(*edgevlm.kernels.targets())").split()


@on_each_computer
def test_only_one_computer_has_dot_product(computer: Computer) -> None:
    """What Linux tells the kernels, and so what they choose."""
    assert ("dotprod" in targets(computer)) == ("asimddp" in computer.features) == (computer.name == "cortex-a76")


def test_the_other_computer_cannot_run_dot_product() -> None:
    """Nor does the second build of llama.cpp do without: the two computers really take two ways."""
    wrong = dataclasses.replace(COMPUTERS[0], llama=COMPUTERS[1].llama)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        wrong.python(*ASK)
    assert caught.value.returncode == -signal.SIGILL


def test_a_failure_there_is_a_failure_here() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        COMPUTERS[0].python(*PYTEST, "tests/test_kernels.py", "-k", "no_test_has_this_name")
    assert caught.value.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


# ---- the kernels ----


@on_each_computer
def test_every_target_equals_scalar(computer: Computer) -> None:
    last = computer.run(KERNELS_CHECK).splitlines()[-1]
    assert int(last.split()[0]) >= len(targets(computer))  # and more, for CPUs with a part of this one's features
    assert last.endswith(": all equal")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(
        tmp_path_factory.mktemp("workshop"),
        "-O1 -static",
        toolchain=Path(__file__).with_name("toolchain.cmake"),
        emulator=("qemu-aarch64-static", "-cpu", COMPUTERS[-1].name),
    )


@named(ARM64)
def test_the_checker_finds(workshop: Workshop, mutant: Mutant) -> None:
    assert_found(workshop.run("kernels_check", mutant))


@on_each_computer
def test_the_tests_of_the_kernels_pass(runs: Runs, computer: Computer) -> None:
    """With fewer random cases (EDGEVLM_THIN); against the Pillow of that computer."""
    summary = runs.tests[computer.name].result().splitlines()[-1]
    assert re.fullmatch(r"\d{3,} passed in .*", summary), summary


def instructions_of_resize(computer: Computer, target: str) -> int:
    once, twice = (computer.count_instructions(KERNELS_CHECK, "--repeat", target, n) for n in "12")
    return twice - once


def test_simd_saves_instructions() -> None:
    """Counted, not timed: emulation says nothing about time."""
    computer = COMPUTERS[-1]
    counts = {target: instructions_of_resize(computer, target) for target in targets(computer)}
    scalar = counts.pop("scalar")
    shares = {target: count / scalar for target, count in counts.items()}
    print(f"scalar {scalar}", shares)
    assert scalar > 2 * 800 * 600 * 3  # a multiplication and an addition at least, for each sample of the source
    assert {target: share for target, share in shares.items() if share > MOST_INSTRUCTIONS.get(target, 0.25)} == {}


# ---- the whole way ----


@on_each_computer
def test_the_encoder_s_input_is_equal(runs: Runs, computer: Computer) -> None:
    found, expected = runs.probes[computer.name].result(), runs.here.result()
    assert found.tensors == expected.tensors
    # the twin: one of 65,536 pixels inverted
    assert found.tensors[-1] != expected.tensors[0]


def cosines(a_PND: Array, b_PND: Array) -> Array:
    cosines_PN: Array = (a_PND * b_PND).sum(-1) / np.linalg.norm(a_PND, axis=-1) / np.linalg.norm(b_PND, axis=-1)
    return cosines_PN


@on_each_computer
def test_the_encoder_s_output_points_the_same_way(runs: Runs, computer: Computer) -> None:
    """The int8 products are exact; float32 sums in another order move an activation now and then to the next of its
    255 steps. Seen on the Cortex-A72: 0.999994 on average, 0.9985 in the worst of 1280 rows."""
    found, expected = runs.probes[computer.name].result(), runs.here.result()
    same = cosines(found.embeds_PND, expected.embeds_PND)
    print(f"cosine: mean {same.mean():.6f}, worst of {same.size} rows {same.min():.6f}")
    assert same.mean() > 0.9999
    assert same.min() > 0.99
    # the twin: another panel's; about 0.6
    assert cosines(found.embeds_PND, np.roll(expected.embeds_PND, 1, axis=0)).mean(-1).max() < 0.9


def without_measurements(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("timings", "memory")}


@on_each_computer
def test_the_answers_are_equal(runs: Runs, computer: Computer) -> None:
    found, expected = (
        [without_measurements(answer) for answer in run.result().answers]
        for run in (runs.probes[computer.name], runs.here)
    )
    assert len(found) == N_PANELS
    assert found == expected
    # the twin: other panels have other answers
    assert found[1:] != expected[:-1]


@on_each_computer
def test_the_command_line_in_a_process_of_its_own(computer: Computer) -> None:
    """The first command of the README's transcript."""
    assert computer.python(*ASK) == "56\n"

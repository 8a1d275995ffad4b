"""Two arm64 computers in QEMU's user-mode emulation, and a count of the instructions that they execute.

    python tests/arm64/emulation.py cortex-a72 PROGRAM [ARGUMENT]...     prints how many instructions PROGRAM executes

`make test-arm64` puts their parts into build/arm64; docs/raspberry-pi.md says what they prove.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "arm64"
KERNELS_CHECK = BUILD / "kernels" / "kernels_check"
N_CPUS = 4


@dataclass(frozen=True)
class Computer:
    """An emulated computer.

    Args:
        name: QEMU's name of the CPU.
        part: The CPU's part number; the implementer is Arm.
        features: What the CPU can do, in the words of /proc/cpuinfo.
        llama: The build of llama.cpp whose libraries come first.
    """

    name: str
    part: int
    features: str
    llama: str

    def run(self, *command: str | Path) -> str:
        """Run an arm64 program and return its stdout.

        Raises:
            subprocess.CalledProcessError: it failed; its stderr is in a note.
        """
        try:
            done = subprocess.run(
                ["qemu-aarch64-static", *command],
                env=self.environment,
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            error.add_note(error.stdout[-10_000:] + error.stderr[-10_000:])
            raise
        return done.stdout

    def python(self, *arguments: str | Path) -> str:
        """Run Python, with edgevlm and what it needs, and return its stdout; fails as `run` does."""
        return self.run(BUILD / "debian" / "usr" / "bin" / "python3.11", *arguments)

    def count_instructions(self, *command: str | Path) -> int:
        """How many instructions a program executes, those of the loader and the C library included.

        Two runs of a program that differ in nothing but the work under test differ by that work's instructions. It
        must have one thread and be small: QEMU logs every block of instructions, some hundred thousand a second.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        traced = ["qemu-aarch64-static", "-d", "in_asm,exec,nochain", *map(str, command)]
        with subprocess.Popen(
            traced, env=self.environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            assert process.stderr is not None
            count = _executed(process.stderr)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, traced)
        return count

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """The variables by which QEMU, and what its programs start, runs on this computer."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        return kept | {
            "LANG": "C.UTF-8",
            "QEMU_CPU": self.name,
            "QEMU_LD_PREFIX": str(self._root()),
            "LD_LIBRARY_PATH": str(next(BUILD.glob("llama-*")) / self.llama / "bin"),
            "PYTHONPATH": os.pathsep.join(
                map(str, (Path(__file__).parent / "guest", BUILD / "packages", BUILD / "wheels"))
            ),
            # or the repository itself would come first, whose edgevlm has no arm64 extension
            "PYTHONSAFEPATH": "1",
            "EDGEVLM_THIN": "5",
        }

    def _root(self) -> Path:
        """The folder in which QEMU looks for a program's files first: Debian's, and a description of this CPU.

        QEMU answers the CPU's own registers, but lets programs read this machine's /proc/cpuinfo and /sys; onnxruntime
        crashes at its import when they describe another architecture.
        """
        root = BUILD / self.name
        cpus = root / "sys" / "devices" / "system" / "cpu"
        cpus.mkdir(parents=True, exist_ok=True)
        for name in ("possible", "present", "online"):
            (cpus / name).write_text(f"0-{N_CPUS - 1}\n")
        (root / "proc").mkdir(exist_ok=True)
        (root / "proc" / "cpuinfo").write_text(
            "".join(
                f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {self.features}\nCPU implementer\t: 0x41\n"
                f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {self.part:#x}\nCPU revision\t: 3\n\n"
                for number in range(N_CPUS)
            )
        )
        for entry in (BUILD / "debian").iterdir():
            link = root / entry.name
            if not link.is_symlink():
                link.symlink_to(entry)
        return root


def _executed(log: Iterable[bytes]) -> int:
    """Instructions in QEMU's log: each block is listed when it is translated, and traced whenever it is executed.

    IN: main
    0x55028ad058:  eb14027f  cmp      x19, x20
    0x55028ad05c:  54ffff81  b.ne     #0x55028ad050
    Trace 0: 0x7f885f4d6640 [0000000000001001/00000055028ad058/00000001/00000200] main
    """
    sizes: dict[int, int] = {}
    start = None
    total = 0
    for line in log:
        if line.startswith(b"Trace"):
            total += sizes[int(line.split(b"/", 2)[1], 16)]
        elif line.startswith(b"IN:"):
            start = None
        elif line.startswith(b"0x"):
            if start is None:
                start = int(line.partition(b":")[0], 16)
                sizes[start] = 0
            sizes[start] += 1
    return total


COMPUTERS: Sequence[Computer] = (
    # A Raspberry Pi 4, and the CPU of a Raspberry Pi 5: the same with dot product.
    Computer("cortex-a72", 0xD08, "fp asimd evtstrm crc32 cpuid", "baseline"),
    Computer(
        "cortex-a76", 0xD0B, "fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp", "dotprod"
    ),
)

if __name__ == "__main__":
    print({computer.name: computer for computer in COMPUTERS}[sys.argv[1]].count_instructions(*sys.argv[2:]))

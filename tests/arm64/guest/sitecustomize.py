"""What Python reads at its start: child processes start the emulator too, as this machine cannot run arm64 binaries."""

import sys
from pathlib import Path

sys.executable = str(Path(__file__).with_name("python"))

"""What one machine makes of a folder of pictures: compare.py runs this here and on the emulated computers.

    python probe.py FOLDER RESULT

FOLDER/task.json names pictures of FOLDER: "tensors" is a list of [picture, ImageSpec], "panels" one of [picture,
question]. RESULT is a .npz file: the tensors' hashes, the panels' embeddings, and the panels' answers by the command
line, as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import edgevlm
from edgevlm import cli
from edgevlm.image import load_image
from edgevlm.preprocess import preprocess
from edgevlm.spec import ImageSpec, from_json


def hash_of_tensor(picture: Path, spec: dict[str, Any]) -> str:
    """The hash of what the encoder would be fed, to the last bit."""
    return hashlib.sha256(preprocess(load_image(picture), from_json(ImageSpec, spec)).tobytes()).hexdigest()


def ask(picture: Path, question: str) -> str:
    """What `edgevlm ask --json` prints."""
    sys.argv = ["edgevlm", "ask", question, "--image", str(picture), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.main()
    return printed.getvalue()


def main() -> None:
    folder, result = map(Path, sys.argv[1:])
    task = json.loads((folder / "task.json").read_text())
    with edgevlm.load() as model:
        embeds = [model.embed_image(folder / picture) for picture, _ in task["panels"]]
    np.savez(
        result,
        tensors=[hash_of_tensor(folder / picture, spec) for picture, spec in task["tensors"]],
        embeds=np.stack(embeds),
        answers=[ask(folder / picture, question) for picture, question in task["panels"]],
    )


if __name__ == "__main__":
    main()

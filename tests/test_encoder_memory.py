"""What a session of the encoder keeps in memory, on graphs that are observed while they run."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from edgevlm.converters.onnx_graph import Graph

BLOCKS, SIDE, MIB = 24, 2048, 1 << 20  # each state has 16 MiB

#: Prints the growth of this process's own memory (RssAnon), in bytes, by a run whose arena is still there, and by what
#: is left of its outputs when the session is gone.
CHILD = """
import gc, re, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import onnxruntime
from edgevlm.encoder import Encoder

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

if sys.argv[2] == "default order":
    onnxruntime.ExecutionOrder = SimpleNamespace(PRIORITY_BASED=onnxruntime.ExecutionOrder.DEFAULT)
pixels_TCHW = np.ones((1, 1, int(sys.argv[3]), int(sys.argv[3])), np.float32)
encoder = Encoder(sys.argv[1], None, threads=1)
before = own()
if sys.argv[2] == "views":
    found = encoder._session.run(None, {"pixels_TCHW": pixels_TCHW})
else:
    found = encoder.outputs(pixels_TCHW)
during = own()
del encoder
gc.collect()
print(during - before, own() - before)
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A chain whose every state is looked at, as `Products` looks at the inputs of its products."""
    path = tmp_path_factory.mktemp("graph") / "chain.onnx"
    graph = Graph("chain", path.with_name("chain.onnx.data"))
    x, one = graph.input("pixels_TCHW", ["T", 1, SIDE, SIDE]), graph.weight("one", np.ones(1, np.float32))
    for i in range(BLOCKS):
        x = graph.op.Add(x, one)
        graph.output(graph.op.ReduceMax(x, axes=[2, 3], keepdims=0), f"high.{i}", ["T", 1])
    graph.output(graph.op.ReduceMax(x, axes=[1, 2, 3], keepdims=0), "embeds_TND", ["T"])
    graph.save(path)
    return path


def growth(graph, mode):
    """Bytes during the run, and after it."""
    command = [sys.executable, "-c", CHILD, str(graph), mode, str(SIDE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"-?\d+ -?\d+\n", done.stdout)
    return tuple(map(int, done.stdout.split()))


def test_states_are_not_kept_for_those_who_look_at_them(graph):
    """Two states are alive at a time; ONNX Runtime's arena grows by doubling."""
    assert growth(graph, "ours")[0] < 10 * 16 * MIB
    assert growth(graph, "default order")[0] > BLOCKS * 16 * MIB  # the twin: all of them, until the end


def test_outputs_do_not_keep_the_arena(graph):
    assert growth(graph, "ours")[1] < 2 * 16 * MIB
    assert growth(graph, "views")[1] > 2 * 16 * MIB  # the twin

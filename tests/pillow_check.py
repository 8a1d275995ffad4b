"""Compares a build of the C extension with Pillow: `python pillow_check.py path/to/_kernels.abi3.so`.

A process of its own, because the extension under test takes the place of the installed one. Not a test: see
test_kernels_mutants.py.
"""

from __future__ import annotations

import sys

import numpy as np
from native import use_extension

use_extension(sys.argv[1])

from test_kernels import FILTERS, TARGETS, assert_equal, pillow_resize, random_image  # noqa: E402

from edgevlm import _kernels, kernels  # noqa: E402

assert _kernels.__file__ == sys.argv[1]
rng = np.random.default_rng(3)
for case in range(200):
    before, after = rng.integers(1, (5, 70)[case % 2], (2, 2))
    if case % 3 == 0:
        after = before - np.array([2, 1]) * min(1, *(before - 1) // 2)  # at the threshold of the order of the passes
    image_HWC = random_image(*before, (1, 3, 4)[case % 3], seed=case)
    for resample in FILTERS:
        expected = pillow_resize(image_HWC, *after, resample)
        for target in TARGETS:
            assert_equal(kernels.resize(image_HWC, *after, resample, target=target), expected)

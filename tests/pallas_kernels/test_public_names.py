"""`from pallas_kernels import op` gives functions, in whatever order packages are imported, and needs little."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_kernels

CHECK = """
import sys
{imports}
from pallas_kernels import {names}
import inspect
assert all(callable(f) for f in ({names})), ({names})
assert not inspect.ismodule(rms_norm)
from pallas_kernels.rms_norm import rms_norm as same, rms_norm_backward
assert same is rms_norm
from pallas_kernels import nf4
assert inspect.ismodule(nf4)
foreign = {{name.partition(".")[0] for name in sys.modules}} & {{"torch", "transformers", "flax", "optax", "datasets"}}
assert not foreign, foreign
"""


@pytest.mark.parametrize(
    "imports", ["", "import pallas_kernels.rms_norm.api", "from pallas_kernels.nf4 import NF4Tensor", "import jax"]
)
def test_names_are_functions_whatever_was_imported_before(imports: str) -> None:
    code = CHECK.format(imports=imports, names=", ".join(pallas_kernels.__all__))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_each_public_name_says_what_it_does() -> None:
    for name in pallas_kernels.__all__:
        assert inspect.getdoc(getattr(pallas_kernels, name)), name

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigbatch.recipes.core import precision

PROGRAM = Path(__file__).parents[2] / "programs" / "half_products.py"


@pytest.fixture(scope="module")
def found():
    # A process of its own: what is replaced stays so.
    result = subprocess.run([sys.executable, "-W", "error", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_products_of_16_bits_without_instructions_are_those_of_float32_rounded_once(found):
    errors = found["errors"]
    assert len(errors) == 16
    single = [error for name, error in errors.items() if "gradient" not in name and "linear" not in name]
    assert max(single) <= 0.5  # half a unit in the last place of the largest
    assert max(errors.values()) < 2  # of layers, which round several times


def test_they_are_not_slower_than_float32_by_much_and_leave_that_alone(found):
    assert found["float32_is_as_before"]
    assert found["speed"] > 0.1  # scalar loops reach 0.02 to 0.05


def test_a_processor_with_instructions_keeps_torchs_own_products(monkeypatch):
    replaced = []
    monkeypatch.setattr(precision, "_has_instructions", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(precision, "_replace_kernels", lambda: replaced.append(1))
    for dtype in (torch.float32, torch.bfloat16):
        precision.multiply_fast(dtype)
    assert replaced == []
    precision.multiply_fast(torch.float16)
    assert replaced == [1]

"""What a look at finished tasks says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_taskfile import make

from bitfit.comparison import bias_change


def test_the_change_of_large_values_is_finite():
    file = make()
    value = float(torch.tensor(3e38))
    rows = bias_change(replace(file, bias=torch.full_like(file.bias, -3e38)))
    assert rows
    assert all(row["mean_abs"] == pytest.approx(value) for row in rows)

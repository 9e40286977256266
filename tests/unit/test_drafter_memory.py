# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Sizes of tensors as a drafting model's checkpoint lists them; the engine tests load real ones."""

from typing import Any

import pytest

from vllm_subspec.engine import drafter_memory


@pytest.mark.parametrize(
    ("tensor", "nbytes"),
    [
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, 12),  # loaded in 16 bits
        ({"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, 12),
        ({"dtype": "I32", "shape": [4], "data_offsets": [8, 24]}, 16),  # packed codes stay so
        ({"dtype": "F8_E4M3", "shape": [4, 2], "data_offsets": [0, 8]}, 8),
    ],
)
def test_only_plain_floats_change_their_type(tensor: dict[str, Any], nbytes: int) -> None:
    assert drafter_memory._loaded_bytes(tensor, itemsize=2) == nbytes

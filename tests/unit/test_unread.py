# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.model_executor.model_loader import weight_utils

from vllm_subspec.engine.unread import unread


def test_what_is_left_out_has_its_shape_only(tmp_path: Path) -> None:
    file = str(tmp_path / "model.safetensors")
    saved = {"a.weight": torch.rand(3, 5), "b.weight": torch.rand(4)}
    save_file(saved, file)

    def read() -> dict[str, torch.Tensor]:
        return dict(weight_utils.safetensors_weights_iterator([file], use_tqdm_on_load=False))

    with unread(lambda name: name == "a.weight"):
        found = read()
    assert found["a.weight"].is_meta and found["a.weight"].shape == (3, 5)
    assert torch.equal(found["b.weight"], saved["b.weight"])
    assert torch.equal(read()["a.weight"], saved["a.weight"])  # as before

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What a weight store belongs to: the checkpoint it came from and this rank's share of it."""

import hashlib
import re
from pathlib import Path

from vllm.config import VllmConfig

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "config.json")


def fingerprint(config: VllmConfig, rank: int) -> dict[str, str | int]:
    """Equal for two starts exactly if they stream the same bytes."""
    model = config.model_config
    identity: dict[str, str | int] = {
        "model": model.model,
        "revision": _revision(config),
        "dtype": str(model.dtype),
        "load_format": str(config.load_config.load_format),
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "tensor_parallel_rank": rank,
    }
    if config.load_config.load_format == "dummy":
        identity["seed"] = model.seed
    return identity


def store_name(config: VllmConfig, rank: int) -> str:
    """File name of the store: readable, and another one for every model, precision and rank."""
    model = config.model_config
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model.model).name).strip("-") or "model"
    tp = config.parallel_config.tensor_parallel_size
    full = f"{model.model} {model.dtype} {config.load_config.load_format}"
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{slug}-{digest}.rank{rank}of{tp}.store"


def substitutes_path(store_path: str, bits: int) -> str:
    """Of the quantized substitutes that belong to a weight store."""
    return f"{store_path.removesuffix('.store')}.{bits}bit.substitutes"


def _revision(config: VllmConfig) -> str:
    """The commit of a hub model; for a local folder a digest of its files' sizes and times."""
    model = config.model_config
    folder = Path(model.model)
    if not folder.is_dir():
        commit = getattr(model.hf_config, "_commit_hash", None)
        return str(commit or model.revision or "main")
    files = sorted({path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)})
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The options of ``--speculative-config '{"method": "subspec", ...}'``, parsed once.

Refusals that need vLLM's own configuration (parallelism, model family) are made elsewhere; this
module refuses what is wrong in the options themselves, before any weight is loaded.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

# Nodes of one request's tree: beyond, masks and slots cost more than any draft gains.
MAX_SPECULATIVE_TOKENS = 512


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _looks_local(path: str) -> bool:
    """Whether ``path`` can only be a directory, not an ``owner/name`` of a model hub."""
    return path.startswith(("/", "./", "../", "~")) or path in (".", "..") or path.count("/") > 1


LayerIndices = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_list_to_tuple)
]


class SubspecOptions(BaseModel):
    """Typed options. ``description`` of a field is what its error message says is allowed.

    ``num_speculative_tokens`` bounds the nodes of a request's tree, ``depth`` its levels and
    ``branching`` the nodes of a level. They are upper limits: with dynamic pruning the cost model
    (``core/cost.py``) stops earlier, and drafts narrower, where more does not pay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_speculative_tokens: int = Field(
        128,
        ge=1,
        le=MAX_SPECULATIVE_TOKENS,
        description=f"an integer from 1 to {MAX_SPECULATIVE_TOKENS}",
    )
    branching: int = Field(
        6, ge=1, le=64, description="an integer from 1 (draft chains instead of trees) to 64"
    )
    depth: int = Field(
        48,
        ge=1,
        le=MAX_SPECULATIVE_TOKENS,
        description=f"an integer from 1 to {MAX_SPECULATIVE_TOKENS}",
    )
    pruning: Literal["dynamic", "none"] = Field(
        "dynamic",
        description='"dynamic" (drop what costs more than it is expected to gain) or "none" (a '
        "full beam in every round)",
    )
    bits: Literal[2, 3, 4, 8] = Field(4, description="2, 3, 4 or 8")
    group_size: Literal[16, 32, 64, 128, 256, -1] | None = Field(
        None,
        description="16, 32, 64, 128, 256, -1 (one group per row) or null (64 below 8 bits, one "
        "group per row at 8)",
    )
    quantizer: Literal["hqq", "rtn"] | None = Field(
        None,
        description='"hqq", "rtn" or null ("hqq" below 8 bits; "rtn" at 8, where it is as good)',
    )
    resident_weights_gib: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        Field("auto", description='"auto" or a number of GiB from 0 (stream every decoder layer)')
    )
    weight_source: Literal["auto", "host", "disk"] = Field(
        "auto", description='"auto", "host" or "disk"'
    )
    store_dir: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a directory (it need not exist yet), or null for vLLM's cache root"
    )
    # One slot would hold the layer being computed and leave none to load the next one into.
    ring_layers: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="an integer from 2 (one layer computes while the next one loads) or null for "
        "automatic",
    )
    draft_temperature: float = Field(0.2, gt=0, allow_inf_nan=False, description="a number above 0")
    substitute: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="an existing directory or a model name, of a low-bit checkpoint of the same "
        "model, or null to quantise while loading",
    )
    substitute_layers: Literal["auto", "all"] | LayerIndices = Field(
        "auto", description='"auto", "all" or a non-empty list of distinct layer numbers from 0'
    )

    @field_validator("substitute_layers")
    @classmethod
    def _distinct(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str):
            return value
        if len(set(value)) != len(value):
            raise ValueError("repeated layer")
        return tuple(sorted(value))

    @field_validator("store_dir")
    @classmethod
    def _absolute_store(cls, value: str | None) -> str | None:
        if value is None:
            return None
        path = os.path.abspath(os.path.expanduser(value))
        if os.path.exists(path) and not os.path.isdir(path):
            raise ValueError("not a directory")
        return path

    @field_validator("substitute")
    @classmethod
    def _existing_substitute(cls, value: str | None) -> str | None:
        if value is None:
            return None
        path = os.path.abspath(os.path.expanduser(value))
        if os.path.isdir(path):
            return path
        if _looks_local(value):
            raise ValueError("no such directory")
        return value

    @model_validator(mode="after")
    def _substitute_is_already_quantised(self) -> Self:
        if self.substitute is not None:
            for key in ("bits", "group_size", "quantizer"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f'speculative_config key "{key}" is {getattr(self, key)!r}, but '
                        f'"substitute" names a checkpoint that is already quantised: remove '
                        f'"{key}" or "substitute"'
                    )
        return self

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Options from a ``--speculative-config`` mapping without its ``method``.

        Raises:
            ValueError: one sentence that names the key, its value and what is allowed; for an
                unknown key, the nearest known one.
        """
        unknown = [key for key in options if key not in cls.model_fields]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), cls.model_fields, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(cls.model_fields)}"
            raise ValueError(f'speculative_config has no key "{unknown[0]}" for subspec; {hint}')
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            raise ValueError(cls._sentence(error, options)) from None

    @classmethod
    def _sentence(cls, error: ValidationError, options: Mapping[str, Any]) -> str:
        first = error.errors()[0]
        if not first["loc"]:  # a check across keys writes its own sentence
            return str(first["ctx"]["error"])
        key = str(first["loc"][0])
        value = repr(options[key])
        if len(value) > 120:
            value = value[:117] + "..."
        return (
            f'speculative_config key "{key}" is {value}; allowed: '
            f"{cls.model_fields[key].description}"
        )

    def to_json_dict(self) -> dict[str, Any]:
        """JSON-serialisable form of every option; ``parse`` of it gives an equal object."""
        return self.model_dump(mode="json")

    def store_path(self) -> Path:
        """Directory of the weight stores: ``store_dir``, or ``subspec`` in vLLM's cache root."""
        if self.store_dir is not None:
            return Path(self.store_dir)
        from vllm import envs  # heavy, and not needed to check options

        return Path(envs.VLLM_CACHE_ROOT) / "subspec"

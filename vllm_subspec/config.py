# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The options of ``--speculative-config '{"method": "subspec" | "hierspec", ...}'``, parsed once.

Refusals that need vLLM's own configuration (parallelism, model family) are made elsewhere; this
module refuses what is wrong in the options themselves, before any weight is loaded.
"""

import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

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


LONGEST_SHOWN = 120


def shown(value: object) -> str:
    """``value`` as a message shows it: on one line, and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of lists in lists
        return f"a very large {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _looks_local(path: str) -> bool:
    """Whether ``path`` can only be a directory, not an ``owner/name`` of a model hub."""
    return path.startswith(("/", "./", "../", "~")) or path in (".", "..") or path.count("/") > 1


def _absolute(path: str) -> str:
    if "\0" in path:
        raise ValueError("no path")
    return os.path.abspath(os.path.expanduser(path))


def _directory_or_name(value: str | None) -> str | None:
    """An existing directory becomes absolute; what can only be a directory must exist."""
    if value is None:
        return None
    path = _absolute(value)
    if os.path.isdir(path):
        return path
    if _looks_local(value):
        raise ValueError("no such directory")
    return value


def _refuse_unknown(
    model: type[BaseModel], options: Mapping[str, Any], prefix: str, method: str
) -> None:
    unknown = [key for key in options if key not in model.model_fields]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), model.model_fields, n=1)
        hint = f'did you mean "{prefix}{near[0]}"?' if near else ""
        hint = hint or f"known: {', '.join(prefix + name for name in model.model_fields)}"
        key = shown(f"{prefix}{unknown[0]}")[1:-1]  # without the quotes; on one line, though
        raise ValueError(f'speculative_config has no key "{key}" for {method}; {hint}')


LayerIndices = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_list_to_tuple)
]


class DrafterOptions(BaseModel):
    """What drafts for an intermediate model, or for the target itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: Literal["ngram", "draft_model", "eagle", "eagle3"] = Field(
        description='"ngram", "draft_model", "eagle" or "eagle3"'
    )
    model: Annotated[str, Field(min_length=1)] | None = Field(
        None, description='an existing directory or a model name; nothing with "ngram"'
    )
    depth: int = Field(3, ge=1, le=64, description="an integer from 1 to 64")
    branching: int = Field(10, ge=1, le=64, description="an integer from 1 to 64")
    nodes: int = Field(30, ge=1, le=256, description="an integer from 1 to 256")
    prompt_lookup_min: int = Field(
        2, ge=1, le=64, description='an integer from 1 to "prompt_lookup_max", with "ngram"'
    )
    prompt_lookup_max: int = Field(
        5, ge=1, le=64, description='an integer from 1 to 64, with "ngram"'
    )

    @field_validator("model")
    @classmethod
    def _existing(cls, value: str | None) -> str | None:
        return _directory_or_name(value)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.method == "ngram" and self.model is not None:
            raise ValueError(
                'speculative_config key "drafter.model" is set, but "ngram" needs no model: remove '
                'it, or choose the method "draft_model"'
            )
        if self.method != "ngram" and self.model is None:
            raise ValueError(
                f'speculative_config key "drafter.model" is missing: "{self.method}" needs a model'
            )
        for key in ("prompt_lookup_min", "prompt_lookup_max"):
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and self.method != "ngram":
                raise ValueError(
                    f'speculative_config key "drafter.{key}" is for the method "ngram", not '
                    f'"{self.method}": remove it'
                )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f'speculative_config key "drafter.prompt_lookup_min" is {self.prompt_lookup_min}; '
                f'allowed: up to "prompt_lookup_max", {self.prompt_lookup_max}'
            )
        return self


class DraftingOptions(BaseModel, ABC):
    """What both methods have in common. ``description`` of a field is what its error message says
    is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    METHOD: ClassVar[str]
    SEQUENCE: ClassVar[int]
    """Tokens that a hierarchy drafts before it knows what pays, unless told otherwise."""

    num_speculative_tokens: int
    pruning: Literal["dynamic", "none"] = Field(
        "dynamic",
        description='"dynamic" (drop what costs more than it is expected to gain) or "none" (a '
        "full draft in every round)",
    )
    draft_temperature: float = Field(0.2, gt=0, allow_inf_nan=False, description="a number above 0")
    drafter: DrafterOptions | None = Field(None, description='a mapping with a "method", or null')
    min_draft_length: Annotated[int, Field(ge=1)] | None = Field(
        None, description='an integer from 1 to "num_speculative_tokens", or null'
    )

    @model_validator(mode="after")
    def _room_for_a_sequence(self) -> Self:
        if self.min_draft_length is None:
            return self
        if self.drafter is None:
            raise ValueError(
                'speculative_config key "min_draft_length" is for a hierarchy: set "drafter" too, '
                "or remove it"
            )
        if self.min_draft_length > self.num_speculative_tokens:
            raise ValueError(
                f'speculative_config key "min_draft_length" is {self.min_draft_length}; allowed: '
                f'up to "num_speculative_tokens", {self.num_speculative_tokens}'
            )
        return self

    @property
    def limit(self) -> int:
        """Draft tokens of a request that the target verifies in a round, at most."""
        return self.num_speculative_tokens

    @property
    def sequence_length(self) -> int:
        """Tokens that a hierarchy drafts while costs are unknown; if nothing is pruned, always."""
        return self.min_draft_length or min(self.SEQUENCE, self.num_speculative_tokens)

    @property
    def trees(self) -> list[str]:
        """The options by which a pass may verify or grow a tree that is no chain; empty if none."""
        wide = self.drafter is not None and self.drafter.branching > 1
        return ["drafter.branching"] if wide else []

    @property
    @abstractmethod
    def lookahead(self) -> int:
        """Slots behind the committed tokens that drafting may write."""

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Options from a ``--speculative-config`` mapping without its ``method``.

        Raises:
            ValueError: one sentence that names the key, its value and what is allowed; for an
                unknown key, the nearest known one.
        """
        _refuse_unknown(cls, options, "", cls.METHOD)
        drafter = options.get("drafter")
        if isinstance(drafter, Mapping):
            _refuse_unknown(DrafterOptions, drafter, "drafter.", cls.METHOD)
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            raise ValueError(cls._sentence(error, options)) from None

    @classmethod
    def _sentence(cls, error: ValidationError, options: Mapping[str, Any]) -> str:
        first = error.errors()[0]
        if (
            "ctx" in first
            and "error" in first["ctx"]
            and str(first["ctx"]["error"]).startswith("speculative_config")
        ):  # a check across keys writes its own sentence
            return str(first["ctx"]["error"])
        field, value = cls.model_fields[str(first["loc"][0])], options.get(str(first["loc"][0]))
        key = str(first["loc"][0])
        if key == "drafter" and isinstance(value, Mapping) and len(first["loc"]) > 1:
            inner = str(first["loc"][1])
            field, value = DrafterOptions.model_fields[inner], value.get(inner)
            key = f"drafter.{inner}"
        if first["type"] == "missing":
            return f'speculative_config key "{key}" is missing; allowed: {field.description}'
        return f'speculative_config key "{key}" is {shown(value)}; allowed: {field.description}'

    def to_json_dict(self) -> dict[str, Any]:
        """JSON-serialisable form of every option; ``parse`` of it gives an equal object."""
        return self.model_dump(mode="json")


class SubspecOptions(DraftingOptions):
    """SubSpec: the target's own substitutes draft while its full weights are streamed.

    A cheap ``drafter`` feeds the substitute, which verifies what it drafts in passes and so drafts
    sequences of up to ``depth`` tokens. Without one the substitute grows trees, of which
    ``num_speculative_tokens`` bounds the nodes and ``branching`` the nodes of a level. They are
    upper limits: with dynamic pruning the cost model (``core/depth.py``) stops earlier, and drafts
    narrower, where more does not pay.
    """

    METHOD = "subspec"
    SEQUENCE = 24

    # Measured (benchmarks/streamed.py): faster than trees that the substitute grows alone.
    drafter: DrafterOptions | None = Field(
        DrafterOptions.model_validate(
            {"method": "ngram", "depth": 10, "branching": 1, "nodes": 10}
        ),
        description='a mapping with a "method", or null (the substitute grows trees itself: also '
        'if "branching" is given and this is not)',
    )
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
    bits: Literal[2, 3, 4, 8] = Field(4, description="2, 3, 4 or 8")
    group_size: Literal[32, 64, 128, 256, -1] | None = Field(
        None,
        description="32, 64, 128, 256, -1 (one group per row) or null (64 below 8 bits, one "
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
    substitute: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="an existing directory or a model name, of a low-bit checkpoint of the same "
        "model, or null to quantise while loading",
    )
    substitute_layers: Literal["auto", "all"] | LayerIndices = Field(
        "auto", description='"auto", "all" or a non-empty list of distinct layer numbers from 0'
    )

    @model_validator(mode="before")
    @classmethod
    def _branching_is_for_trees(cls, given: Any) -> Any:
        if isinstance(given, dict) and "branching" in given:
            return {"drafter": None, **given}
        return given

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
        path = _absolute(value)
        if os.path.exists(path) and not os.path.isdir(path):
            raise ValueError("not a directory")
        return path

    @field_validator("substitute")
    @classmethod
    def _existing_substitute(cls, value: str | None) -> str | None:
        return _directory_or_name(value)

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

    @property
    def trees(self) -> list[str]:
        return [*(["branching"] if self.branching > 1 else []), *super().trees]

    @property
    def lookahead(self) -> int:
        return self.num_speculative_tokens + (self.drafter.nodes if self.drafter else 0)

    def store_path(self) -> Path:
        """Directory of the weight stores: ``store_dir``, or ``subspec`` in vLLM's cache root."""
        if self.store_dir is not None:
            return Path(self.store_dir)
        from vllm import envs  # heavy, and not needed to check options

        return Path(envs.VLLM_CACHE_ROOT) / "subspec"


class HierspecOptions(DraftingOptions):
    """HierSpec: an intermediate model turns a drafter's trees into a sequence for the target."""

    METHOD = "hierspec"
    SEQUENCE = 6

    num_speculative_tokens: int = Field(
        32,
        ge=1,
        le=MAX_SPECULATIVE_TOKENS,
        description=f"an integer from 1 to {MAX_SPECULATIVE_TOKENS}",
    )
    intermediate: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="an existing directory or a model name, or null (the target itself verifies "
        "the drafter's trees)",
    )
    drafter: DrafterOptions = Field(description='a mapping with a "method"')

    @field_validator("intermediate")
    @classmethod
    def _existing(cls, value: str | None) -> str | None:
        return _directory_or_name(value)

    @property
    def limit(self) -> int:
        if self.intermediate is not None:
            return self.num_speculative_tokens
        return min(self.num_speculative_tokens, self.drafter.nodes)

    @property
    def lookahead(self) -> int:
        return self.num_speculative_tokens + (self.drafter.nodes if self.intermediate else 0)


METHODS: dict[str, type[SubspecOptions] | type[HierspecOptions]] = {
    options.METHOD: options for options in (SubspecOptions, HierspecOptions)
}


def check(speculative_config: Mapping[str, Any]) -> None:
    """For programs whose engines start elsewhere, where nobody would see what is wrong.

    Raises:
        ValueError: the mapping names one of our methods and an option is wrong; see `parse`.
    """
    given = dict(speculative_config)
    method = given.pop("method", None)
    if isinstance(method, str) and method in METHODS:
        METHODS[method].parse(given)

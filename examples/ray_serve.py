# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""An OpenAI-compatible service of replicas on Ray Serve.

    python examples/ray_serve.py model=MODEL replicas=2
    serve run examples.ray_serve:app model=MODEL replicas=2

or, as `serve deploy` and a RayService want it, in YAML:

    http_options: {host: 127.0.0.1, port: 8000}
    applications:
      - name: subspec
        import_path: examples.ray_serve:app
        args: {model: MODEL, replicas: 2, speculative_config: {method: subspec, bits: 4}}

Each replica is an engine of its own on one GPU, or on as many as ``engine`` asks for by
``tensor_parallel_size``. It joins the Ray cluster that RAY_ADDRESS names, or starts one here.
"""

import json
import sys
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
)
from ray import serve
from ray.serve.llm import LLMConfig, LLMServingArgs, build_openai_app
from vllm.platforms import current_platform

from vllm_subspec.config import check


def _object(value: Any) -> Any:
    """On a command line an object is given as JSON."""
    return json.loads(value) if isinstance(value, str) else value


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    check(value)
    return value


JsonObject = Annotated[dict[str, Any], BeforeValidator(_object)]


class Service(BaseModel):
    """What `app` is given.

    Args:
        model: name or folder of the target.
        name: by which clients ask for it; ``model`` if not given.
        speculative_config: vLLM's.
        engine: further engine arguments of vLLM.
        replicas: engines side by side.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = None
    speculative_config: Annotated[JsonObject, AfterValidator(_checked)] = {"method": "subspec"}
    engine: JsonObject = {}
    replicas: PositiveInt = 1


class Address(BaseModel):
    """Where ``python examples/ray_serve.py`` listens; `serve run` takes it from its YAML."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)


def app(service: Service) -> serve.Application:
    """The application; Ray Serve calls it with what a command line or YAML says."""
    # Ray asks for GPUs, which a machine without any would wait for without end.
    device = {"accelerator_config": {"kind": "cpu"}} if current_platform.is_cpu() else {}
    config = LLMConfig(
        model_loading_config={
            "model_id": service.name or service.model,
            "model_source": service.model,
        },
        engine_kwargs={**service.engine, "speculative_config": service.speculative_config},
        deployment_config={"num_replicas": service.replicas},
        **device,
    )
    return build_openai_app(LLMServingArgs(llm_configs=[config]).model_dump())


def main(arguments: list[str]) -> int:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    try:
        address = Address.model_validate(
            {key: given.pop(key) for key in Address.model_fields if key in given}
        )
        service = Service.model_validate(given)
    except ValidationError as error:
        wrong = "; ".join(f"{at['loc'][0]}: {at['msg']}" for at in error.errors())
        print(f"ray_serve: {wrong}", file=sys.stderr)
        return 2
    serve.start(http_options=serve.HTTPOptions(host=address.host, port=address.port))
    try:
        serve.run(app(service), blocking=True)
    except KeyboardInterrupt:
        serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

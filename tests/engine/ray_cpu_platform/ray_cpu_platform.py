# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""A platform plugin for tests: vLLM's CPU platform, to which Ray may give devices.

vLLM places one Ray worker on each device and its CPU platform names no kind of device, so the Ray
executor refuses it. Here a rank takes one of the "GPU"s that the test's Ray has been told of, and
computes on the CPU. It is found through its entry point by whoever has this folder on PYTHONPATH.
"""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"


def register() -> str:
    return "ray_cpu_platform.RayCpuPlatform"

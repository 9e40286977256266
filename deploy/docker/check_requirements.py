# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Fails the build of an image that lacks what vllm-subspec needs, or has it in a wrong version."""

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-subspec") or []):
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        sys.exit(f"{requirement} is not installed")
    if not requirement.specifier.contains(found, prereleases=True):
        sys.exit(f"{requirement} is needed, but {found} is installed")

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Algorithms without an engine: nothing here imports vLLM, and each module is testable alone."""

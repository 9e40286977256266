# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Lossless speculative decoding in vLLM for models whose full-precision weights are streamed."""

__version__ = "0.1.0"

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Weights: quantised substitutes, full-precision storage and streaming."""

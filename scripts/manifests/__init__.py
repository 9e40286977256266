# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Checks of deploy/kustomize that need neither a cluster nor a network."""

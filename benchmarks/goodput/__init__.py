# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Goodput of a server under load, with speculation and without: see `__main__`."""

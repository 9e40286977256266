# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Measuring: the machine (`bandwidth`), and ways of drafting beside each other on real engines.

    scenario  ->  measure (session in engine_process)  ->  result  ->  report (plots), trace

A result is plain JSON, so that a report can be made of it anywhere and at any time.
"""

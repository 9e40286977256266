# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""Other ways to run a model that is larger than memory, measured beside vllm-subspec.

A *peer* is one such way. Its adapter is a module here that loads a model and hands `serving.serve`
one function: prompt in, tokens out, greedy, one request at a time, the end-of-text token ignored.
Each runs as a process of its own, in its own environment (`environments`) and in a memory group
(`memory`) whose limit is the same for all. The driver (`python -m benchmarks.peers`) starts them
and lets them take turns, prompt by prompt, so that what else the machine does meets all alike.

Prompts and answers are token ids: nobody's tokenizer can differ.
"""

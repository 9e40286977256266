# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""What the machine is. Imports nothing of vLLM and, by itself, no torch."""

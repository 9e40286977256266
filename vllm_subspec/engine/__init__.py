# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The only rooms that touch vLLM's runner, scheduler and attention. No algorithm lives here."""

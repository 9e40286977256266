# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""The ``vllm-subspec`` command. Each sub-command is a module with ``add_arguments`` and ``run``."""

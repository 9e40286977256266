#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
# `vllm serve` with the threads, OpenMP and allocator that are fastest on this machine.
set -euo pipefail
environment=$(python /srv/vllm-subspec/cpu_env.py)
eval "$environment"
exec vllm serve "$@"

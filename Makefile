# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
SHELL := /bin/bash
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# Threads, OpenMP and allocator for vLLM's CPU backend; empty on a CUDA installation.
FAST := environment="$$($(VENV_PYTHON) scripts/cpu_env.py)" && eval "$$environment" &&

.DEFAULT_GOAL := help
.PHONY: help setup wheel test lint manifests soak demo bench goodput clean

help:  ## list these commands
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup:  ## make .venv with vLLM for this machine (done once, then quick)
	@$(PYTHON) scripts/setup.py

wheel: setup  ## build a wheel with compiled kernels into dist/, for machines without a compiler
	@$(VENV_PYTHON) -m scripts.wheel

# Engines in processes of their own: vLLM's process groups live as long as the process. The tests of
# a file share engines. Exit 5 is pytest's "nothing selected", which is fine for one of the two when
# ARGS choose.
test: setup  ## run the tests (ARGS="-k store" to choose)
	@for tests in "tests/unit tests/gpu" tests/engine; do \
	    ($(FAST) $(VENV_PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder $$tests $(ARGS)) \
	        || { [ $$? -eq 5 ] && [ -n '$(ARGS)' ]; } || exit 1; \
	done

lint: setup  ## style, formatting, types, and the README's figures
	@.venv/bin/python scripts/figures.py --check
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

manifests: setup  ## Dockerfiles and Kubernetes manifests, without a cluster
	@.venv/bin/hadolint deploy/docker/Dockerfile.*
	@$(VENV_PYTHON) -m scripts.manifests

soak: setup  ## up to 10,000 random requests with trees against none, in 12 minutes
	@$(FAST) $(VENV_PYTHON) -m tests.soak $(ARGS)

demo: setup  ## stream a model from disk with and without SubSpec, side by side
	@$(FAST) $(VENV_PYTHON) -m benchmarks.demo $(ARGS)

bench: setup  ## measure the figures in benchmarks/ (ARGS are passed on)
	@$(FAST) $(VENV_PYTHON) -m benchmarks.streamed $(ARGS)

goodput: setup  ## measure a server under load with and without speculation (ARGS are passed on)
	@$(FAST) $(VENV_PYTHON) -m benchmarks.goodput $(ARGS)

clean:  ## remove .venv, caches and everything the demo and benchmarks made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

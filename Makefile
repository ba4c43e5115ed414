# make demo    a real video through a video-language model, reduced and unreduced, with times
# make test    the tests
# make check   the rest: style, instruction sets, transformers versions, sanitizers, packaging, docs, examples, GPU kernels
# make gpu-check  of these, what proves the GPU kernels without a GPU
# make bench   every benchmark, then the CSV, the README table and the plots
# make build   the extension in place, python/vidtok/_C.*.so; PYTHON=... takes another interpreter than .venv's
#
# Each makes .venv first, from constraints/dev.txt, with BASE_PYTHON (3.10 to 3.13).
SHELL := /bin/bash
BASE_PYTHON ?= python3
PYTHON ?= .venv/bin/python
# Tests share few cores: one process per core, each with one thread. An empty PYTEST_WORKERS runs them in one process.
CORES := $(shell nproc 2>/dev/null || echo 1)
PYTEST_WORKERS ?= $(shell n=$(CORES); echo $$((n < 4 ? n : 4)))
PYTEST := $(PYTHON) -m pytest -q
PARALLEL := $(if $(PYTEST_WORKERS),-n $(PYTEST_WORKERS) --dist worksteal)
RUN := PYTHONPATH=python
TIMED := @scripts/timed
HF_OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export PYTHONDONTWRITEBYTECODE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

GPU_CHECKS := gpu-host gpu-asan gpu-triton gpu-compile
CHECKS := lint isa transformers-4.57.6 transformers-5.17.0 vision-libraries asan tsan packaging docs examples bench-smoke slow $(GPU_CHECKS)

.PHONY: help venv build install demo test check gpu-check bench clean $(addprefix check-,$(CHECKS))
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -6; echo "checks: $(CHECKS:%=check-%)"

venv:
ifeq ($(PYTHON),.venv/bin/python)
	@scripts/venv .venv $(BASE_PYTHON)
endif

build: venv
	$(PYTHON) setup.py -q build_ext --inplace

install: venv
ifeq ($(PYTHON),.venv/bin/python)
	@$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
else
	@$(PYTHON) setup.py -q build_ext --inplace
endif

demo: install
	$(RUN) $(PYTHON) -m vidtok demo $(DEMO_ARGS)

test:
	$(TIMED) test 15 $(MAKE) --no-print-directory _test

_test: install
	$(HF_OFFLINE) $(if $(PYTEST_WORKERS),OMP_NUM_THREADS=1) $(PYTEST) $(PARALLEL) -m "not slow and not packaging" --durations=10 $(TEST_ARGS)

check: install
	@$(MAKE) -k --no-print-directory $(addprefix check-,$(CHECKS))

# The GPU kernels without a GPU: on the host, in Triton's interpreter, and compiled for every SM.
gpu-check: install
	@$(MAKE) -k --no-print-directory $(addprefix check-,$(GPU_CHECKS))

check-gpu-host: venv
	$(TIMED) gpu-host 6 bash -c 'scripts/gpu_host $(PYTHON) 80 && scripts/gpu_host $(PYTHON) 70'

check-gpu-asan: venv
	$(TIMED) gpu-asan 7 scripts/gpu_host $(PYTHON) 80 address,undefined

check-gpu-triton: install
	$(TIMED) gpu-triton 5 env TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -n 2 tests/kernels/test_triton.py tests/kernels/test_triton_paths.py tests/kernels/test_knobs.py

check-gpu-compile: venv
	$(TIMED) gpu-compile 8 bash -c 'status=0; $(PYTHON) scripts/cuda_compile || status=1; $(PYTHON) scripts/triton_compile || status=1; exit $$status'

check-lint: venv
	$(TIMED) lint 2 scripts/lint $(PYTHON)

check-isa: install
	$(TIMED) isa 6 env $(HF_OFFLINE) scripts/each_isa $(PYTHON) tests/ops tests/methods

# A static pattern: make looks for no implicit rule of a phony target, and would call it done.
$(filter check-transformers-%,$(addprefix check-,$(CHECKS))): check-transformers-%: install
	$(TIMED) transformers-$* 5 env $(HF_OFFLINE) scripts/with_transformers $* $(PYTHON) --families core tests/models tests/merge tests/systems tests/training

check-vision-libraries: install
	$(TIMED) vision-libraries 2 env $(HF_OFFLINE) scripts/with_vision_libraries $(PYTHON) tests/models/towers/test_timm.py tests/models/towers/test_open_clip.py

check-asan: venv
	$(TIMED) asan 8 scripts/asan $(PYTHON) tests/ops tests/kernels/test_proportional_attention.py

check-tsan: venv
	$(TIMED) tsan 2 scripts/tsan $(PYTHON)

check-packaging: install
	$(TIMED) packaging 14 $(PYTEST) -m packaging tests/packaging

check-docs: install
	$(TIMED) docs 2 env $(HF_OFFLINE) scripts/docs $(PYTHON)

check-examples: install
	$(TIMED) examples 4 env $(HF_OFFLINE) $(PYTEST) tests/models/test_examples.py

check-bench-smoke: install
	$(TIMED) bench-smoke 3 scripts/bench_smoke $(PYTHON)

check-slow: install
	$(TIMED) slow 6 env $(HF_OFFLINE) $(PYTEST) -m "slow and not packaging" --ignore tests/models/test_examples.py tests

bench: install
	$(PYTHON) -m bench $(BENCH_ARGS)
	$(if $(BENCH_ARGS),,$(PYTHON) -m bench.decoder)
	$(if $(BENCH_ARGS),,$(PYTHON) -m bench.vision)

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache python/*.egg-info python/vidtok/_C.*.so python/vidtok/_cuda.*.so

# Every target does the set-up it needs. PYTHON makes the .venv; gpu-check uses it as it is.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DATA ?= scenes
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Images set it; each of the tests' processes would compile what the one before it compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help build native test test-fast lint format demo bench sanitize gate gate-static gate-update \
  gate-static-update mutants gpu-check dispatch zoo docs wheel test-wheel test-torch clean

help:
	@echo "make build   .venv, pinned dependencies, compiled kernels"
	@echo "make test    the whole test suite"
	@echo "make demo    train, distil, caption and time on generated scenes (DATA=emoji: real drawings)"
	@echo "make bench   benchmarks against stock PyTorch into benchmarks/results/ (PEERS=1: and beside"
	@echo "             ONNX Runtime, OpenVINO, MNN, ...)"
	@echo "make zoo     other people's models, as they are and optimized (MODELS=, needs the network)"
	@echo "make lint    ruff, ruff-format, clang-format, import-linter, mypy"
	@echo "make docs    the documentation's site into build/site"
	@echo "make wheel   a wheel of the CPU kernels into dist/; make test-wheel: one and an sdist, tried"
	@echo "make test-torch TORCH=2.15.0   the core of the tests with another torch"
	@echo "make gpu-check  CUDA tests and benchmarks by PYTHON, no .venv (OPS= STAGE= MINUTES=)"
	@echo "make dispatch   RESULTS=file of gpu-check into the dispatch tables"
	@echo "make sanitize   every kernel under ASan, UBSan and TSan, between guard pages"
	@echo "make gate       CPU instruction counts and GPU registers, spills, ... against benchmarks/"
	@echo "                (FULL=1: every dtype, configuration and target)"
	@echo "make gate-update   records both anew and prints what moved (BECAUSE='why it is worse')"
	@echo "make gate-static, gate-static-update   GPU part alone; TRITON=3.6.0: by that version"
	@echo "make mutants    plants bugs in the kernels and shows that the tests catch them"

build: native

$(VENV)/.installed: constraints.txt pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools wheel pybind11 ninja
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# ninja decides what is stale; with nothing to do this takes 0.1 s.
native: $(VENV)/.installed
	@$(PY) setup.py -q build_ext --inplace

test: native
	$(PY) -m pytest -n auto --dist worksteal

test-fast: native
	$(PY) -m pytest -m "not slow"

lint: native
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(PY) -m mypy

format: native
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(VENV)/bin/clang-format -i

demo: native
	$(PY) -m mbm_kernels caption demo --data $(DATA)

# Engines without their dependencies: numpy is there, and OpenVINO's is its telemetry. zentorch, whose
# minor version is torch's, runs on CPUs with AVX-512 alone.
ENGINES = onnxruntime openvino MNN \
  $(if $(shell grep -m1 -w avx512f /proc/cpuinfo),"zentorch==$$($(PY) -c 'import torch; print(torch.__version__.rpartition(".")[0])').*")

bench: native
	$(if $(PEERS),$(PY) -m pip install -q --no-deps -c constraints.txt $(ENGINES))
	$(PY) -m benchmarks --publish $(if $(PEERS),--peers)

# Without their dependencies, among which is a torch of gigabytes; pyyaml and the rest are timm's.
zoo: native
	$(PY) -m pip install -q --no-deps torchvision==0.28.0 timm huggingface_hub safetensors pyyaml
	$(PY) -m benchmarks.zoo --save $(MODELS)

# The pages that commands write are tests/docs's; a test says when one is out of date.
# Without -q, which would hide warnings from --strict.
docs: native
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# CPU kernels alone; it links the objects that make build compiled.
wheel: $(VENV)/.installed
	rm -rf build/lib.* build/bdist.*
	MBM_CUDA=0 $(PY) setup.py -q bdist_wheel --dist-dir dist

test-wheel: wheel
	$(PY) setup.py -q sdist --dist-dir dist
	DIST=dist $(PY) -m pytest -n0 tests/wheel -s

# Another torch, in a folder of its own without its dependencies, which Python then looks into first.
# TORCH_INDEX= is the package index to take it from, where pip's own has CUDA builds alone.
build/torch-%: | $(VENV)/.installed
	$(PY) -m pip install -q --no-deps --target $@ $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$*

CORE_TESTS = tests/core tests/ops/test_gru.py tests/ops/test_gru_cell.py \
  tests/ops/test_conv_bias_act.py tests/ops/test_additive_attention.py \
  tests/ops/test_cross_attention.py tests/ops/test_linear_cross_entropy.py

test-torch: native $(if $(TORCH),build/torch-$(TORCH))
	@test -n "$(TORCH)" || { echo "test-torch: say which: make test-torch TORCH=2.15.0"; exit 2; }
	PYTHONPATH=$(CURDIR)/build/torch-$(TORCH) $(PY) -c "import torch; print('torch', torch.__version__)"
	PYTHONPATH=$(CURDIR)/build/torch-$(TORCH) $(PY) -m pytest -n auto --dist worksteal -m "not slow" $(CORE_TESTS)

sanitize: native
	$(PY) -m tests.gates.sanitize

# TRITON= is downloaded into a folder of its own, which Python then looks into first.
TRITON_PATH := $(if $(TRITON),build/triton-$(TRITON))
STATIC = env -u TRITON_INTERPRET PYTHONPATH=$(TRITON_PATH) $(PY) -m mbm_kernels gate static

build/triton-%: | $(VENV)/.installed
	$(PY) -m pip install -q --no-deps --target $@ triton==$*

gate: native $(TRITON_PATH)
	$(PY) -m tests.gates.instructions
	$(STATIC) $(if $(FULL),--full)
	$(PY) -m mbm_kernels.gate.cuda

gate-static: native $(TRITON_PATH)
	$(STATIC) $(if $(FULL),--full)
	$(PY) -m mbm_kernels.gate.cuda

gate-update: native $(TRITON_PATH)
	$(PY) -m tests.gates.instructions --update
	$(STATIC) --full --update $(if $(BECAUSE),--because '$(BECAUSE)')
	$(PY) -m mbm_kernels.gate.cuda --update $(if $(BECAUSE),--because '$(BECAUSE)')

# With TRITON= what the gate compiles without FULL=1: that is what is held of another version.
gate-static-update: native $(TRITON_PATH)
	$(STATIC) $(if $(TRITON),,--full) --update $(if $(BECAUSE),--because '$(BECAUSE)')

mutants: native
	$(PY) -m tests.gates.mutants

# It builds in place. No .venv and no download: PYTHON brings torch, triton, pybind11, ninja, pytest, typer and rich.
gpu-check:
	$(PYTHON) -m mbm_kernels.bench.gpu.check

dispatch: native
	$(PY) -m mbm_kernels.bench.dispatch_tables $(RESULTS)

clean:
	rm -rf build out dist *.egg-info mbm_kernels/*.so

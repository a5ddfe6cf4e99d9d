# make demo | test | aot | sanitize | emulate | lint | format | wheel | sdist | bench | report | gpu | clean
# variables: PYTHON, TORCH, TRITON, PIP_ARGS, PYTEST_ARGS; of wheel: CUDA, ARCHS

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
PIP_ARGS ?= --quiet
PYTEST_ARGS ?= -n auto
CUDA ?=
ARCHS ?=

VENV := .venv
PY := $(VENV)/bin/python
# absolute, so that no `pip` or `ninja` of another Python on PATH is taken by the build
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NATIVE_SOURCES := setup.py $(wildcard build_*.py) $(shell find csrc -type f 2>/dev/null)

.DELETE_ON_ERROR:
.PHONY: demo test aot sanitize emulate lint format wheel sdist bench report gpu install clean

demo: install
	$(PY) -m fastattn demo

test: install
	$(PY) -m pytest $(PYTEST_ARGS)

# every GPU kernel, feature, tile and architecture, compiled and held to tests/resources/*.json; a second of one core for
# each of some thousand kernels.  AOT_UPDATE=1 writes the files.
aot: install
	AOT_ALL=1 $(PY) -m pytest $(PYTEST_ARGS) tests/test_triton_aot.py tests/test_cuda_resources.py

# The CPU kernels and what calls them under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
# Python is not built for it: the libraries are preloaded, leaks are not looked for, and torch's own ones are not seen.
# With -O3 the checks would take a compiler half an hour.
SANITIZE := build/sanitize
SANITIZERS = $(foreach library,libasan.so libubsan.so,$(shell $${CXX:-g++} -print-file-name=$(library)))
SANITIZED ?= tests/test_cpu_backend.py tests/test_cpu_bad_numbers.py tests/test_cpu_decode.py tests/test_cpu_math.py \
	tests/test_masked_softmax.py tests/test_apply_rotary.py tests/test_additive_attention.py tests/test_lengths_and_views.py tests/test_masked_values.py
sanitize: install
	FASTATTN_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1" \
		$(PY) setup.py -q build_ext --build-lib $(SANITIZE) --build-temp $(SANITIZE)/objects
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		FASTATTN_CPU_LIBRARY=$(CURDIR)/$(SANITIZE)/fastattn/lib/libfastattn_cpu.so \
		$(PY) -m pytest $(PYTEST_ARGS) $(SANITIZED)

# The CPU kernels for tile registers (AMX) on a processor that has none but AVX-512 with bf16: a header does what the
# instructions do, in a build of its own.
EMULATE := build/emulate
EMULATED ?= tests/test_cpu_backend.py tests/test_cpu_bad_numbers.py tests/test_cpu_decode.py tests/test_cpu_weights.py \
	tests/test_precision.py
emulate: install
	FASTATTN_CXXFLAGS="-DFASTATTN_EMULATE_AMX" \
		$(PY) setup.py -q build_ext --build-lib $(EMULATE) --build-temp $(EMULATE)/objects
	FASTATTN_CPU_LIBRARY=$(CURDIR)/$(EMULATE)/fastattn/lib/libfastattn_cpu.so FASTATTN_CPU_ISA=amx \
		$(PY) -m pytest $(PYTEST_ARGS) $(EMULATED)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(VENV)/bin/clang-format -i

# make wheel, or make wheel CUDA=13.0 ARCHS="80;90a;100a;120": see release/README.md
wheel: $(VENV)/.release
	$(PY) release/wheel.py --cuda '$(CUDA)' --archs '$(ARCHS)'

sdist: $(VENV)/.release
	$(PY) -m build --no-isolation --sdist

bench: install
	$(PY) -m fastattn bench

# bench/results/report.html, one page of everything in bench/results/*.csv
report: install
	$(PY) -m fastattn.bench.page

# the machine's own Python and torch, no virtual environment, no network: see bench/gpu.sh
gpu:
	PYTHON=$(PYTHON) bash bench/gpu.sh

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastattn needs Python 3.10 or newer")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_ARGS) --upgrade 'pip>=25.1' 'setuptools>=77' wheel ninja pybind11
	$(PY) -m pip install $(PIP_ARGS) '$(TORCH)' '$(TRITON)'
	touch $@

# what wheels are built with: less than what tests need
$(VENV)/.release: $(VENV)/.torch pyproject.toml
	$(PY) -m pip install $(PIP_ARGS) --group release
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE_SOURCES)
	$(PY) -m pip install $(PIP_ARGS) --no-build-isolation --editable '.[demo,test,bench,dev]'
	touch $@

clean:
	rm -rf build dist .pytest_cache .hypothesis .ruff_cache .benchmarks *.egg-info fastattn/lib
	find . -name __pycache__ -not -path './$(VENV)*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.release fastattn/_native*.so

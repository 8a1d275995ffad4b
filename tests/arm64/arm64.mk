# The parts of the emulated arm64 computers (docs/raspberry-pi.md), all in build/arm64, with a stamp for each step.

ARM64  := $(CURDIR)/build/arm64
LLAMA  := $(ARM64)/llama-$(shell sed -n 's/^llama_cpp_python==//p' constraints.txt)
CROSS  := PATH="$(abspath $(BIN)):$$PATH" nice cmake
CONFIG := $(CROSS) -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/tests/arm64/toolchain.cmake

# A log instead of pages on the terminal, shown only if the command fails: $(call quietly,LOG,COMMAND).
quietly = { $(2); } >$(1) 2>&1 || { cat $(1); exit 1; }

.PHONY: test-arm64
test-arm64: $(ARM64)/.debian $(ARM64)/.wheels $(ARM64)/.packages $(LLAMA)/.baseline $(LLAMA)/.dotprod | $(VENV)/.dev
	$(BIN)/python -m pytest tests/arm64/compare.py

# What is installed on this machine; everything else stays in build/arm64.
$(ARM64)/.tools:
	@mkdir -p $(ARM64)
	@command -v qemu-aarch64-static >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null || { \
	    echo "installing Debian's emulator and cross compiler for arm64"; \
	    $(call quietly,$(ARM64)/tools.log,apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes \
	        --no-install-recommends -o DPkg::Lock::Timeout=600 qemu-user-static g++-aarch64-linux-gnu); }
	@touch $@

# Debian's arm64 Python with its libraries. apt keeps books for an empty arm64 machine in build/arm64/apt, from this
# machine's sources: it resolves and verifies as always, and this machine's package state stays what it is.
APT_ARM64 := apt-get -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State=$(ARM64)/apt \
             -o Dir::State::status=$(ARM64)/apt/status -o Dir::Cache=$(ARM64)/apt
$(ARM64)/.debian: $(ARM64)/.tools
	@echo "unpacking Debian's Python for arm64"
	@rm -rf $(ARM64)/debian
	@mkdir -p $(ARM64)/apt/lists/partial $(ARM64)/apt/archives/partial
	@touch $(ARM64)/apt/status
	@$(call quietly,$(ARM64)/debian.log,$(APT_ARM64) update && $(APT_ARM64) install --yes --download-only \
	    --no-install-recommends python3.11 libstdc++6 libgomp1)
	@for deb in $(ARM64)/apt/archives/*.deb; do dpkg-deb --extract "$$deb" $(ARM64)/debian || exit 1; done
	@touch $@

# What edgevlm and the tests of the kernels import, but for llama-cpp-python, which has no wheels.
$(ARM64)/.wheels: constraints.txt | $(VENV)/bin/python
	@echo "unpacking wheels for arm64"
	@rm -rf $(ARM64)/wheels
	@$(PIP) --target $(ARM64)/wheels --only-binary=:all: --implementation cp --python-version 3.11 \
	    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
	    numpy pillow onnxruntime typer jinja2 diskcache pytest hypothesis
	@touch $@

$(LLAMA)/.source: | $(VENV)/bin/python
	@echo "unpacking the sources of llama-cpp-python"
	@rm -rf $(ARM64)/llama-*
	@mkdir -p $(LLAMA)/source
	@$(BIN)/python -m pip --quiet download --no-deps --no-binary llama-cpp-python --dest $(LLAMA) llama-cpp-python
	@tar --extract --file $(LLAMA)/*.tar.gz --directory $(LLAMA)/source --strip-components 1
	@rm $(LLAMA)/*.tar.gz
	@touch $@

# llama.cpp for the baseline of arm64, which the Cortex-A72 of a Raspberry Pi 4 is; and, for CPUs with dot product, its
# CPU backend once more: the one library that differs.
$(LLAMA)/.baseline: MARCH = armv8-a
$(LLAMA)/.baseline: LIBRARY = llama
$(LLAMA)/.dotprod: MARCH = armv8.2-a+dotprod
$(LLAMA)/.dotprod: LIBRARY = ggml-cpu
$(LLAMA)/.baseline $(LLAMA)/.dotprod: $(LLAMA)/.%: $(LLAMA)/.source $(ARM64)/.tools | $(VENV)/.dev
	@echo "compiling llama.cpp for $(MARCH) (once; some minutes)"
	@$(call quietly,$(LLAMA)/$*.log,$(CONFIG) -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/$* \
	    -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=$(MARCH) \
	    $(foreach part,COMMON TESTS TOOLS EXAMPLES SERVER APP,-DLLAMA_BUILD_$(part)=OFF) && \
	    $(CROSS) --build $(LLAMA)/$* --target $(LIBRARY))
	@touch $@

$(ARM64)/.kernels: CMakeLists.txt $(wildcard kernels/*.[ch]) $(ARM64)/.tools | $(VENV)/.dev
	@echo "compiling the kernels and their checker for arm64"
	@$(call quietly,$(ARM64)/kernels.log,$(CONFIG) -S . -B $(ARM64)/kernels -DEDGEVLM_CHECK=ON \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python && $(CROSS) --build $(ARM64)/kernels)
	@touch $@

# The Python files as they are here, each package with its arm64 libraries.
$(ARM64)/.packages: $(ARM64)/.kernels $(LLAMA)/.source $(wildcard edgevlm/*)
	@rm -rf $(ARM64)/packages
	@mkdir -p $(ARM64)/packages/edgevlm $(ARM64)/packages/llama_cpp
	@ln -s $(CURDIR)/edgevlm/* $(ARM64)/kernels/_kernels.abi3.so $(ARM64)/packages/edgevlm
	@ln -s $(LLAMA)/source/llama_cpp/*.py $(ARM64)/packages/llama_cpp
	@ln -s $(LLAMA)/baseline/bin $(ARM64)/packages/llama_cpp/lib
	@touch $@

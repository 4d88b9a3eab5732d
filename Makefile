# make demo and make test each do everything on a fresh machine with Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh')

.PHONY: demo test fuzz sanitize soak lint format build bench wheel wheel-check versions integrations cuda-check cuda-model docs clean

# Threads that spin while they wait are a fifth faster alone, and many times slower beside other processes.
demo: $(VENV)/.ready build
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/python -m prunekernels demo --out out/demo

# Everything, in as many processes as there are cores, two at most (WORKERS=N: N at most). FAST=1: one case of each
# test function.
test: $(VENV)/.ready build
	$(BIN)/python -m pytest python_tests -n auto --maxprocesses $(or $(WORKERS),2) --dist worksteal $(if $(FAST),--fast)

# CASES random convolutions (5000), as a function, in masked and in live mode, against the reference, and as many
# networks in live mode against masked mode. A failure prints the command that repeats it.
fuzz: $(VENV)/.ready build
	$(BIN)/python -m pytest -q python_tests/nn/test_fuzz_modes.py python_tests/nn/test_fuzz_blocks.py \
	    --fuzz-cases $(or $(CASES),5000)

# The CPU kernels and operators under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer: builds
# the extension for both (g++), then runs a part of the suite (FAST=1: one case of each test). csrc/sanitize/sanitize.py
# says what it cannot see.
sanitize: $(VENV)/.ready
	$(BIN)/python csrc/sanitize/sanitize.py $(if $(FAST),--fast)

# STEPS steps (10000) of a small network with other masks every 50, in both modes and precisions: memory is flat, modes
# end alike in float64, weights and momentum are normal numbers. Prints the CPU time of early and late steps; asserts
# nothing of it. Then training runs are killed at KILLS moments (200), and resumed. Ten minutes or so.
soak: $(VENV)/.ready build
	$(BIN)/python -m pytest -q -s python_tests/interplay/test_soak.py --soak-steps $(or $(STEPS),10000)
	$(BIN)/python -m pytest -q -s python_tests/train/test_killed.py --kills $(or $(KILLS),200)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.ready build
	$(BIN)/python benchmarks/conv.py --suite resnet50 vgg16_cifar resnet56_cifar --kept 0.7 0.5 0.3

# dist/: the source archive, the wheel for any machine, and a CPU wheel for each Python >= 3.10 of this machine
# (PYTHONS="cp311 cp312": for these).
wheel: $(VENV)/.ready
	$(BIN)/python wheels/build.py $(if $(PYTHONS),--only $(PYTHONS))

# Each of them in an environment of its own, without a compiler: what pip takes, and a part of the suite.
wheel-check: $(VENV)/.ready
	$(BIN)/python wheels/check.py $(if $(PYTHONS),--only $(PYTHONS))

# The last commit with other releases of PyTorch and other Pythons (PYTHONS="cp311 cp312"; that of .venv), built and
# tested one after the other in environments of their own: make versions TORCHES="2.8.0 2.14.1". PLAIN=1: without the
# extension; FAST=1: one case of each test function; WITHOUT="cuda integrations": not these of python_tests. Several
# gigabytes each where torch is a CUDA build. Then `python docs/results.py` fills the table of docs/installing.md.
versions: $(VENV)/.ready
	$(BIN)/python wheels/versions.py $(TORCHES) $(if $(PYTHONS),--only $(PYTHONS)) $(if $(PLAIN),--plain) \
	    $(if $(FAST),,--whole) $(if $(WITHOUT),--without $(WITHOUT))

# The training libraries and their examples, in an environment of their own: ultralytics needs a torchvision, which has
# to be of torch's own release, and some indexes have it for few of them. Several gigabytes where torch is a CUDA build.
# Without the extension, which is built for the torch of .venv.
integrations: $(VENV)-integrations/.ready
	$(VENV)-integrations/bin/python -m pytest -q python_tests/integrations
	for example in lightning hf yolo; do \
	    $(VENV)-integrations/bin/python examples/$${example}_prune.py || exit 1; done

# Every CUDA kernel for every architecture, registers, spills and main loops; needs nvcc, but no GPU.
cuda-check: $(VENV)/.ready
	$(BIN)/python csrc/cuda/cuda_check.py
	$(BIN)/python csrc/cuda/model/loops.py

# What the CUDA kernels should take, without a GPU: csrc/cuda/model/prediction.md.
cuda-model: $(VENV)/.ready
	$(BIN)/python csrc/cuda/model/cuda_model.py

# The pages of docs/ as site/; a broken link and a public name without a page fail. docs/results.py makes tables and plots.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Compiles what changed since the last time.
build: $(VENV)/.ready
	$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)" numpy ninja pybind11 "setuptools>=64" wheel
	PRUNEKERNELS_NO_EXT=1 $(BIN)/python -m pip install -q --no-build-isolation -e ".[cli,demo,test,dev,docs]"
	touch $@

$(VENV)-integrations/.ready: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q torch torchvision numpy ninja pybind11 "setuptools>=64" wheel
	PRUNEKERNELS_NO_EXT=1 $(@D)/bin/python -m pip install -q --no-build-isolation -e ".[integrations,test]"
	touch $@

clean:
	rm -rf build dist out site $(VENV) $(VENV)-integrations *.egg-info prunekernels/_C*.so

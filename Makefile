# Every command of the project. `make help` lists them; the text after ## is the help.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
WITH_RAY := $(PIP) -c torch.txt -c constraints.txt -e '.[ray]'
export PRESET MODEL METHOD SEED DATASETS ARTIFACTS VRAM_GB ENGINE WORKERS STRATEGY

.DEFAULT_GOAL := help
.PHONY: help setup ml quantize distill tune accounting kernels drift-study curate-corpus ai demo serve loop rollback bench report compare fit bench-peers load soak faults replicas scaling pretrain datasheet attack audit lock doctor workshop check answer test test-all lint format clean distclean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(VENV)/installed ## create .venv and install everything (again: seconds). TORCH_INDEX=url picks another torch wheel index

# torch comes first: left to the resolver, pip would take the newest CUDA build, several GB, on machines without a GPU.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V). Set PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -e; \
	if [ -n "$(TORCH_INDEX)" ]; then echo "torch from $(TORCH_INDEX)"; $(PIP) -c torch.txt torch --index-url "$(TORCH_INDEX)"; \
	elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then echo "NVIDIA GPU found: torch with CUDA"; $(PIP) -c torch.txt torch; \
	elif [ "$$(uname -s)" = Linux ]; then echo "no GPU found: torch for CPU"; \
	  $(PIP) -c torch.txt torch --index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20 2>/dev/null || $(PIP) -c torch.txt torch; \
	else $(PIP) -c torch.txt torch; fi
	@echo "installing the other packages (a few minutes the first time)"
	@$(PIP) -c torch.txt -c constraints.txt -e '.[dev]'
	@touch $@

ml: setup ## ML track: leaflets -> LoRA -> 4-bit -> evaluated, measured, published. PRESET=, MODEL=, METHOD=qlora, VRAM_GB=8, ENGINE=torchrun|ray WORKERS=2
	$(if $(filter ray,$(ENGINE)),@$(WITH_RAY))
	@$(BIN)/python -m ml_engineer_track run

quantize: setup ## fewer bits: without BITS the 4- and 8-bit variants; BITS=2, 3, 4 or mixed: the study below 4 bits, that model repaired
	@$(BIN)/python -m ml_engineer_track $(if $(BITS),low-bits --bits "$(BITS)",quantize)

distill: setup ## a student of a third of the published model's size, published beside it. PRESET= NO_TEACHER=1 TEACHER=, STUDENT=folder
	@$(BIN)/python -m ml_engineer_track distill $(if $(NO_TEACHER),--no-teacher) $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(STUDENT),--student "$(STUDENT)")

kernels: setup ## the Triton kernels: right on this device? On a GPU also how fast, beside bitsandbytes and bf16
	@$(BIN)/python -m ml_engineer_track kernels

tune: setup ## search LoRA rank, alpha, targets and learning rate by short fine-tunings; goes on where it was. TRIALS= MINUTES= PRESET=
	@$(BIN)/python -m ml_engineer_track tune $(if $(TRIALS),--trials "$(TRIALS)") $(if $(MINUTES),--minutes "$(MINUTES)")

accounting: setup ## memory and FLOPs of a training step, predicted and measured, and what fits VRAM_GB=8. PRESET=, METHOD=qlora
	@$(BIN)/python -m ml_engineer_track accounting

drift-study: setup ## how often the watch for drift cries wolf, and how soon it finds a change that was put there
	@$(BIN)/python -m ml_engineer_track drift-study

curate-corpus: setup ## malformed and repeated questions out of a corpus larger than memory. SHARDS=folder of *.jsonl INTO=folder
	@test -n "$(SHARDS)" -a -n "$(INTO)" || { echo "error: SHARDS=<folder of *.jsonl> and INTO=<folder> are needed" >&2; exit 2; }
	@$(WITH_RAY)
	@$(BIN)/python -m ml_engineer_track curate-corpus "$(SHARDS)" --into "$(INTO)"

ai: setup ## AI track: the same model as a product: indexed, talked to, judged, measured. LLM_BASE_URL=, LLM_MODEL=
	@test -e $(or $(ARTIFACTS),artifacts)/models/current || test -n "$(LLM_BASE_URL)" || $(BIN)/python -m ml_engineer_track run
	@$(BIN)/python -m ai_engineer_track run

demo: ml ai ## both tracks, one after the other

serve: setup ## the running service with its web page, on PORT=8000. REPLICAS=2: as many of it, one replaced after the other
	@test -e $(or $(ARTIFACTS),artifacts)/models/current || test -n "$(LLM_BASE_URL)" || $(BIN)/python -m ml_engineer_track run
	$(if $(REPLICAS),@$(WITH_RAY))
	@$(BIN)/python -m ai_engineer_track $(if $(REPLICAS),serve-ray --replicas "$(REPLICAS)",serve)

loop: setup ## what the product got wrong becomes the next model: two demonstrations. WATCH=1: look every hour; LOOK=1: once, at your own model
	@$(BIN)/python -m ml_engineer_track loop $(if $(WATCH),--watch,$(if $(LOOK),,--demonstrate))

rollback: setup ## the version before the current one is current again, also while it is served
	@$(BIN)/python -m ml_engineer_track models rollback

bench: setup ## measure this machine. SUITE=latency,serving BUDGET=5m MODEL=folder DEVICE=cpu|cuda OUT=file
	@$(BIN)/python -m benchmarks run --suite "$(SUITE)" --budget "$(BUDGET)" --model "$(MODEL)" --device "$(DEVICE)" $(if $(OUT),--out "$(OUT)")

report: setup ## one HTML page and one Markdown table of the last run. RESULT=file
	@$(BIN)/python -m benchmarks report $(RESULT)

compare: setup ## is B better than A? A= and B= result files or commits; exit status 1 when something got worse
	@test -n "$(A)" -a -n "$(B)" || { echo "error: A=<result or commit> and B=<result or commit> are needed" >&2; exit 2; }
	@$(BIN)/python -m benchmarks compare "$(A)" "$(B)"

fit: setup ## will it fit? memory by component. MODEL=folder or id METHOD=lora|qlora|full CONTEXT=4096 BATCH=4
	@$(BIN)/python -m benchmarks fit --model "$(or $(MODEL),ml_engineer_track/base_model)" --method "$(or $(METHOD),lora)" \
	  --context $(or $(CONTEXT),2048) --batch $(or $(BATCH),1)

bench-peers: setup ## other engines and trainers on the same model. PEERS=llama.cpp,trl INSTALL=1 makes their environments
	@$(BIN)/python -m benchmarks peers --only "$(PEERS)" --model "$(MODEL)" $(if $(INSTALL),--install)

load: setup ## how many people a second the service takes, and what it does beyond that
	@$(BIN)/python -m benchmarks steady

faults: setup ## break one thing after another while twenty people talk to the service. ONLY=kill-inference,full-disk
	@$(BIN)/python -m benchmarks faults --only "$(ONLY)"

soak: setup ## people arrive for MINUTES=60 at RATE=0.5 a second: do memory and open files stay flat?
	@$(BIN)/python -m benchmarks soak --minutes $(or $(MINUTES),60) --rate $(or $(RATE),0.5)

replicas: setup ## kill one of REPLICAS=2 servers under load, then replace all by a new version: what do people notice?
	@$(WITH_RAY)
	@$(BIN)/python -m benchmarks replicas $(if $(REPLICAS),--replicas "$(REPLICAS)")

scaling: setup ## fine-tuning by one worker and by WORKERS=2 on this machine, and what a network would make of it
	@$(BIN)/python -m benchmarks scaling $(if $(WORKERS),--workers "$(WORKERS)")

pretrain: setup ## make the bundled base model anew: CORPUS=folder [EDITION=cpu|gpu]
	@test -n "$(CORPUS)" || { echo "error: CORPUS=<folder with pretrain/ and tasks/> is needed" >&2; exit 2; }
	@$(BIN)/python -m ml_engineer_track pretrain --corpus "$(CORPUS)" --edition $(or $(EDITION),cpu)

datasheet: setup ## refresh the generated part of datasets/README.md
	@$(BIN)/python -m shared.datasheet

doctor: ## will it run here, and what will be slow? Needs nothing installed
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m shared.doctor

workshop: setup ## lay out the scratch files of WORKSHOP.md in artifacts/workshop; yours are never overwritten
	@$(BIN)/python -m benchmarks.workshop start

check: setup ## is an exercise of WORKSHOP.md done? EX=3 ANSWER=0.42; exit status 0 or 1
	@test -n "$(EX)" || { echo "error: EX=<number of the exercise> is needed" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.workshop check $(EX) $(if $(ANSWER),--answer "$(ANSWER)")

answer: setup ## the answer to an exercise's question, from your own figures. EX=3
	@test -n "$(EX)" || { echo "error: EX=<number of the exercise> is needed" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.workshop answer $(EX)

attack: setup ## injections and jailbreaks against the running service, rates by kind; SECURITY.md says what is promised
	@test -e $(or $(ARTIFACTS),artifacts)/models/current || test -n "$(LLM_BASE_URL)" || $(BIN)/python -m ml_engineer_track run
	@$(BIN)/python -m ai_engineer_track attack

audit: setup ## licences, bill of materials and known weaknesses of what is installed, into artifacts/reports
	@$(PIP) -c torch.txt -c constraints.txt -e '.[audit]'
	@$(BIN)/python -m shared.audit

# torch and what its CUDA build brings are left out: which build is right depends on the machine, and each has hashes of its own.
lock: setup ## requirements.lock anew: every package of the core with the hashes of its files (uv)
	@$(PIP) -c torch.txt -c constraints.txt -e '.[audit]'
	@{ sed '/^[^#]/,$$d' requirements.lock; $(BIN)/uv pip compile pyproject.toml --generate-hashes --universal --python-version 3.11 --quiet \
	  --no-emit-package torch --no-annotate --no-header -c constraints.txt -c torch.txt \
	  | awk '/^[^ ]/ {skip = /^(nvidia|cuda|triton)/} !skip'; } > requirements.lock.part
	@mv requirements.lock.part requirements.lock

test: setup ## the tests that matter every day (under 8 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: setup ## all tests, the slow ones too
	@$(BIN)/python -m pytest -m ""

lint: setup ## format, lint, types, and the wall between the tracks
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

format: setup ## put the code into the project's format
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean: ## remove what runs produced (artifacts/)
	rm -rf artifacts

distclean: clean ## and the environment
	rm -rf $(VENV) *.egg-info

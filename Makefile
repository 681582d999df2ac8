# make demo      train, evaluate and draw the embedded default: no GPU, no network after installation
# make test      run the tests
# make controls  the demo beside branches that read no image, and what PVM's answers rest on: ten minutes more
# make seeds     the demo's comparison at further seeds (SEEDS="1 2"): about three times as long
# make style     format the code;   make quality: check it
# make benchmarks  cost beside the stock model, into benchmarks/results/$(MACHINE): half an hour, nothing else running
# make backbone  train the demo's tiny backbone anew (it ships in assets/)

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The demo's models are so small that a second thread costs more than it brings.
demo controls seeds backbone test: export OMP_NUM_THREADS ?= 1
# Nothing here needs the Hub.
demo controls seeds backbone test: export HF_HUB_OFFLINE ?= 1

# An interrupted training goes on from its last checkpoint.
resume = $(if $(wildcard $(1)/checkpoint-*),--resume_from_checkpoint last)

SEEDS ?= 1 2
seed_models = assets/digits-backbone $(foreach s,0 $(SEEDS),runs/digits_pvm$(if $(filter-out 0,$(s)),_seed$(s)) \
	runs/digits_lora$(if $(filter-out 0,$(s)),_seed$(s)))
seed_names = base $(foreach s,0 $(SEEDS),PVM-$(s) LoRA-$(s))

.PHONY: demo controls seeds test style quality backbone benchmarks

demo: $(INSTALLED) data/digits/test.parquet
	@mkdir -p runs
	$(MAKE) -j2 runs/digits_lora/adapter_model.safetensors runs/digits_pvm/model.pvm.safetensors
	$(RUN) eval.py --config recipes/digits_eval.yaml --overwrite true

controls: demo runs/digits_mlp/model.pvm.safetensors
	$(RUN) eval.py --config recipes/digits_eval.yaml --model assets/digits-backbone runs/digits_pvm runs/digits_mlp \
		runs/digits_lora --names base PVM MLP LoRA --output_dir runs/digits_controls --overwrite true
	$(RUN) eval.py --config recipes/digits_eval.yaml --model runs/digits_pvm --names PVM --output_dir runs/digits_knock_outs \
		--knock_outs branch_off another_memory hidden_image blind another_image --overwrite true

seeds: demo
	$(MAKE) -j2 $(foreach s,$(SEEDS),runs/digits_lora_seed$(s)/adapter_model.safetensors \
		runs/digits_pvm_seed$(s)/model.pvm.safetensors)
	$(RUN) eval.py --config recipes/digits_eval.yaml --model $(seed_models) --names $(seed_names) \
		--output_dir runs/digits_seeds --overwrite true

test: $(INSTALLED)
	$(RUN) -m pytest

style: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

quality: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

backbone: $(INSTALLED) data/digits-backbone/test.parquet
	$(RUN) -m pvm.digits.backbone --output_dir runs/digits_untrained
	$(RUN) train.py --config recipes/digits_backbone.yaml $(call resume,runs/digits_backbone)

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
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

data/digits/test.parquet:
	$(RUN) -m pvm.digits.data --output_dir data/digits

data/digits-backbone/test.parquet:
	$(RUN) -m pvm.digits.data --output_dir data/digits-backbone --stage backbone

runs/digits_pvm/model.pvm.safetensors:
	$(RUN) train.py --config recipes/digits_pvm.yaml $(call resume,$(@D))

runs/digits_mlp/model.pvm.safetensors:
	$(RUN) train.py --config recipes/digits_pvm.yaml --method mlp --output_dir $(@D) $(call resume,$(@D))

runs/digits_pvm_seed%/model.pvm.safetensors:
	$(RUN) train.py --config recipes/digits_pvm.yaml --seed $* --output_dir $(@D) $(call resume,$(@D))

# Beside the trainings above, so its progress goes to a file.
runs/digits_lora/adapter_model.safetensors:
	@echo "The LoRA control trains in parallel; its progress is in $(@D).log"
	@$(RUN) train.py --config recipes/digits_lora.yaml $(call resume,$(@D)) > $(@D).log 2>&1 \
		|| (tail -n 5 $(@D).log; exit 1)

runs/digits_lora_seed%/adapter_model.safetensors:
	@$(RUN) train.py --config recipes/digits_lora.yaml --seed $* --output_dir $(@D) $(call resume,$(@D)) \
		> $(@D).log 2>&1 || (tail -n 5 $(@D).log; exit 1)

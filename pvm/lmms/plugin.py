"""The entry point in pyproject.toml: tells lmms-eval which class `--model qwen3_vl_pvm` is."""

from lmms_eval.models.registry_v2 import ModelManifest


# A path instead of the class: lmms-eval reads entry points while it is itself being imported.
MANIFEST = ModelManifest(model_id="qwen3_vl_pvm", chat_class_path="pvm.lmms.model.Qwen3VLPVM")

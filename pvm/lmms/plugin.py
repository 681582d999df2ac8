"""What the entry point in pyproject.toml tells lmms-eval: which class `--model qwen3_vl_pvm` is."""

from lmms_eval.models.registry_v2 import ModelManifest


# The class is named and not imported: lmms-eval reads entry points in the middle of the import that the class needs.
MANIFEST = ModelManifest(model_id="qwen3_vl_pvm", chat_class_path="pvm.lmms.model.Qwen3VLPVM")

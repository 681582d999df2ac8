"""What an [`Engine`] asks vLLM's workers, in whose processes the model is."""

from typing import Any


class ModelReader:
    """vLLM's `worker_extension_cls`: adds a method to workers."""

    def describe_model(self) -> dict[str, Any]:
        """The class of the model, and its gates by decoder layer."""
        model = self.get_model()
        names = {name: gate for name, gate in model.named_parameters() if name.endswith(".pvm_block.gate_alpha")}
        gates = {name.partition(".layers.")[2].partition(".")[0]: gate.item() for name, gate in names.items()}
        return {"model_class": type(model).__name__, "gates": gates}

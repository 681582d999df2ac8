"""To be removed: what is left until methods, loading, inspect, card, convert and eval use `config.text_config.pvm_block`."""

VARIANTS = {}
WITH_MEMORY = ("pvm",)

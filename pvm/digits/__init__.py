"""The embedded default: boards of handwritten digits, and a tiny Qwen3-VL that reads them."""

"""The demo: boards of handwritten digits, and a tiny Qwen3-VL to read them."""

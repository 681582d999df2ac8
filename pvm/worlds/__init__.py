"""What the demo and the study are about: digits and icons in cells with names, and a tiny Qwen3-VL to read them."""

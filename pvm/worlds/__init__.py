"""Two small worlds, boards of digits and pictures with icons, and a tiny Qwen3-VL that reads both."""

"""Serving with vLLM (an extra): plugin.py is the entry point, model.py the model, refusals.py what is not served."""

"""Public benchmarks through lmms-eval: run.py runs them, report.py writes the report, model.py is the model for lmms-eval."""

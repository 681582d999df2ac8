"""Public benchmarks through lmms-eval: run.py runs them, report.py reports on them, model.py is the model it sees."""

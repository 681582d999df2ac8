"""
Evaluation, which eval.py runs:

- arguments.py: the command line; run.py: an evaluation from rows to files; progress.py: resuming it.
- questions.py: rows to questions; answering.py: questions to answers, intact or with one of ablations.py.
- matching.py: when an answer is correct: stated.py finds where it is stated, options.py, numerals.py, mathematics.py
  read it; scoring.py: answers to numbers, with metrics.py and bootstrap.py.
- diagnostics.py: attention, logit lens and branches while a model writes.
- tables.py, plots.py: numbers to tables and pictures; report.py, page.py: to report.md and report.html; card.py: to a
  model card.
"""

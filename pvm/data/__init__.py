"""
Data: file, folder or Hub name -> rows (sources, json_rows) -> conversations (forms) -> tensors and batches (encoding).

Every row is checked before training (validation) or, if there are too many, during it (streams).
"""

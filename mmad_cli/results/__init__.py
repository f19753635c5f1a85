"""Run results: the schema of a run folder, published reference numbers, and the comparison of the two."""

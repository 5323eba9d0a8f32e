"""What a reader of the method may skip: runs, public weights, data sets, the benchmark, tables, pictures."""

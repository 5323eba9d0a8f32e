"""What a reader of the method may skip: runs, public weights, data sets, the embedded benchmark, tables, pictures."""

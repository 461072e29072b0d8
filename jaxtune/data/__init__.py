"""From a file of records to batches of packed rows: sources -> chat -> packing -> loader."""

"""What is kept of a run and in which words: files, W&B, the names of metrics. Imports no other room."""

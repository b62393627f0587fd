"""Models and data pipelines: the allow-list, the proof of batch independence, tracing and building back."""

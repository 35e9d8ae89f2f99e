"""The report: what each quantization costs, measured side by side and told so that a person can decide."""

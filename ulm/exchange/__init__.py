"""What leaves for, and comes from, the formats of others: Hugging Face folders, GGUF files, quantised weights.

`architectures` has one file for each stock architecture. An export is exact, or refused with the reasons.
"""

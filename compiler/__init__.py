"""The graph, the analyses, the encodings, the driver. Imports nothing of ours."""

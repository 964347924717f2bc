"""
Model code that leaves with an export: `transformers` runs these files from the exported folder.

Each is for an architecture that transformers does not have. It needs torch and transformers and
nothing of ours; it is written beside the weights (hf_export.py) and named by config.json's
auto_map. Nothing here is imported by the package itself.
"""

"""
Measuring a model: bits per byte (bpb.py), the CORE benchmark of base models (core.py, its losses
scoring.py), and tasks put as conversations (chat.py). control.py tells knowledge from habit,
items.py keeps what was asked and answered, hf_folder.py opens other people's models. Floor 4.
"""

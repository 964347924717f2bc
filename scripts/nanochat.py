"""
Stands in for the package nanochat where a script is started by its path, `python scripts/X.py`.

Python then looks beside that file for what it imports, not in the folder that has the package. This
puts that folder first and hands over, so both ways to start a script work alike, and end in the
same words where the environment is not active (without this: "No module named 'nanochat'").
"""

import importlib
import os
import sys

if __name__ == "nanochat":  # scripts.nanochat is nobody's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    del sys.modules["nanochat"]  # Python takes the module that it finds here in the end
    sys.excepthook = importlib.import_module("nanochat").before_main

"""nanochat: train a ChatGPT of your own, from raw text to a web page to talk to."""

import importlib
import sys

OLDEST = (3, 10)  # of the Pythons that run this; the lines here are for older ones too


def before_main(kind, error, trace):
    """What ends a program before flags.run is there to tell it: a Python that is too old or lacks
    the packages (it is not the environment's), or Ctrl-C while torch is imported."""
    said = None
    if "--debug" in sys.argv:
        pass
    elif sys.version_info < OLDEST:
        found = "{} is {}.{}".format(sys.executable, *sys.version_info[:2])
        said = "error: nanochat needs Python 3.10 or newer, and " + found
        said += ". `source setup.sh` in nanochat's folder finds one and sets all up"
    elif issubclass(kind, KeyboardInterrupt):
        said = "interrupted"
    elif issubclass(kind, ImportError):
        known = importlib.import_module("nanochat.errors").explain(error)  # stands on us
        said = None if known is None else "error: " + str(known)
    if said is None:
        return sys.__excepthook__(kind, error, trace)
    sys.stderr.write(said + "\n")


if sys.argv[:1] == ["-m"]:  # `python -m scripts.X` is being started, nothing is imported yet
    sys.excepthook = before_main

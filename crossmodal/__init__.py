__version__ = "0.1.0"

_EXPERIMENTS = ("SYSTEMS", "evaluate", "load", "resume", "train")


def __getattr__(name):
    "The package's front door. It opens on demand, because torch stands behind it and a page of the workbook may not need it."
    if name not in _EXPERIMENTS: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crossmodal.systems import experiments
    return getattr(experiments, name)


def __dir__(): return [*globals(), *_EXPERIMENTS]

__version__ = "0.1.0"

from crossmodal.systems.experiments import SYSTEMS, evaluate, load, resume, train

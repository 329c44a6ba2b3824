"""The training loop (`ctrl.training`), by the name that users know."""

from ctrl.nodes import Conditions
from ctrl.training.guards import Guards
from ctrl.training.loop import Callback, Result, fit
from ctrl.training.run import Run
from ctrl.training.settings import Settings, linear_decay

__all__ = ["Callback", "Conditions", "Guards", "Result", "Run", "Settings", "fit", "linear_decay"]

"""What is trained: a classifier with one equilibrium layer in the middle."""

from deq.models.classifier import EquilibriumClassifier, ResidualCell
from deq.models.model import EquilibriumModel

__all__ = ["EquilibriumClassifier", "EquilibriumModel", "ResidualCell"]

"""What is trained: a classifier with one equilibrium layer in the middle."""

from deq.models.classifier import EquilibriumClassifier, ResidualCell

__all__ = ["EquilibriumClassifier", "ResidualCell"]

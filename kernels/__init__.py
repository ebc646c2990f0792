"""The hot loops of Anderson acceleration: torch and triton only, no neural networks. Imported as ``deq.kernels``."""

if __name__ == "kernels":  # from the repository's root, where this folder hides another project's package of that name
    raise ImportError(
        "the folder kernels here is the package deq.kernels, write from deq.kernels import AndersonWindow; for another "
        "package of the name kernels, start Python in another folder",
        name="kernels",
    )

from .state import BackendName, Outcome
from .window import AndersonWindow, Regularization, residual_norm

__all__ = ["AndersonWindow", "BackendName", "Outcome", "Regularization", "residual_norm"]

"""
Seeing inside a trained model: what its embeddings, its linear model and its values are worth.
"""

from sb3_mrq.diagnostics.callback import DiagnosticsCallback
from sb3_mrq.diagnostics.diagnosis import (
    Diagnosis,
    EmbeddingHealth,
    EmbeddingMap,
    LinearProbe,
    ModelAccuracy,
    ReturnComparison,
    diagnose,
)

__all__ = [
    "Diagnosis",
    "DiagnosticsCallback",
    "EmbeddingHealth",
    "EmbeddingMap",
    "LinearProbe",
    "ModelAccuracy",
    "ReturnComparison",
    "diagnose",
]

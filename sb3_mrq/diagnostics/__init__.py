"""
Diagnostics of a trained model: quality of its embeddings, its linear model and its value estimates.
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
from sb3_mrq.diagnostics.verdicts import Verdict

__all__ = [
    "Diagnosis",
    "DiagnosticsCallback",
    "EmbeddingHealth",
    "EmbeddingMap",
    "LinearProbe",
    "ModelAccuracy",
    "ReturnComparison",
    "Verdict",
    "diagnose",
]

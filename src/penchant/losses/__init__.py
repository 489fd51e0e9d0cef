"""Preference losses: each one frozen dataclass, its fields the hyperparameters, its call the equation."""

from penchant.losses.absolute import APODownLoss, APOZeroLoss, BCOPairLoss, NCALoss, SPPOLoss
from penchant.losses.base import (
    LOSSES,
    NEEDS,
    Loss,
    PairLoss,
    RankedLoss,
    RolloutLoss,
    UnpairedLoss,
    WeightedSum,
    preference_accuracy,
)
from penchant.losses.build import build_loss, field_help
from penchant.losses.lengths import LengthDesensitizedDPOLoss, LengthNormalizedDPOLoss, LengthRegularizedDPOLoss
from penchant.losses.pairwise import (
    AOTLoss,
    DiscoPOPLoss,
    DPOLoss,
    DPOPLoss,
    EXOLoss,
    FDivergenceDPOLoss,
    HingeLoss,
    IPOLoss,
    OffsetDPOLoss,
    RobustDPOLoss,
    WPOLoss,
)
from penchant.losses.policy_gradient import GRPOLoss, PPOLoss
from penchant.losses.ranked import PlackettLuceDPOLoss
from penchant.losses.reference_free import CPOLoss, ORPOLoss, SFTLoss, SimPOLoss, SLiCLoss, UnlikelihoodLoss
from penchant.losses.reward import RewardLoss
from penchant.losses.unpaired import AOTUnpairedLoss, APOZeroUnpairedLoss, BCOLoss, KTOLoss

__all__ = [
    "LOSSES",
    "NEEDS",
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "APOZeroUnpairedLoss",
    "BCOLoss",
    "BCOPairLoss",
    "CPOLoss",
    "DPOLoss",
    "DPOPLoss",
    "DiscoPOPLoss",
    "EXOLoss",
    "FDivergenceDPOLoss",
    "GRPOLoss",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "LengthDesensitizedDPOLoss",
    "LengthNormalizedDPOLoss",
    "LengthRegularizedDPOLoss",
    "Loss",
    "NCALoss",
    "ORPOLoss",
    "OffsetDPOLoss",
    "PPOLoss",
    "PairLoss",
    "PlackettLuceDPOLoss",
    "RankedLoss",
    "RewardLoss",
    "RobustDPOLoss",
    "RolloutLoss",
    "SFTLoss",
    "SLiCLoss",
    "SPPOLoss",
    "SimPOLoss",
    "UnlikelihoodLoss",
    "UnpairedLoss",
    "WPOLoss",
    "WeightedSum",
    "build_loss",
    "field_help",
    "preference_accuracy",
]

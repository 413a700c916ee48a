# SPDX-License-Identifier: Apache-2.0
"""Shapes of sparsity: which entries of a weight go together, and how many of them stay."""

from fxslim.patterns.blocks import Block as Block
from fxslim.patterns.checking import PatternCheck as PatternCheck
from fxslim.patterns.checking import check as check
from fxslim.patterns.chips import Eligibility as Eligibility
from fxslim.patterns.chips import eligible as eligible
from fxslim.patterns.n_of_m import NM as NM
from fxslim.patterns.names import as_pattern as as_pattern
from fxslim.patterns.names import pattern_from_dict as pattern_from_dict
from fxslim.patterns.pattern import Pattern as Pattern
from fxslim.patterns.unstructured import Unstructured as Unstructured

"""How good are samples: FID, sFID, Inception Score, precision and recall, as ADM (Dhariwal & Nichol 2021) reports them.

Rooms: `reader` (images out of files), `checks` (before hours are spent), `backends` (images -> features), `statistics`
(moments, Fréchet distance, Inception Score), `manifold` (precision and recall), `scores` (all of them together, also
from training), `references` (what to compare with); `evaluator`, `make_reference` and `benchmark` are commands.
"""

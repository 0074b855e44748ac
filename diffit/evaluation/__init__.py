"""How good are samples: FID, sFID, Inception Score, precision and recall, as ADM (Dhariwal & Nichol 2021) reports them.

`features` turns images into features, by `inception` or a classifier of your own. `statistics` (moments, Fréchet
distance, Inception Score) and `manifold` (precision and recall) compare them; `scores` has all numbers together, also
for training. `reader` opens .npz files, `checks` inspects them before hours are spent, `reference` makes what samples
are compared with, and `fashion` brings a classifier and a reference along.
"""
